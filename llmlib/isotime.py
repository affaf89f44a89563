"""The best model size for a training time: read off measured runs, extrapolated, beside other methods.

Runs of several sizes N, each with the tokens that its measured speed buys in a time t, give a curve
loss(N) whose minimum is N*(t) [parameters]. Time stands where Hoffmann et al. 2022 (arXiv:2203.15556)
hold FLOPs equal, as in arXiv:2603.28823. Losses are nats/token, intervals 90 % of the samples.
"""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.interpolate import make_interp_spline

from llmlib.sizing import PUBLISHED_FITS, fit_loss_surface

FLOOR = PUBLISHED_FITS["Hoffmann et al. 2022"].E  # [nats/token]; of no weight far above it
NEAR = 4.0  # sizes that a parabola rests on, as a ratio to the best
WIDEST_SIZE, WIDEST_E = 4.0, 1.0  # intervals (ratio; nats) beyond which a surface says nothing


def with_interval(name: str, draws: np.ndarray) -> dict[str, Any]:
    """Name a fit and the 5 and 95 % quantiles of its samples; draws (..., fit and samples)."""
    low, high = np.quantile(draws[..., 1:], [0.05, 0.95], axis=-1)
    return {name: draws[..., 0], f"{name}_low": low, f"{name}_high": high}


def seed_noise(points: pd.DataFrame) -> float:
    """Pool the standard deviation of the loss between seeds [nats/token]; NaN without repeats."""
    loss = points.groupby(["seconds", "n_params"]).loss
    freedom = (loss.count() - 1).sum()
    squares = (points.loss - loss.transform("mean")) ** 2
    return float((squares.sum() / freedom) ** 0.5) if freedom else np.nan


def find_optima(
    points: pd.DataFrame, *, n_bootstrap: int = 200, seed: int = 0
) -> tuple[pd.DataFrame, np.ndarray]:
    """Read the best size of every time off a parabola in log N (Hoffmann et al. 2022, approach 2).

    ``points`` has seconds, n_params and loss of every run; those within fourfold of a time's lowest
    loss count, since farther off a parabola does not hold. A sample weights runs at random and adds
    noise: that between seeds or, if it is more, what the parabolas miss the runs by. Returns a table (seconds; n_params and loss with 90 % intervals; note)
    and draws, shape (n_times, 3, 1 + n_bootstrap): log N*, loss there, curvature; the fit first. A
    time whose lowest loss or vertex is at the edge of its sizes is refused: NaN and a note. A
    sample's vertex outside counts as the edge, so an interval that reaches one is open there.
    """
    rng, times = np.random.default_rng(seed), points.groupby("seconds")
    brackets = [_bracket(part) for _, part in times]
    noise = np.nanmax([seed_noise(points), _misfit(brackets)])
    draws = np.array([_vertices(*xy, noise, n_bootstrap, rng) for xy in brackets])
    table = pd.DataFrame({"seconds": list(times.groups)})
    table = table.assign(**with_interval("n_params", np.exp(draws[:, 0])))
    table = table.assign(**with_interval("loss", draws[:, 1]))
    refused = "refused: no minimum inside its sizes"
    return table.assign(note=np.where(table.n_params.isna(), refused, "")), draws


