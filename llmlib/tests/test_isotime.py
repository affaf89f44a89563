"""Optima of known curves, what is refused, and their extrapolation."""

import numpy as np
import pandas as pd
import pytest

from llmlib import isotime
from llmlib.sizing import PUBLISHED_FITS

TIMES, EXPONENT = [2.0, 4.0, 8.0, 16.0], 0.6
SPEEDS = pd.DataFrame({"n_params": [1e5, 1e6, 1e7], "tokens_per_s": [1e6, 1e5, 1e4]})


def best(seconds):
    """Return the size that is best in these curves, and its loss."""
    return 3e5 * (seconds / 4) ** EXPONENT, isotime.FLOOR + 3 * seconds**-0.1


def measure(
    *, curvature=0.1, noise=0.0, seed=0, sizes=(5e4, 1e5, 2e5, 4e5, 8e5, 1.6e6, 3.2e6), n_seeds=2
):
    rng, rows = np.random.default_rng(seed), []
    for t in TIMES:
        for n in sizes:
            for _ in range(n_seeds):
                loss = best(t)[1] + curvature * np.log(n / best(t)[0]) ** 2 + noise * rng.normal()
                rows.append({"seconds": t, "n_params": n, "n_tokens": 1e11 / n * t, "loss": loss})
    return pd.DataFrame(rows)


def test_minima_and_power_law_of_exact_curves_are_recovered():
    table, draws = isotime.find_optima(measure(), n_bootstrap=5)
    assert table.n_params.to_numpy() == pytest.approx([best(t)[0] for t in TIMES])
    assert table.loss.to_numpy() == pytest.approx([best(t)[1] for t in TIMES])
    found = isotime.extrapolate(table, draws, 64)
    assert (found["n_params"], found["loss"]) == pytest.approx(best(64))
    assert found["exponent"] == pytest.approx(EXPONENT)
    larger = isotime.extrapolate(table, draws, 64, n_params=best(64)[0] * np.e)
    assert larger["loss"] == pytest.approx(best(64)[1] + 0.1)
    falling = pd.concat(measure(curvature=t**-0.3).query(f"seconds == {t}") for t in TIMES)
    fall = isotime.extrapolate(*isotime.find_optima(falling), 64, n_params=best(64)[0] * np.e)
    assert fall["loss"] == pytest.approx(best(64)[1] + 64**-0.3)
    assert np.isnan(isotime.extrapolate(table, draws, 64, n_params=best(64)[0] / 5)["loss"])


def test_intervals_hold_the_minimum_most_of_the_time():
    hits, repeats = 0, 8
    for seed in range(repeats):
        table, _ = isotime.find_optima(measure(noise=0.02, seed=seed), seed=seed)
        truth = [best(t)[0] for t in TIMES]
        hits += (table.n_params_low.lt(truth) & table.n_params_high.gt(truth)).sum()
        assert (table.n_params_high < 3 * table.n_params_low).all()
    assert hits >= 24  # of Binomial(32, 0.9), fewer come up once in 100 times


@pytest.mark.parametrize("sizes", [(1e6, 2e6, 4e6, 8e6), (1e4, 2e4, 4e4, 8e4), (1e5, 3e5)])
def test_no_optimum_is_read_off_an_edge_or_two_sizes(sizes):
    table, draws = isotime.find_optima(measure(sizes=sizes), n_bootstrap=5)
    assert table.n_params.isna().all() and table.loss.isna().all() and np.isnan(draws).all()
    assert table.note.str.startswith("refused").all()
    assert np.isnan(list(isotime.extrapolate(table, draws, 64).values())).all()


def test_a_minimum_counts_at_the_times_that_hold_one():
    table, draws = isotime.find_optima(measure(sizes=(3e5, 4.5e5, 6e5)), n_bootstrap=5)
    assert table.n_params.isna().tolist() == [True, True, False, True]
    assert np.isnan(isotime.extrapolate(table, draws, 64)["n_params"])


def test_sizes_far_from_the_best_do_not_move_it():
    points = measure()
    points.loc[points.n_params >= 3.2e6, "loss"] += 5
    table, _ = isotime.find_optima(points, n_bootstrap=5)
    assert table.n_params[:3].to_numpy() == pytest.approx([best(t)[0] for t in TIMES[:3]])
    assert table.n_params[3] < 0.9 * best(TIMES[3])[0]  # its best size is a fourth of 3.2e6


def test_a_parabola_that_misses_the_runs_has_a_wider_interval():
    exact, bent = measure(n_seeds=1), measure(n_seeds=1)
    bent.loss += 0.1 * (bent.n_params > 1.5e6)
    widths = []
    for points in (exact, bent):
        table, _ = isotime.find_optima(points)
        widths.append(np.log(table.n_params_high / table.n_params_low).mean())
    assert widths[1] > 0.1 > 1e-6 > widths[0]


def test_noise_is_pooled_over_equal_runs():
    points = pd.DataFrame({"seconds": [1, 1, 2, 2, 2], "n_params": 5, "loss": [1, 3, 1, 1, 4]})
    assert isotime.seed_noise(points) == pytest.approx(((1 + 1 + 1 + 1 + 4) / 3) ** 0.5)
    assert np.isnan(isotime.seed_noise(points[:1]))


def test_every_method_gets_its_tokens_by_the_measured_speeds():
    optimum = {"n_params": 3e5, "n_params_low": 2e5, "n_params_high": 4e5}
    table = isotime.advice_in_time(measure(), SPEEDS, 60, optimum).set_index("method")
    assert (table.n_params * table.n_tokens).dropna().to_numpy() == pytest.approx(60 * 1e11)
    ratio = table.tokens_per_parameter["20 tokens per parameter"]
    assert ratio == pytest.approx(20, rel=0.05)
    for name, fit in PUBLISHED_FITS.items():
        expected = fit.optimal_params(6 * 60 * 1e11)
        assert table.n_params[name] == pytest.approx(expected, rel=0.05)


def test_an_answer_that_says_nothing_is_refused_in_words():
    unknown, wide = (
        dict.fromkeys(("n_params", "n_params_low", "n_params_high"), np.nan),
        {"n_params": 2e5, "n_params_low": 1e5, "n_params_high": 5e5},
    )
    cases = (measure(n_seeds=1)[:5], unknown), (measure(noise=0.5, n_seeds=1), wide)
    for points, optimum in cases:
        table = isotime.advice_in_time(points, SPEEDS, 60, optimum).set_index("method")
        refused = table.loc[["iso-time curves", "fitted surface"]]
        assert refused.note.str.startswith("refused: ").all() and refused.n_params.isna().all()
