"""Optimizers and schedules: against torch's and the papers' equations, and what they promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.testing import assert_close

from llmlib import checkpoint, optim
from llmlib.config import OPTIMIZERS, SCHEDULES, ModelConfig, TrainConfig, resize
from llmlib.model import build_model
from llmlib.optim import Sophia, build_optimizer, lr_factor, orthogonalize
from llmlib.step import autocast, train_step

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")  # schedules without steps
SHAPE = {"vocab_size": 64, "seq_len": 16, "n_layer": 2, "n_head": 2, "d_model": 16}
LLAMA = ModelConfig(d_ff=32, **SHAPE)
MODELS = {"llama": LLAMA, "gpt2": resize(LLAMA, arch="gpt2", d_model=16)}
SETTINGS = {"micro_batch": 2, "grad_accum": 2, "lr": 3e-3, "betas": (0.9, 0.95)}


def set_lr(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def build(optimizer, arch="llama", seed=1, dtype=torch.float32, **settings):
    model = build_model(MODELS[arch], seed=seed)
    config = TrainConfig(optimizer=optimizer, **SETTINGS | settings)
    return model, build_optimizer(model, config, dtype)


def batch(seed):
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def take_steps(model, optimizer, steps):
    how = {"micro_batch": 2, "grad_clip": 1.0, "dtype": torch.float32}
    for i in steps:
        train_step(model, optimizer, *batch(i), lr_factor=1 / (1 + i), **how)


def take_steps_beside(ours, optimizer, theirs, *references):
    """Take the same steps at falling rates, on gradients that are drawn alike."""
    generator = torch.Generator().manual_seed(0)
    for factor in (1.0, 0.3, 0.03, 1.0):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for o in (optimizer, *references):
            set_lr(o, factor)
            o.step()


def split(model):
    """Return a model's hidden matrices, its other matrices and its vectors, found by their names."""
    params = dict(model.named_parameters())
    vectors = [p for name, p in params.items() if "norm" in name or "ln_" in name]
    embeddings = [p for name, p in params.items() if name.startswith("embed_")]
    hidden = [p for name, p in params.items() if name.endswith("_proj.weight")]
    assert len(vectors) + len(embeddings) + len(hidden) == len(params)
    return hidden, embeddings, vectors


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rates", [{"embed_lr": 4e-3, "vector_lr": 1e-3}, {}])
def test_every_parameter_has_one_group_with_the_rate_and_decay_of_its_kind(name, arch, rates):
    model, optimizer = build(name, arch, lr=2e-2, weight_decay=0.3, **rates)
    set_lr(optimizer, 0.25)
    found = [(p, g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(list(model.parameters()))
    of = {id(p): settings for p, *settings in found}
    decay = 0.2 if name == "sophia" else 0.3  # as published
    peaks = 2e-2, rates.get("embed_lr", 2e-2), rates.get("vector_lr", 2e-2)
    for params, peak, wanted in zip(split(model), peaks, (decay, decay, 0.0), strict=True):
        assert all(of[id(p)] == [0.25 * peak, wanted] for p in params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_goes_on_as_if_nothing_had_happened(tmp_path, name):
    model, optimizer = build(name)
    take_steps(model, optimizer, range(8))
    checkpoint.write(tmp_path, 8, checkpoint.pack(model, optimizer, {}))
    other, its_optimizer = build(name, seed=2)
    checkpoint.restore(other, its_optimizer, checkpoint.newest_valid(tmp_path))
    for m, o in ((model, optimizer), (other, its_optimizer)):
        take_steps(m, o, range(8, 13))
    for ours, theirs in ((other, model), (its_optimizer, optimizer)):
        assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


# ------------------------------------------------------------------ AdamW and Muon


def test_adamw_steps_match_torchs_plain_loop():
    ours, optimizer = build("adamw", weight_decay=0.1)
    theirs = build_model(MODELS["llama"], seed=1)
    hidden, embeddings, vectors = split(theirs)
    matrices = {"params": hidden + embeddings, "peak_lr": 3e-3, "weight_decay": 0.1}
    groups = [matrices, {"params": vectors, "peak_lr": 3e-3, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, fused=False)
    take_steps_beside(ours, optimizer, theirs, reference)
    assert_close([*ours.parameters()], [*theirs.parameters()], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (4, 12, 12)])
def test_orthogonalize_applies_its_polynomial_to_the_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    s /= s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = orthogonalize(matrices, torch.float32).double()
    assert_close(found, u @ s.diag_embed() @ vt, rtol=0, atol=1e-4)
    assert orthogonalize(torch.zeros(shape), torch.float32).count_nonzero() == 0


@pytest.mark.parametrize("arch", MODELS)
def test_muon_steps_match_torchs_with_adamw_beside_it(arch):
    settings = {"weight_decay": 0.1, "lr": 6e-3, "embed_lr": 3e-3, "vector_lr": 1e-3}
    ours, optimizer = build("muon", arch, dtype=torch.bfloat16, **settings)  # as torch's always is
    theirs, start = (build_model(MODELS[arch], seed=1) for _ in range(2))
    hidden, embeddings, vectors = split(theirs)
    matrices = {"params": hidden, "peak_lr": 6e-3, "weight_decay": 0.1}
    muon = torch.optim.Muon([matrices], adjust_lr_fn="match_rms_adamw")
    others = [
        {"params": embeddings, "peak_lr": 3e-3, "weight_decay": 0.1},
        {"params": vectors, "peak_lr": 1e-3, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95))
    take_steps_beside(ours, optimizer, theirs, muon, adamw)
    our_hidden, our_embeddings, our_vectors = split(ours)
    assert_close(our_embeddings + our_vectors, embeddings + vectors, rtol=1e-6, atol=1e-7)
    for p, q, before in zip(our_hidden, hidden, split(start)[0], strict=True):
        moved, off = (q - before).norm(), (p - q).norm()
        assert moved > 0.01
        assert off < 0.02 * moved  # bf16 has three digits


# ------------------------------------------------------------------ Sophia


class PlainSophia(torch.optim.Optimizer):
    """Sophia-G as published: the squared gradient of a whole step, times ``bs`` in the update."""

    def __init__(self, params, beta1, beta2, rho, bs, weight_decay):
        super().__init__(params, {"lr": 0.0, "peak_lr": 3e-3})
        self.constants = beta1, beta2, rho, bs, weight_decay

    def update_hessian(self, grads):
        for p, g in zip(self.param_groups[0]["params"], grads, strict=True):
            b2 = self.constants[1]
            self.state[p]["h"] = b2 * self.state[p].get("h", 0) + (1 - b2) * g.double() ** 2

    @torch.no_grad()
    def step(self):
        b1, _, rho, bs, decay = self.constants
        for group in self.param_groups:
            for p in group["params"]:
                s, lr = self.state[p], group["lr"]
                s["m"] = b1 * s.get("m", 0) + (1 - b1) * p.grad.double()
                ratio = (s["m"].abs() / (rho * bs * s["h"] + 1e-15)).clamp(max=1)
                p *= 1 - lr * (decay if p.dim() == 2 else 0)
                p -= (lr * s["m"].sign() * ratio).float()


@pytest.mark.parametrize(
    ("name", "beta1", "beta2", "bs", "weight_decay"),
    [("sophia", 0.965, 0.99, 64, 0.2), ("sophia_writeup", 0.9, 0.95, 5120, 0.1)],
)
def test_sophia_steps_match_the_published_form(monkeypatch, name, beta1, beta2, bs, weight_decay):
    monkeypatch.setattr(optim, "draw", lambda logits, _: logits.argmax(-1))
    monkeypatch.setattr(Sophia, "HESSIAN_INTERVAL", 4)
    ours, optimizer = build(name, weight_decay=0.1)  # 4 sequences of 16: 64 tokens per step
    theirs = build_model(MODELS["llama"], seed=1)
    reference = PlainSophia(theirs.parameters(), beta1, beta2, 0.05, bs, weight_decay)
    for i in range(5):
        assert optimizer.hessian_is_due
        inputs, _ = batch(i)
        optimizer.estimate_hessian(ours, inputs)
        logits = theirs(inputs).flatten(0, 1)
        loss = F.cross_entropy(logits, logits.argmax(-1))
        reference.update_hessian(torch.autograd.grad(loss, list(theirs.parameters())))
        take_steps_beside(ours, optimizer, theirs, reference)  # four
    assert_close([*ours.parameters()], [*theirs.parameters()], rtol=1e-4, atol=1e-6)


class Softmax(nn.Module):
    """A linear softmax over V classes of inputs (n, 1) that look up features (d)."""

    def __init__(self, n, d, n_classes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(n, d, generator=generator)
        self.weight = nn.Parameter(torch.randn(n_classes, d, generator=generator))

    def forward(self, inputs, targets=None):
        logits = self.features[inputs] @ self.weight.t()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def test_gauss_newton_bartlett_estimate_is_right_on_average():
    n, n_draws = 6, 500
    model, mean = Softmax(n, 4, 5), torch.zeros(5, 4)
    optimizer = Sophia([{"params": [model.weight]}], 0.1, betas=(0.9, 0.0), rho=0.05)
    for i in range(n_draws):
        optimizer.param_groups[0]["n_steps"] = i  # other labels each time
        optimizer.estimate_hessian(model, torch.arange(n)[:, None])
        mean += optimizer.state[model.weight]["hessian"] / n_draws

    def loss(weight):  # linear up to the softmax, so its Hessian is Gauss-Newton's
        return F.cross_entropy(model.features @ weight.t(), torch.zeros(n, dtype=torch.long))

    hessian = torch.autograd.functional.hessian(loss, model.weight.detach())
    exact = hessian.flatten(2).flatten(0, 1).diag().view(5, 4)
    assert_close(mean, exact, rtol=0, atol=0.1 * exact.max().item())
    assert mean.sum().item() == pytest.approx(exact.sum().item(), rel=0.04)


def test_hessian_in_bf16_is_close_to_that_in_fp32(monkeypatch):
    """Whatever torch remembers of the pass that draws, gradients reach the weights in the next."""
    _, labels = batch(1)
    monkeypatch.setattr(optim, "draw", lambda *_: labels)
    hessians = []
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = build("sophia")
        with autocast(torch.device("cpu"), dtype):
            optimizer.estimate_hessian(model, batch(0)[0])
        hessians.append([optimizer.state[p]["hessian"] for p in model.parameters()])
    for full, low in zip(*hessians, strict=True):
        assert full.sum() > 0
        assert (low - full).norm() < 0.1 * full.norm()


def test_hessian_is_estimated_before_every_tenth_step():
    model, optimizer = build("sophia")
    hessians = [torch.zeros_like(model.norm.weight)]
    for i in range(21):
        take_steps(model, optimizer, [i])
        hessians.append(optimizer.state[model.norm.weight]["hessian"].clone())
    changed = [i for i in range(21) if not torch.equal(hessians[i], hessians[i + 1])]
    assert changed == [0, 10, 20]


@pytest.mark.parametrize(
    ("scale", "least", "most"), [(1e-12, 0.9, 1), (1e-5, 0.1, 0.9), (1, 0, 0.1)]
)
def test_sophias_steps_are_clipped_and_the_unclipped_are_counted(scale, least, most):
    model, optimizer = build("sophia_writeup", lr=1e-3, weight_decay=0.0)
    before = nn.utils.parameters_to_vector(model.parameters())
    optimizer.estimate_hessian(model, batch(0)[0])
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape)
    optimizer.step()
    moves = (nn.utils.parameters_to_vector(model.parameters()) - before).abs() / 1e-3
    unclipped = (moves < 1 - 1e-3).float().mean().item()
    assert moves.max() < 1 + 1e-3
    assert least <= unclipped <= most
    assert float(optimizer.unclipped_share) == pytest.approx(unclipped, abs=0.01)


def test_drawn_labels_are_labels_whatever_the_logits():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [-math.inf, 0.0, -math.inf], [math.nan] * 3])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([optim.draw(logits, generator) for _ in range(100)], dim=1)
    assert set(drawn[0].tolist()) == {0, 1}
    assert set(drawn[1].tolist()) == {1}
    assert drawn.max() < 3


def test_hessian_that_is_not_finite_does_not_reach_the_weights():
    model, optimizer = build("sophia")
    broken = lambda *batch: model(*batch) * math.nan  # noqa: E731
    broken.module = model  # as in a wrapper for several processes
    optimizer.estimate_hessian(broken, batch(0)[0])
    take_steps(model, optimizer, [0])
    assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------ schedules


def rate(schedule, progress, warmup, final_lr, cooldown=0.5):
    shape = {"warmup": warmup, "final_lr": final_lr, "cooldown": cooldown}
    return lr_factor(TrainConfig(schedule=schedule, **shape), progress)


def torchs_rates(schedule, n_steps, **settings):
    """The rates that a schedule of torch gives to steps 0 to ``n_steps``."""
    scheduler = schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), **settings)
    yield from scheduler.get_last_lr()
    for _ in range(n_steps):
        scheduler.step()
        yield from scheduler.get_last_lr()


