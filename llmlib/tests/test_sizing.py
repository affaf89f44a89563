from dataclasses import astuple

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmlib import sizing
from llmlib.config import SCALES, ModelConfig, llama_config, resize, with_micro_batch
from llmlib.model import build_model
from llmlib.sizing import PUBLISHED_FITS, fit_loss_surface

LLAMA = llama_config(3, 64, d_head=16, vocab_size=320, seq_len=32)
SMALL = [LLAMA, resize(LLAMA, arch="gpt2")]
BESIROGLU = PUBLISHED_FITS["Besiroglu et al. 2024"]


def test_recipe_and_baseline_have_the_published_sizes():
    assert sizing.count_params(ModelConfig()) == 179_983_360
    baseline = resize(ModelConfig(), arch="gpt2")
    positions = baseline.seq_len * baseline.d_model
    assert (sizing.count_params(baseline) - positions) / 1e6 == pytest.approx(123.6, abs=0.05)
    assert sizing.flops_per_token(ModelConfig()) == pytest.approx(1.143e9, rel=1e-3)


@pytest.mark.parametrize("config", SMALL, ids=lambda c: c.arch)
def test_parameter_formula_equals_numel(config):
    counts = {name: p.numel() for name, p in build_model(config).named_parameters()}
    hidden = [n for name, n in counts.items() if not name.startswith("embed_")]
    assert sizing.count_params(config) == sum(counts.values())
    assert sizing.count_params(config, embeddings=False) == sum(hidden)


@pytest.mark.parametrize("config", SMALL, ids=lambda c: c.arch)
def test_flops_per_token_equal_torchs_counter(config):
    tokens = torch.zeros(2, config.seq_len, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build_model(config)(tokens, tokens).backward()
    assert counter.get_total_flops() / tokens.numel() == sizing.flops_per_token(config)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("CPU", None),
    ],
)
def test_datasheet_peak_is_known_or_none(name, peak):
    assert sizing.datasheet_peak(name) == peak


def test_micro_batch_is_the_largest_divisor_that_fits_nine_tenths_of_a_card():
    model, train = SCALES["a100"].model, SCALES["a100"].train
    needed = {2**n: sizing.step_memory(model, with_micro_batch(train, 2**n)) for n in range(9)}
    for gb in (8, 12, 16, 24, 40, 80):
        largest = max(size for size, memory in needed.items() if memory <= 0.9e9 * gb)
        assert sizing.fitting_micro_batch(model, train, gb * 1e9) == largest
    assert sizing.fitting_micro_batch(model, train, None) == train.micro_batch
    assert sizing.fitting_micro_batch(model, train, 1e9) == 1


# ------------------------------------------------------------------ the loss surface


def measure(truth=BESIROGLU, *, n=60, noise=0.01, seed=0):
    """Points of a known surface, as many and as widely spread as the published ones, with noise."""
    rng = np.random.default_rng(seed)
    n_params = np.exp(rng.uniform(np.log(5e7), np.log(1e10), n))
    n_tokens = np.exp(rng.uniform(np.log(1e9), np.log(3e11), n))
    return n_params, n_tokens, truth.loss(n_params, n_tokens) * np.exp(noise * rng.normal(size=n))


def objective(constants, n_params, n_tokens, loss):
    """The published objective, written out plainly."""
    e, a, b, alpha, beta = constants
    residual = np.log(e + a / n_params**alpha + b / n_tokens**beta) - np.log(loss)
    small = np.abs(residual) <= 1e-3
    return np.where(small, residual**2 / 2, 1e-3 * (np.abs(residual) - 1e-3 / 2)).sum()


@pytest.mark.parametrize("fit", PUBLISHED_FITS.values(), ids=PUBLISHED_FITS)
def test_closed_form_optimum_is_the_lowest_point_of_the_curve(fit):
    flops = 1.35e18
    sizes = np.geomspace(1e7, 1e9, 20_001)
    lowest = sizes[np.argmin(fit.loss(sizes, flops / 6 / sizes))]
    assert fit.optimal_params(flops) == pytest.approx(lowest, rel=1e-3)


def test_three_hours_of_an_a100_ask_for_the_published_sizes():
    for flops, at_20, by_fit in ((1.35e18, 106e6, 94e6), (2.02e18, 130e6, 116e6)):
        table = sizing.published_optima(flops).set_index("source")
        assert table.n_params["20 tokens per parameter"] == pytest.approx(at_20, rel=0.01)
        assert table.n_params["Besiroglu et al. 2024"] == pytest.approx(by_fit, rel=0.02)
        assert (6 * table.n_params * table.n_tokens).tolist() == pytest.approx([flops] * 3)


@pytest.mark.parametrize("truth", PUBLISHED_FITS.values(), ids=PUBLISHED_FITS)
def test_fit_recovers_a_known_surface(truth):
    exact = fit_loss_surface(*measure(truth, noise=0))
    assert astuple(exact)[:5] == pytest.approx(astuple(truth)[:5], rel=1e-3)
    noisy = fit_loss_surface(*measure(truth, n=240))
    assert noisy.optimal_params(1e21) == pytest.approx(truth.optimal_params(1e21), rel=0.1)


@pytest.mark.parametrize("design", ["isoFLOP", "over-trained"])
def test_tables_as_others_publish_them_give_their_optimum(design):
    flops = np.repeat([1e19, 1e20, 1e21, 1e22], 6)
    if design == "isoFLOP":  # every size is met once
        n_params = BESIROGLU.optimal_params(flops) * np.tile(np.geomspace(0.3, 3, 6), 4)
        n_tokens = flops / (6 * n_params)
    else:  # to 640 tokens per parameter
        n_params = np.repeat([1e7, 8e7, 4e8, 2e9], 6)
        n_tokens = n_params * np.tile([5, 20, 40, 160, 320, 640], 4)
    fit = fit_loss_surface(n_params, n_tokens, BESIROGLU.loss(n_params, n_tokens))
    assert fit.optimal_params(flops) == pytest.approx(BESIROGLU.optimal_params(flops), rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_no_neighbour_of_the_fit_has_a_lower_objective(seed):
    points = measure(seed=seed)
    fitted = astuple(fit_loss_surface(*points))[:5]
    lowest, rng = objective(fitted, *points), np.random.default_rng(seed)
    assert lowest <= objective(astuple(BESIROGLU)[:5], *points)
    for size in (1e-4, 1e-3, 1e-2, 1e-1):
        for _ in range(200):
            moved = fitted * np.exp(size * rng.normal(size=5))
            assert objective(moved, *points) > lowest * (1 - 1e-6)


def test_bootstrap_holds_the_truth_most_of_the_time():
    hits, n, truth = 0, 10, BESIROGLU.optimal_params(1e21)
    for seed in range(n):
        fit = fit_loss_surface(*measure(n=40, seed=seed), n_samples=25, seed=seed)
        low, high = np.quantile(fit.samples.optimal_params(1e21), [0.05, 0.95])
        hits += low < truth < high
        assert all(np.ptp(constants) > 0 for constants in astuple(fit.samples)[:5])
    assert hits > 6  # of Binomial(10, 0.9), 6 or fewer come up once in 80 times


@pytest.mark.parametrize(("n_tokens", "loss"), [([1e6] * 6, 3.0), ([1e6, 1e7, 1e8] * 2, np.nan)])
def test_points_that_cannot_identify_a_surface_are_refused(n_tokens, loss):
    with pytest.raises(ValueError, match=r"6 points can't test five constants; .* 3 or more token"):
        fit_loss_surface([1e6, 2e6, 4e6, 5e6, 6e6, 7e6], n_tokens, [loss] * 6)
