import numpy as np
import pandas as pd
import pytest

from llmlib import plots, surface
from llmlib.sizing import params_at_ratio
from llmlib.surface import CONSTANTS, PUBLISHED_FITS, LossSurface, SurfaceFit, fit_loss_surface

BESIROGLU = PUBLISHED_FITS["Besiroglu et al. 2024"]
SPEEDS = pd.DataFrame({"n_params": [1e5, 1e6, 1e7], "tokens_per_s": [1e5, 1e4, 1e3]})


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
        assert params_at_ratio(flops, 20) == pytest.approx(at_20, rel=0.01)
        assert BESIROGLU.optimal_params(flops) == pytest.approx(by_fit, rel=0.02)


# Hoffmann et al. 2022, tables 3 and A3: FLOPs and tokens at which a size is optimal.
@pytest.mark.parametrize(
    ("row", "n_params", "flops", "n_tokens"),
    [
        (0, 400e6, 1.92e19, 8.0e9),
        (0, 1e9, 1.21e20, 20.2e9),
        (1, 400e6, 1.84e19, 7.7e9),
        (1, 1e9, 1.20e20, 20.0e9),
        (2, 400e6, 2.21e19, 9.2e9),
        (2, 1e9, 1.62e20, 27.1e9),
    ],
)
def test_chinchillas_exponents_connect_its_published_optima(row, n_params, flops, n_tokens):
    optimum = surface.published_optima(flops).loc[row]
    assert optimum.n_params == pytest.approx(n_params, rel=0.01)
    assert optimum.n_tokens == pytest.approx(n_tokens, rel=0.01)


def test_write_ups_ratio_is_6_4_by_the_steps_it_took():
    table = surface.write_up_arithmetic().set_index("quantity")
    assert table.loc["parameters", "exact"] == 179_983_360
    assert table.loc["tokens per parameter", "exact"] == pytest.approx(6.4, abs=0.01)
    assert table.loc["tokens per parameter", "from_its_own_numbers"] == pytest.approx(6.1, abs=0.01)