@pytest.mark.parametrize(("name", "n_steps"), [("one_cycle", 1000), ("one_cycle_unfinished", 878)])
def test_one_cycle_of_1000_steps_matches_torch_as_far_as_it_gets(name, n_steps):
    peak, settings = 1.25e-3, {"total_steps": 1001, "pct_start": 0.05, "div_factor": 100}
    settings |= {"final_div_factor": 0.1}  # of the initial rate: peak / 100 / 0.1 = 0.1 peak
    theirs = torchs_rates(lr_scheduler.OneCycleLR, n_steps, max_lr=peak, **settings)
    warmup = (0.05 * 1001 - 1) / 1000  # torch ends it one step before the share is full
    for step, expected in enumerate(theirs):
        ours = peak * rate(name, step / n_steps, warmup, final_lr=0.1)
        assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "theirs", "settings"),
    [
        ("cosine", lr_scheduler.CosineAnnealingLR, {"T_max": 900, "eta_min": 0.1}),
        (
            "linear",
            lr_scheduler.LinearLR,
            {"start_factor": 1, "end_factor": 0.1, "total_iters": 900},
        ),
    ],
)
def test_after_the_warmup_the_fall_is_torchs(name, theirs, settings):
    for step, expected in enumerate(torchs_rates(theirs, 900, **settings)):
        assert rate(name, 0.1 + step / 1000, 0.1, 0.1) == pytest.approx(expected)


def test_wsd_stays_at_the_peak_and_falls_along_a_line_at_the_end():
    progress = [0.0, 0.05, 0.1, 0.5, 0.75, 0.8, 0.9, 1.0]
    rates = [rate("wsd", p, 0.1, 0.2, cooldown=0.25) for p in progress]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.84, 0.52, 0.2])
    assert rate("wsd", 1.0, 0.1, 0.2, cooldown=0.0) == 1.0
    for p in progress:  # too long a one begins behind the warm-up
        assert rate("wsd", p, 0.1, 0.2, cooldown=0.95) == rate("linear", p, 0.1, 0.2)


@pytest.mark.parametrize("name", [s for s in SCHEDULES if s != "one_cycle_unfinished"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("final_lr", [0.0, 0.1])
def test_schedule_starts_low_peaks_and_ends_where_promised(name, warmup, final_lr):
    rates = [rate(name, i / 1000, warmup, final_lr) for i in range(1001)]
    assert rates[-1] == pytest.approx(final_lr, abs=1e-15)
    assert rates[round(1000 * warmup)] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.01 if warmup else 1.0)
