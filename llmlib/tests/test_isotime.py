"""Optima of known curves, their intervals, what is refused, and their extrapolation."""

import numpy as np
import pandas as pd
import pytest

from llmlib import isotime
from llmlib.sizing import PUBLISHED_FITS, LossSurface

TIMES, EXPONENT = [2.0, 4.0, 8.0, 16.0], 0.6
FITS = {"together": isotime.fit_together, "one by one": isotime.find_optima}
SPEEDS = pd.DataFrame({"n_params": [1e5, 1e6, 1e7], "tokens_per_s": [1e6, 1e5, 1e4]})
FOUR, SEVEN = (1e5, 2.2e5, 4.5e5, 9e5), (5e4, 1e5, 2e5, 4e5, 8e5, 1.6e6, 3.2e6)
NOWHERE = [((1e6, 2e6, 4e6, 8e6), None), ((1e4, 2e4, 4e4), None), ((1e5, 3e5), None)]
OPTIMUM = {"n_params": 3e5, "n_params_low": 2e5, "n_params_high": 4e5}
WIDE = OPTIMUM | {"n_params_low": 7e4}
SURFACE = LossSurface(E=1.2, A=43.0, B=38.0, alpha=0.315, beta=0.2)  # as 03 found it once


def best(seconds):
    """Return the size that is best in these curves, and its loss."""
    return 3e5 * (seconds / 4) ** EXPONENT, isotime.FLOOR + 3 * seconds**-0.1


def parabola(n_params, seconds, curvature=0.1):
    return best(seconds)[1] + curvature * np.log(n_params / best(seconds)[0]) ** 2


def surface(n_params, seconds):
    """Return the loss at speeds that fall ever faster with size."""
    tokens_per_s = 1e5 * np.exp(-0.2 * np.log(n_params / 3e5) ** 2 - 0.5 * np.log(n_params / 3e5))
    return SURFACE.loss(n_params, tokens_per_s * seconds)


def measure(curve=parabola, *, times=TIMES, sizes=SEVEN, n_seeds=2, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(t, n) for t in times for n in sizes for _ in range(n_seeds)]
    points = pd.DataFrame(rows, columns=["seconds", "n_params"])
    losses = [curve(n, t) + noise * rng.normal() for t, n in rows]
    return points.assign(n_tokens=1e11 / points.n_params * points.seconds, loss=losses)


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_minima_and_power_law_of_exact_curves_are_recovered(fit):
    table, draws = fit(measure(), n_samples=5)
    assert table.n_params.to_numpy() == pytest.approx([best(t)[0] for t in TIMES])
    assert table.loss.to_numpy() == pytest.approx([best(t)[1] for t in TIMES])
    found = isotime.extrapolate(table, draws, 64)
    assert (found["n_params"], found["loss"]) == pytest.approx(best(64))
    assert found["exponent"] == pytest.approx(EXPONENT)
    larger = isotime.extrapolate(table, draws, 64, n_params=best(64)[0] * np.e)
    assert larger["loss"] == pytest.approx(best(64)[1] + 0.1)
    optima = isotime.find_optima(measure(lambda n, t: parabola(n, t, t**-0.3)))  # no one curvature
    fall = isotime.extrapolate(*optima, 64, n_params=best(64)[0] * np.e)
    assert fall["loss"] == pytest.approx(best(64)[1] + 64**-0.3)
    assert np.isnan(isotime.extrapolate(table, draws, 64, n_params=best(64)[0] / 5)["loss"])


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
@pytest.mark.parametrize("curve", [parabola, surface])
def test_intervals_of_four_sizes_cover_about_nine_tenths(curve, fit):
    grid, hits, ahead = np.geomspace(2e4, 5e6, 20_001), [], []
    truth = {t: grid[curve(grid, t).argmin()] for t in (2.0, 4.0, 8.0, 32.0)}
    for seed in range(60):
        points = measure(curve, times=[2.0, 4.0, 8.0], sizes=FOUR, noise=0.02, seed=seed)
        is_kept = ~points.duplicated(["seconds", "n_params"])  # two seeds at one size and time
        is_kept |= (points.seconds == 2) & (points.n_params == FOUR[1])
        table, draws = fit(points[is_kept])
        known = table.dropna(subset="n_params")
        hits += known.seconds.map(truth).between(known.n_params_low, known.n_params_high).tolist()
        far = isotime.extrapolate(table, draws, 32.0)
        ahead += [far["n_params_low"] < truth[32.0] < far["n_params_high"]] * (len(known) > 1)
    least = 0.75 if (fit, curve) == (isotime.fit_together, surface) else 0.85  # not one curvature
    assert len(hits) > 120 and least < np.mean(hits) < 0.99 and np.mean(ahead) > 0.85