@pytest.mark.parametrize("truth", PUBLISHED_FITS.values(), ids=PUBLISHED_FITS)
def test_fit_recovers_a_known_surface(truth):
    exact = fit_loss_surface(*measure(truth, noise=0)).surface
    noisy = fit_loss_surface(*measure(truth, n=240)).surface
    assert vars(exact) == pytest.approx(vars(truth), rel=1e-3)
    assert noisy.exponent == pytest.approx(truth.exponent, abs=0.03)
    assert noisy.optimal_params(1e21) == pytest.approx(truth.optimal_params(1e21), rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_no_neighbour_of_the_fit_has_a_lower_objective(seed):
    points = measure(seed=seed)
    fitted = np.array([vars(fit_loss_surface(*points).surface)[name] for name in CONSTANTS])
    lowest, rng = objective(fitted, *points), np.random.default_rng(seed)
    assert lowest < objective([vars(BESIROGLU)[name] for name in CONSTANTS], *points)
    for size in (1e-4, 1e-3, 1e-2, 1e-1):
        for _ in range(300):
            moved = fitted * np.exp(size * rng.normal(size=5))
            assert objective(moved, *points) > lowest * (1 - 1e-9)


def test_fit_depends_neither_on_units_nor_on_the_order_of_points():
    n_params, n_tokens, loss = measure()
    order = np.random.default_rng(1).permutation(len(loss))
    one = fit_loss_surface(n_params, n_tokens, loss, n_bootstrap=5)
    turned = fit_loss_surface(n_params[order], n_tokens[order], loss[order], n_bootstrap=5)
    scaled = fit_loss_surface(n_params / 1e6, n_tokens / 1e9, loss, n_bootstrap=5)
    pd.testing.assert_frame_equal(one.samples, turned.samples, rtol=1e-9)
    back = scaled.samples.assign(
        A=scaled.samples.A * 1e6**scaled.samples.alpha,
        B=scaled.samples.B * 1e9**scaled.samples.beta,
    )
    pd.testing.assert_frame_equal(one.samples, back, rtol=1e-3)


def test_90_percent_intervals_hold_the_truth_about_nine_times_in_ten():
    hits, n = {"a": 0, "E": 0, "n_params": 0}, 20
    for seed in range(n):
        fit = fit_loss_surface(*measure(n=40, seed=seed), n_bootstrap=100, seed=seed)
        table, optimum = fit.table().set_index("constant"), fit.optimum(1e21).loc[0]
        hits["a"] += table.low["a"] < BESIROGLU.exponent < table.high["a"]
        hits["E"] += table.low["E"] < BESIROGLU.E < table.high["E"]
        best = BESIROGLU.optimal_params(1e21)
        hits["n_params"] += optimum.n_params_low < best < optimum.n_params_high
    # Of Binomial(20, 0.9), 14 or fewer come up once in 90 times.
    assert all(count > 14 for count in hits.values()), hits
    assert min(hits.values()) < n, "intervals that never miss are too wide"


def test_points_of_one_trunk_are_resampled_together():
    n_params = np.repeat(np.geomspace(1e5, 1e7, 8), 8)
    n_tokens = np.tile(np.geomspace(1e6, 1e8, 8), 8)
    rng = np.random.default_rng(0)
    shared = np.exp(0.02 * np.repeat(rng.normal(size=8), 8) + 0.001 * rng.normal(size=64))
    points = (
        n_params,
        n_tokens,
        LossSurface(1.5, 60, 600, 0.35, 0.38).loss(n_params, n_tokens) * shared,
    )
    alone = fit_loss_surface(*points, n_bootstrap=100)
    together = fit_loss_surface(*points, n_bootstrap=100, groups=[f"{n:.0f}" for n in n_params])
    errors = [fit.table().standard_error[3] for fit in (alone, together)]  # of alpha
    assert errors[1] > 1.5 * errors[0]


GOOD = measure(n=12)


@pytest.mark.parametrize(
    ("points", "options", "words"),
    [
        ([c[:5] for c in GOOD], {}, "5 distinct points.*measure 6"),
        ([np.repeat(c[:4], 3) for c in GOOD], {}, "4 distinct points"),
        ([np.full(12, 1e8), *GOOD[1:]], {}, "n_params has 1 distinct"),
        ([np.resize([1e8, 1e9], 12), *GOOD[1:]], {}, "n_params has 2 distinct"),
        ([GOOD[0], np.full(12, 1e9), GOOD[2]], {}, "n_tokens has 1 distinct"),
        ([GOOD[0], 20 * GOOD[0], GOOD[2]], {}, "one line.*vary the tokens"),
        ([*GOOD[:2], -GOOD[2]], {}, "loss holds -"),
        ([*GOOD[:2], np.r_[np.nan, GOOD[2][1:]]], {}, r"loss holds nan \(1 such"),
        ([np.r_[np.inf, GOOD[0][1:]], *GOOD[1:]], {}, "n_params holds inf"),
        ([GOOD[0], np.r_[0, GOOD[1][1:]], GOOD[2]], {}, "n_tokens holds 0"),
        ([*GOOD[:2], GOOD[2][:7]], {}, "n_params 12, n_tokens 12, loss 7"),
        ([*GOOD[:2], np.full(12, 3.0)], {}, "loss does not fall as n_params grows"),
        (GOOD, {"n_bootstrap": -1}, "n_bootstrap=-1"),
        (GOOD, {"groups": [1, 2]}, "2 labels for 12 points"),
        (GOOD, {"n_bootstrap": 9, "groups": [1, 2, 3] * 4}, "3 distinct label"),
    ],
)
def test_points_that_cannot_identify_a_surface_are_refused(points, options, words):
    with pytest.raises(ValueError, match=words):
        fit_loss_surface(*points, **options)


def test_optimum_beyond_the_points_is_flagged_and_has_no_interval_without_samples():
    table = fit_loss_surface(*measure()).optimum([1e21, 1e26])
    assert table.is_extrapolated.tolist() == [False, True]
    assert table.filter(regex="_(low|high)$").isna().all(axis=None)


def iso_points(loss, n_sizes=7):
    """Points on three levels of C = 6 N D; ``loss`` is a function of N and C."""
    rows = [
        {"n_params": n, "n_tokens": c / 6 / n, "flops": c, "loss": loss(n, c)}
        for c in (1e18, 1e19, 1e20)
        for n in np.geomspace(1e8 / 30, 1e8 * 30, n_sizes)
    ]
    return pd.DataFrame(rows)


def test_isoflop_parabolas_find_the_vertices_of_true_parabolas():
    def best(flops):
        return 3e7 * (flops / 1e18) ** 0.45

    points = iso_points(lambda n, c: 3 + 0.1 * np.log(n / best(c)) ** 2)
    found = surface.isoflop_optima(points, [1e18, 1e19, 1e20])
    assert found.optima.n_params.to_numpy() == pytest.approx(best(np.array([1e18, 1e19, 1e20])))
    assert found.optima.n_tokens.to_numpy() == pytest.approx(found.optima.flops / 6 / found.optima.n_params)  # fmt: skip
    assert found.optima.loss.to_numpy() == pytest.approx(3)
    assert found.exponent == pytest.approx(0.45)
    assert not found.optima.is_extrapolated.any()


def test_envelope_takes_the_lowest_size_and_doubts_the_edges():
    def best(flops):
        return 1e8 if flops < 1e20 else 1e10

    points = iso_points(lambda n, c: 3 + abs(np.log(n / best(c))))
    found = surface.envelope(points, [1e18, 1e19, 1e20]).optima
    assert found.n_params.to_numpy() == pytest.approx([1e8, 1e8, 3e9])
    assert found.is_extrapolated.tolist() == [False, False, True]


def test_levels_without_a_minimum_are_refused():
    with pytest.raises(ValueError, match="no minimum at any FLOP level"):
        surface.isoflop_optima(iso_points(lambda n, c: 3 - np.log(n) ** 2), [1e18])


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_best_size_has_the_closed_form_of_a_power_law_of_speed(power):
    fit = SurfaceFit(BESIROGLU)
    speeds = SPEEDS.assign(tokens_per_s=1e5 * (SPEEDS.n_params / 1e5) ** -power)
    seconds, tokens_at_1 = 1e5, 1e5 * 1e5**power * 1e5
    answer = surface.best_size(fit, speeds, seconds, np.geomspace(1e5, 1e10, 4_001)).answer
    s = BESIROGLU
    expected = (s.alpha * s.A * tokens_at_1**s.beta / (power * s.beta * s.B)) ** (
        1 / (s.alpha + power * s.beta)
    )
    assert answer["n_params"] == pytest.approx(expected, rel=3e-3)
    assert answer["n_tokens"] == pytest.approx(tokens_at_1 * expected**-power, rel=3e-3)
    if power == 1:  # speed = k / N is a fixed C = 6 k t
        assert expected == pytest.approx(s.optimal_params(6 * tokens_at_1))


def test_intervals_of_the_best_size_carry_fit_speed_and_scatter():
    points = measure()
    plain, sampled = fit_loss_surface(*points), fit_loss_surface(*points, n_bootstrap=50)
    speeds = pd.DataFrame({"n_params": [1e8, 1e9, 1e10], "tokens_per_s": [1e6, 1e5, 1e4]})
    noisy = speeds.assign(tokens_per_s_low=speeds.tokens_per_s * 0.8, tokens_per_s_high=speeds.tokens_per_s * 1.2)  # fmt: skip

    def width(fit, speeds, name="loss"):
        answer = surface.best_size(fit, speeds, 1e5).answer
        return answer[f"{name}_high"] - answer[f"{name}_low"]

    assert width(plain, speeds) == 0
    assert width(plain, noisy) > 0
    assert width(sampled, noisy) > width(sampled, speeds) > 0
    assert width(sampled, speeds, "run") > width(sampled, speeds)


def test_basin_is_the_sizes_within_a_hundredth_of_a_nat():
    found = surface.best_size(SurfaceFit(BESIROGLU), SPEEDS, 3600)
    inside = found.curve.loss <= found.answer["loss"] + 0.01
    assert found.curve.in_basin.tolist() == inside.tolist()
    assert found.answer["basin_low"] < found.answer["n_params"] < found.answer["basin_high"]


def test_sizes_beyond_points_or_speeds_are_flagged():
    fit = fit_loss_surface(*measure())
    speeds = pd.DataFrame({"n_params": [1e8, 1e9], "tokens_per_s": [1e6, 1e5]})
    curve = surface.best_size(fit, speeds, 1e5, [9e7, 2e8, 9e8, 2e9]).curve
    assert curve.is_extrapolated.tolist() == [True, False, False, True]
    assert surface.best_size(fit, speeds, 10, [2e8]).answer["is_extrapolated"]  # too few tokens


def test_fastest_shape_at_each_size_wins():
    shapes = pd.DataFrame(
        {
            "name": ["deep", "wide", "large", "failed"],
            "n_params": [1.0e6, 1.05e6, 4e6, 2e6],
            "tokens_per_s": [100.0, 130.0, 40.0, np.nan],
        }
    )
    assert surface.fastest_shapes(shapes).name.tolist() == ["wide", "large"]


def test_longer_budgets_ask_for_larger_models_and_reach_lower_losses():
    table = surface.budget_table(SurfaceFit(BESIROGLU), SPEEDS)
    assert table.budget.tolist() == list(surface.BUDGETS)
    assert table.n_params.is_monotonic_increasing
    assert table.loss.is_monotonic_decreasing


def test_gpu_predictions_say_that_they_are_and_leave_unknown_peaks_out():
    table = surface.gpu_table(SurfaceFit(BESIROGLU), 10_800)
    assert set(table.status) == {"prediction"} and "V100" not in set(table.gpu)
    a100 = table[table.gpu == "A100"]
    assert a100.n_params.to_numpy() == pytest.approx([94e6, 116e6], rel=0.02)


@pytest.mark.parametrize(
    ("speeds", "seconds", "words"),
    [(SPEEDS, 0, "budget_seconds=0"), (SPEEDS[:1], 60, r"speeds has 1 size\(s\)")],
)
def test_a_budget_without_tokens_or_speeds_is_refused(speeds, seconds, words):
    with pytest.raises(ValueError, match=words):
        surface.best_size(SurfaceFit(BESIROGLU), speeds, seconds)


def test_figures_name_their_quantities_and_their_finding():
    fit = fit_loss_surface(*measure(), n_bootstrap=10)
    points = iso_points(lambda n, c: 3 + 0.1 * np.log(n / 1e8) ** 2)
    found = surface.isoflop_optima(points, [1e18, 1e19, 1e20])
    curve = surface.best_size(fit, SPEEDS, 3600).curve
    marks = pd.DataFrame({"name": ["20 tokens per parameter"], "n_params": [1e6]})
    figures = [
        plots.sizing_verdict(curve, marks, "1 hour"),
        plots.isoflops(found, {"fitted surface": fit.optimum(found.optima.flops)}),
        plots.fit_residuals(fit.points),
    ]
    for figure in figures:
        assert all(axes.get_xlabel() for axes in figure.axes)
        assert figure.axes[0].get_ylabel() and figure.axes[0].get_title(loc="left")
    assert plots.si(curve.n_params[curve.loss.idxmin()]) in figures[0].axes[0].get_title(loc="left")