def _bracket(part: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return log N and loss of one time's runs near its best size; none if that is at an edge."""
    means = part.groupby("n_params").loss.mean()
    near = part[part.n_params.between(means.idxmin() / NEAR, means.idxmin() * NEAR)]
    if not means.index.min() < means.idxmin() < means.index.max():
        near = part[:0]
    return np.log(near.n_params.to_numpy(float)), near.loss.to_numpy(float)


def _misfit(brackets: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Pool what the parabolas miss the runs by, root mean square; NaN if they must meet them."""
    known = [(x, y) for x, y in brackets if len(np.unique(x)) > 3]
    fits = [np.polyfit(x - x.mean(), y, 2, full=True)[1][0] for x, y in known]
    freedom = sum(len(x) - 3 for x, _ in known)
    return (sum(fits) / freedom) ** 0.5 if freedom else np.nan


def _vertices(
    x: np.ndarray, y: np.ndarray, noise: float, n: int, rng: np.random.Generator
) -> np.ndarray:
    """Fit one time's parabola, then n samples of it; shape (3, 1 + n), NaN if it is refused."""
    if len(np.unique(x)) < 3:
        return np.full((3, 1 + n), np.nan)
    weights = np.vstack([np.ones_like(x), rng.exponential(size=(n, len(x)))]) ** 0.5
    shaken = y + np.nan_to_num(noise) * np.vstack([np.zeros_like(x), rng.normal(size=(n, len(x)))])
    fits = [np.polyfit(x - x.mean(), y, 2, w=w) for y, w in zip(shaken, weights, strict=True)]
    c, b, a = np.transpose(fits)
    low, high = x.min() - x.mean(), x.max() - x.mean()
    edge = np.where(c * low**2 + b * low < c * high**2 + b * high, low, high)
    vertex = np.where(c > 0, -b / (2 * c), edge)
    if not low < vertex[0] < high:
        return np.full((3, 1 + n), np.nan)
    vertex = vertex.clip(low, high)
    return np.array([vertex + x.mean(), (c * vertex + b) * vertex + a, c])


def extrapolate(
    table: pd.DataFrame, draws: np.ndarray, seconds: float, n_params: float | None = None
) -> dict[str, float]:
    """Predict the best size and its loss at another time from the optima, with 90 % intervals.

    log N* is linear in log t (slope ``exponent``); so is, over the last three optima, the log of the
    loss above Hoffmann's E (a line to a loss of zero would be too low, more so the farther it goes).
    With ``n_params``, the loss is that of this size, by a power law of the curvature; NaN beyond fourfold of
    the best. All is NaN if fewer than two optima stand. The intervals hold the noise of the runs, not that a line may bend.
    """
    kept = table.n_params.notna().to_numpy()
    exponent = log_n = loss = np.full(draws.shape[2], np.nan)
    if kept.sum() > 1:
        log_t, optima = np.log(table.seconds[kept] / seconds), draws[kept]
        exponent, log_n = np.polyfit(log_t, optima[:, 0], 1)
        loss = FLOOR + np.exp(np.polyfit(log_t[-3:], np.log(optima[-3:, 1] - FLOOR), 1)[1])
        if n_params:
            off = np.log(n_params) - log_n
            curvature = np.log(optima[:, 2].clip(1e-3))  # some samples have none
            loss = loss + np.exp(np.polyfit(log_t, curvature, 1)[1]) * off**2
            loss = loss if abs(off[0]) <= np.log(NEAR) else np.full_like(loss, np.nan)
    found = with_interval("exponent", exponent) | with_interval("n_params", np.exp(log_n))
    return {k: float(v) for k, v in (found | with_interval("loss", loss)).items()}


def tokens_in(seconds: float, speeds: pd.DataFrame, n_params: ArrayLike) -> np.ndarray:
    """Return the tokens that sizes get in a time; log speed is linear in log size, also beyond."""
    speeds = speeds.sort_values("n_params")
    line = make_interp_spline(np.log(speeds.n_params), np.log(speeds.tokens_per_s), k=1)
    return seconds * np.exp(line(np.log(n_params)))


def advice_in_time(
    points: pd.DataFrame, speeds: pd.DataFrame, seconds: float, optimum: dict[str, float]
) -> pd.DataFrame:
    """Tabulate the best size for a time by method: n_params with interval, tokens, note.

    The extrapolated ``optimum``; the surface fitted to the same ``points``; the published fits; 20
    tokens per parameter. All get tokens by the measured ``speeds`` (n_params, tokens_per_s).
    """
    sizes = np.geomspace(speeds.n_params.min() / 10, speeds.n_params.max() * 10, 801)
    tokens = tokens_in(seconds, speeds, sizes)
    rows = {
        "iso-time curves": _judge(optimum),
        "fitted surface": _by_surface(points, sizes, tokens),
    }
    for name, fit in PUBLISHED_FITS.items():
        rows[name] = {"n_params": sizes[fit.loss(sizes, tokens).argmin()]}
    at_20 = sizes[np.abs(np.log(tokens / sizes / 20)).argmin()]
    rows["20 tokens per parameter"] = {"n_params": at_20}
    columns = ["n_params", "n_params_low", "n_params_high", "note"]
    table = pd.DataFrame(rows).T.reindex(columns=columns).rename_axis("method").reset_index()
    table[columns[:3]] = table[columns[:3]].astype(float)
    table["n_tokens"] = tokens_in(seconds, speeds, table.n_params)
    return table.assign(tokens_per_parameter=table.n_tokens / table.n_params)


def _by_surface(points: pd.DataFrame, sizes: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Return the surface's best size with its interval, or a note that says why it is refused."""
    try:
        fit = fit_loss_surface(points.n_params, points.n_tokens, points.loss, n_bootstrap=100)
    except ValueError as error:
        return {"note": f"refused: {error}"}
    best = sizes[fit.samples.loss(sizes, tokens).argmin(axis=1)]
    best = np.append(sizes[fit.surface.loss(sizes, tokens).argmin()], best)
    e_low, e_high = np.quantile(fit.samples.E, [0.05, 0.95])
    return _judge(with_interval("n_params", best), e_high - e_low)


def _judge(found: dict[str, float], e_width: float = 0.0) -> dict[str, Any]:
    """Return a best size, or why it is refused: its interval, or that of E, says nothing."""
    ratio = found["n_params_high"] / found["n_params_low"]
    if ratio <= WIDEST_SIZE and e_width <= WIDEST_E:
        return found
    if np.isnan(ratio):
        return {"note": "refused: fewer than two times have a minimum"}
    of_e = f", E's {e_width:.1f} nats" if e_width else ""
    return {"note": f"refused: its interval spans {ratio:.3g}-fold{of_e}"}