@pytest.mark.parametrize(("sizes", "time_that_stands"), [*NOWHERE, ((3e5, 4.5e5, 6e5), 8)])
def test_no_optimum_is_read_off_an_edge_or_two_sizes(sizes, time_that_stands):
    refused = [t != time_that_stands for t in TIMES]
    table, draws = isotime.find_optima(measure(sizes=sizes), n_samples=5)
    assert table.n_params.isna().tolist() == table.loss.isna().tolist() == refused
    assert table.note.str.startswith("refused").tolist() == refused
    assert np.isnan(draws[refused]).all()
    assert np.isnan(list(isotime.extrapolate(table, draws, 64).values())).all()


def test_without_repeats_and_a_fourth_size_there_is_no_interval():
    table, _ = isotime.find_optima(measure(sizes=(1e5, 3e5, 2e6), n_seeds=1), n_samples=5)
    assert table.n_params.notna().all() and table.n_params_low.isna().all()


def test_sizes_far_from_the_best_do_not_move_it():
    points = measure()
    points.loc[points.n_params >= 3.2e6, "loss"] += 5
    table, _ = isotime.find_optima(points, n_samples=5)
    assert table.n_params[:3].to_numpy() == pytest.approx([best(t)[0] for t in TIMES[:3]])
    assert table.n_params[3] < 0.9 * best(TIMES[3])[0]  # its best size is a fourth of 3.2e6


def test_every_method_gets_its_tokens_by_the_measured_speeds():
    table = isotime.advice_in_time(measure(), SPEEDS, 60, {"ours": OPTIMUM}).set_index("method")
    assert (table.n_params * table.n_tokens).dropna().to_numpy() == pytest.approx(60 * 1e11)
    assert table.tokens_per_parameter["20 tokens per parameter"] == pytest.approx(20, rel=0.05)
    for name, fit in PUBLISHED_FITS.items():
        expected = fit.optimal_params(6 * 60 * 1e11)
        assert table.n_params[name] == pytest.approx(expected, rel=0.05)


def test_the_held_out_time_takes_no_part_in_its_prediction():
    points, told = measure(), ["n_params", "n_params_low", "n_params_high", "loss", "loss_high"]
    moved = points.copy()
    moved.loc[points.index[points.seconds == points.seconds.max()][::2], "loss"] += 0.3
    one, other = (isotime.hold_out(p, FITS) for p in (points, moved))
    assert one[told].equals(other[told]) and one[told].notna().all(axis=None)
    assert not one.loss_measured.equals(other.loss_measured)


def test_an_optimum_at_the_edge_of_the_sizes_looked_at_is_refused():
    table = isotime.advice_in_time(measure(), SPEEDS, 1e9, {"ours": OPTIMUM}).set_index("method")
    rule = table.loc["20 tokens per parameter"]
    assert rule.note == isotime.OUTSIDE and np.isnan(rule.n_params)


def test_an_answer_that_says_nothing_is_refused_in_words():
    few, noisy = measure(n_seeds=1)[:5], measure(noise=0.5, n_seeds=1)
    for points, optimum in ((few, dict.fromkeys(OPTIMUM, np.nan)), (noisy, WIDE)):
        table = isotime.advice_in_time(points, SPEEDS, 60, {"ours": optimum})
        refused = table[table.method.isin(["ours", "fitted surface"])]
        assert refused.note.str.startswith("refused: ").all() and refused.n_params.isna().all()
