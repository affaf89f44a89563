"""The best model size for a training time: read off measured runs, extrapolated, beside other methods.

Runs of several sizes N, each on the tokens that its measured speed buys in a time t, give a curve
loss(N) whose minimum is N*(t) [parameters]. Time stands where Hoffmann et al. 2022 (arXiv:2203.15556)
hold FLOPs equal, as in arXiv:2603.28823. Losses are nats/token, intervals 90 %.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.interpolate import make_interp_spline
from scipy.optimize import least_squares

from llmlib.sizing import PUBLISHED_FITS, fit_loss_surface

FLOOR = PUBLISHED_FITS["Hoffmann et al. 2022"].E  # [nats/token]; of no weight far above it
MOST_LOG = 700.0  # that a number can have
NEAR = 4.0  # sizes that count beside the best, as a ratio to it
Fit = Callable[..., tuple[pd.DataFrame, np.ndarray]]  # ``find_optima`` or ``fit_together``
WIDEST_SIZE, WIDEST_E = 4.0, 1.0  # intervals (ratio; nats) beyond which an answer says nothing
OUTSIDE = "refused: more than a hundredfold from the sizes that were measured"


def with_interval(name: str, draws: np.ndarray) -> dict[str, Any]:
    """Name a fit and the 5 and 95 % quantiles of its samples; draws (..., fit and samples)."""
    low, high = np.quantile(draws[..., 1:], [0.05, 0.95], axis=-1)
    return {name: draws.take(0, axis=-1), f"{name}_low": low, f"{name}_high": high}


def find_optima(points: pd.DataFrame, *, n_samples: int = 1000) -> tuple[pd.DataFrame, np.ndarray]:
    """Read the best size of every time off a parabola in log N (Hoffmann et al. 2022, approach 2).

    ``points`` has seconds, n_params and loss of every run. Returns a table (seconds; n_params and
    loss with intervals; curvature; note) and draws, shape (n_times, 3, 1 + n_samples): log N*, loss there,
    curvature; the fit first. A time whose lowest loss or vertex is at the edge of its sizes is
    refused: NaN and a note. A sample's vertex outside counts as the edge: its interval is open there.

    Resampling four sizes would mostly miss one. So the samples vary the constants, with errors of
    one variance for all times: how far the sizes' mean losses lie from the parabolas (model form and
    noise) or, if more, this and the variance between seeds together. Each draw divides it by
    chi-square over its degrees of freedom: Student's t, wide where few runs tell the variance.
    """
    rng, times = np.random.default_rng(0), points.groupby("seconds")
    fits = zip(*(_fit_parabola(part) for _, part in times), strict=True)
    spans, constants, unscaled, squares = map(np.array, fits)
    sums = np.cumsum(sum(squares), axis=0)
    variance, freedom = max(((s / n, n) for s, n in sums if n), default=(np.nan, 1))
    errors = (variance * freedom / rng.chisquare(freedom, n_samples)) ** 0.5
    noise = np.linalg.cholesky(unscaled) @ rng.normal(size=(len(times), 3, n_samples)) * errors
    noise = np.pad(noise, [(0, 0), (0, 0), (1, 0)])  # none in the fit itself
    c, b, a = np.moveaxis(constants[:, :, None] + noise, 1, 0)
    middle, low, high = spans.T[:, :, None]
    edge = np.where((c * low + b) * low < (c * high + b) * high, low, high)
    vertex = np.where(c <= 0, edge, -b / (2 * c))
    is_inside, vertex = (low < vertex) & (vertex < high), vertex.clip(low, high)
    draws = np.stack([vertex + middle, (c * vertex + b) * vertex + a, c], axis=1)
    draws[~is_inside[:, 0]] = np.nan
    return _tabulate(list(times.groups), draws), draws


def _tabulate(times: list[float], draws: np.ndarray) -> pd.DataFrame:
    found = with_interval("n_params", np.exp(draws[:, 0].clip(max=MOST_LOG)))
    found |= with_interval("loss", draws[:, 1]) | {"curvature": draws[:, 2, 0]}
    note = np.where(np.isnan(found["n_params"]), "refused: no minimum inside its sizes", "")
    return pd.DataFrame({"seconds": times} | found | {"note": note})


def fit_together(points: pd.DataFrame, *, n_samples: int = 1000) -> tuple[pd.DataFrame, np.ndarray]:
    """Fit all times at once: one curvature, and log N* linear in log t. Returns as ``find_optima``.

    Five constants for two times and one more for each further, where parabolas of their own have
    three: narrower intervals, if times share a curvature. (Where they did not, in simulations of
    test_isotime, extrapolated intervals still covered, those of the minima too seldom.) Each size
    counts once, by its mean loss; times without a minimum inside are left out.
    """
    means = pd.concat({t: _near(part) for t, part in points.groupby("seconds")})
    seconds, sizes = (means.index.get_level_values(level).to_numpy() for level in (0, 1))
    times, which = np.unique(seconds, return_inverse=True)
    freedom = len(means) - len(times) - 3
    if len(times) < 2 or freedom < 1:
        nothing = np.empty((0, 3, 1 + n_samples))
        return _tabulate([], nothing), nothing
    x, losses = np.log(sizes), means.to_numpy()
    log_t = np.log(times) - np.log(times).mean()

    def residuals(constants: np.ndarray) -> np.ndarray:
        middle, slope, curvature, *lowest = constants
        off = x - middle - slope * log_t[which]
        return curvature * off**2 + np.take(lowest, which) - losses

    fit = least_squares(residuals, [x.mean(), 0.5, 0.2, *means.groupby(level=0).min()])
    rng = np.random.default_rng(0)
    errors = (2 * fit.cost / rng.chisquare(freedom, n_samples)) ** 0.5
    noise = rng.normal(size=(len(fit.x), n_samples)) * errors
    noise = np.linalg.cholesky(np.linalg.inv(fit.jac.T @ fit.jac)) @ noise
    middle, slope, curvature, *lowest = fit.x[:, None] + np.hstack([0 * noise[:, :1], noise])
    minima = zip(log_t, lowest, strict=True)
    draws = np.array([(middle + slope * t, low, curvature) for t, low in minima])
    return _tabulate(times, draws), draws


def _near(part: pd.DataFrame) -> pd.Series:
    """Average one time's losses by size, within fourfold of the best, or of four sizes at least.

    None are left if the best size is at an edge.
    """
    means = part.groupby("n_params").loss.mean()
    best = means.idxmin()
    ratio = np.maximum(means.index / best, best / means.index)
    is_inside = means.index[0] < best < means.index[-1]
    return means[is_inside & (ratio <= max(NEAR, *np.sort(ratio)[:4]))]


def _fit_parabola(part: pd.DataFrame) -> tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]:
    """Fit one time's runs of the sizes that ``_near`` takes.

    Returns the mean of their log N and from there the ends; the constants and their covariance but
    for the variance; sums of squares with degrees of freedom: misfit, between seeds. NaN if ``_near``
    takes none.
    """
    means, nothing = _near(part), np.full(3, np.nan)
    if means.empty:
        return nothing, nothing, np.eye(3), np.zeros((2, 2))
    near = part[part.n_params.isin(means.index)]
    log_n, mean = np.log(near.n_params), near.n_params.map(means)
    x = log_n - log_n.mean()
    constants, unscaled = np.polyfit(x, near.loss, 2, cov="unscaled")
    misfit = ((mean - np.polyval(constants, x)) ** 2).sum(), x.nunique() - 3
    between_seeds = ((near.loss - mean) ** 2).sum(), len(x) - x.nunique()
    return (log_n.mean(), x.min(), x.max()), constants, unscaled, (misfit, between_seeds)


def extrapolate(
    table: pd.DataFrame, draws: np.ndarray, seconds: float, n_params: float | None = None
) -> dict[str, float]:
    """Predict the best size and its loss at another time from the optima, with intervals.

    log N* is linear in log t (slope ``exponent``); so is, over the last three optima, the log of the
    loss above Hoffmann's E (a line to a loss of zero would be too low, more so the farther it goes).
    With ``n_params``, the loss is that of this size, by a power law of the curvature; NaN beyond
    fourfold of the best. All is NaN if fewer than two optima stand. The intervals hold the errors of
    the optima, not that a line may bend: the held-out time shows that.
    """
    kept = table.n_params.notna().to_numpy()
    exponent = log_n = loss = np.full(draws.shape[2], np.nan)
    if kept.sum() > 1:
        log_t, optima = np.log(table.seconds[kept] / seconds), draws[kept]
        exponent, log_n = np.polyfit(log_t, optima[:, 0], 1)
        above = np.log((optima[-3:, 1] - FLOOR).clip(1e-3))  # a few samples are below
        loss = FLOOR + np.exp(np.polyfit(log_t[-3:], above, 1)[1])
        if n_params:
            off = np.log(n_params) - log_n
            curvature = np.log(optima[:, 2].clip(1e-3))  # some samples have none
            loss = loss + np.exp(np.polyfit(log_t, curvature, 1)[1]) * off**2
            loss = loss if abs(off[0]) <= np.log(NEAR) else np.full_like(loss, np.nan)
    best = with_interval("n_params", np.exp(log_n.clip(max=MOST_LOG)))
    found = with_interval("exponent", exponent) | best | with_interval("loss", loss)
    return {name: float(value) for name, value in found.items()}


def hold_out(points: pd.DataFrame, fits: dict[str, Fit], *, n_samples: int = 1000) -> pd.DataFrame:
    """Predict the last optimum from the runs of shorter times alone, by each of the named fits.

    What is measured is the last minimum by ``find_optima``. ``covered``: the fit to the last time is in the 90 % interval; ``loss_error`` [nats/token].
    """
    optima, rows = find_optima(points, n_samples=n_samples)[0], []
    last = optima.iloc[-1]
    for until, (method, fit) in product(optima.seconds[1:-1], fits.items()):
        told = extrapolate(*fit(points[points.seconds <= until], n_samples=n_samples), last.seconds)
        row = {"method": method, "from_times_to": until, "seconds": last.seconds} | told
        for name in ("n_params", "loss"):
            is_inside = told[f"{name}_low"] <= last[name] <= told[f"{name}_high"]
            row |= {f"{name}_measured": last[name], f"{name}_covered": is_inside}
        rows.append(row | {"loss_error": told["loss"] - last.loss})
    return pd.DataFrame(rows)


def tokens_in(seconds: float, speeds: pd.DataFrame, n_params: ArrayLike) -> np.ndarray:
    """Return the tokens that sizes get in a time; log speed is linear in log size, also beyond."""
    speeds = speeds.sort_values("n_params")
    line = make_interp_spline(np.log(speeds.n_params), np.log(speeds.tokens_per_s), k=1)
    return seconds * np.exp(line(np.log(n_params)))


def advice_in_time(
    points: pd.DataFrame, speeds: pd.DataFrame, seconds: float, optima: dict[str, dict[str, float]]
) -> pd.DataFrame:
    """Tabulate the best size for a time by method: n_params with interval, tokens, note.

    The extrapolated ``optima``, named; the surface fitted to the same ``points``; the published fits; 20
    tokens per parameter. All get tokens by the measured ``speeds`` (n_params, tokens_per_s).
    """
    sizes = np.geomspace(speeds.n_params.min() / 100, speeds.n_params.max() * 100, 1601)
    tokens = tokens_in(seconds, speeds, sizes)
    gaps = {name: fit.loss(sizes, tokens) for name, fit in PUBLISHED_FITS.items()}
    gaps["20 tokens per parameter"] = np.abs(np.log(tokens / sizes / 20))
    rows = {name: _judge(optimum) for name, optimum in optima.items()}
    rows["fitted surface"] = _by_surface(points, sizes, tokens)
    for name, gap in gaps.items():
        is_inside = 0 < gap.argmin() < len(sizes) - 1
        rows[name] = {"n_params": sizes[gap.argmin()]} if is_inside else {"note": OUTSIDE}
    columns = ["method", "n_params", "n_params_low", "n_params_high", "note"]
    table = pd.DataFrame([{"method": name} | row for name, row in rows.items()], columns=columns)
    table["n_tokens"] = tokens_in(seconds, speeds, table.n_params)
    return table.assign(tokens_per_parameter=table.n_tokens / table.n_params)


def _by_surface(points: pd.DataFrame, sizes: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Return the surface's best size with its interval, or a note that says why it is refused."""
    try:
        fit = fit_loss_surface(points.n_params, points.n_tokens, points.loss, n_samples=100)
    except ValueError as error:
        return {"note": f"refused: {error}"}
    e_width = np.ptp(np.quantile(fit.samples.E, [0.05, 0.95]))
    if e_width > WIDEST_E:
        return {"note": f"refused: E's interval spans {e_width:.1f} nats"}
    best = np.vstack([fit.loss(sizes, tokens), fit.samples.loss(sizes, tokens)]).argmin(axis=1)
    if np.isin(best, (0, len(sizes) - 1)).mean() > 0.05:
        return {"note": OUTSIDE}
    return _judge(with_interval("n_params", sizes[best]))


def _judge(found: dict[str, float]) -> dict[str, Any]:
    """Return a best size, or a note that refuses it: its interval says nothing."""
    ratio = found["n_params_high"] / found["n_params_low"]
    why = "fewer than two minima" if np.isnan(ratio) else f"its interval spans {ratio:.3g}-fold"
    return found if ratio <= WIDEST_SIZE else {"note": f"refused: {why}"}
