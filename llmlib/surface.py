"""How big a model a budget should train: loss surfaces, published and fitted, and their optima. No torch.

L(N, D) = E + A/N^alpha + B/D^beta is fitted to measured points (N, D, loss) as Hoffmann et al. 2022
(arXiv:2203.15556) did, with the objective that Besiroglu et al. 2024 (arXiv:2404.10102) set right.
Two rougher methods give second opinions, and measured speeds turn FLOPs into time on this machine.

N is whatever the caller counts. With or without embeddings changes the exponents of small models
(arXiv:2406.12907): use one count for points, speeds and sizes alike, and say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from tqdm import tqdm

from llmlib.config import ModelConfig
from llmlib.sizing import PEAK_BF16_FLOPS_PER_S, count_params, params_at_ratio

HUBER_DELTA = 1e-3  # on log loss, summed over points: both papers
N_STARTS = 64  # of the full fit
N_RESTARTS = 1  # of every bootstrap sample, besides the full fit's optimum
FLAT_NATS = 0.01  # sizes this close to the best are as good [nats/token]
N_SPEED_DRAWS = 400  # where the fit has no bootstrap samples of its own
CONSTANTS = ["E", "A", "B", "alpha", "beta"]
BUDGETS = {"10 minutes": 600, "1 hour": 3600, "3 hours": 10_800, "1 day": 86_400, "1 week": 604_800}


@dataclass(frozen=True)
class LossSurface:
    """L(N, D) = E + A / N^alpha + B / D^beta [nats/token]; arrays as constants are many surfaces."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n_params: ArrayLike, n_tokens: ArrayLike) -> np.ndarray:
        return self.E + self.A / n_params**self.alpha + self.B / n_tokens**self.beta

    @property
    def exponent(self) -> float:
        """The a of N* = G (C/6)^a; tokens grow with b = 1 - a."""
        return self.beta / (self.alpha + self.beta)

    def optimal_params(self, flops: ArrayLike) -> np.ndarray:
        """Minimise the loss under C = 6 N D in closed form (Hoffmann et al. 2022, equation 4)."""
        alpha, beta = self.alpha, self.beta
        g = (alpha * self.A / (beta * self.B)) ** (1 / (alpha + beta))
        return g * (flops / 6) ** (beta / (alpha + beta))


PUBLISHED_FITS = {
    "Hoffmann et al. 2022": LossSurface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "Besiroglu et al. 2024": LossSurface(E=1.817, A=482.0, B=2085.0, alpha=0.348, beta=0.366),
}

# Hoffmann et al. 2022: exponents a (table 2), and the FLOPs at which 400 M parameters are optimal
# (tables 3 and A3, whose smallest size that is).
PUBLISHED_APPROACHES = {
    "Chinchilla 1, envelope of curves": (0.50, 1.92e19),
    "Chinchilla 2, IsoFLOP parabolas": (0.49, 1.84e19),
    "Chinchilla 3, fitted surface": (0.46, 2.21e19),
}


def published_optima(flops: float) -> pd.DataFrame:
    """Tabulate where each published method puts the optimum of C = 6 N D, with its exponents.

    Chinchilla's three are carried down from 400 M parameters by their own exponents.
    """
    rows = [
        {"source": name, "a": a, "n_params": 400e6 * (flops / anchor) ** a}
        for name, (a, anchor) in PUBLISHED_APPROACHES.items()
    ]
    rows += [
        {"source": name, "a": fit.exponent, "n_params": fit.optimal_params(flops)}
        for name, fit in PUBLISHED_FITS.items()
    ]
    rows += [
        {"source": "20 tokens per parameter", "a": 0.5, "n_params": params_at_ratio(flops, 20)}
    ]
    table = pd.DataFrame(rows)
    table.insert(2, "b", 1 - table.a)
    table["n_tokens"] = flops / 6 / table.n_params
    table["tokens_per_parameter"] = table.n_tokens / table.n_params
    return table


def write_up_arithmetic() -> pd.DataFrame:
    """Hold the write-up's own sizing numbers to exact ones: steps it took, parameters it trained."""
    said = np.array([177e6, 100_000 * 3 * 3600])
    exact = np.array([count_params(ModelConfig()), 8_780 * 131_072])
    return pd.DataFrame(
        {
            "quantity": ["parameters", "tokens in 3 hours", "tokens per parameter"],
            "write_up": [*said, 6.0],
            "from_its_own_numbers": [*said, said[1] / said[0]],
            "exact": [*exact, exact[1] / exact[0]],
        }
    )


def loss_curves(flops: float, fits: dict[str, LossSurface]) -> pd.DataFrame:
    """Tabulate each fit's loss against parameters when C = 6 N D is fixed."""
    centre = params_at_ratio(flops, 20)
    n_params = np.geomspace(centre / 30, centre * 30, 121)
    tables = [
        pd.DataFrame(
            {"fit": name, "n_params": n_params, "loss": fit.loss(n_params, flops / 6 / n_params)}
        )
        for name, fit in fits.items()
    ]
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class SurfaceFit:
    """A surface, the points it was fitted to, and one row of constants per bootstrap sample.

    ``SurfaceFit(PUBLISHED_FITS[name])`` has no points: all it says is extrapolated.
    """

    surface: LossSurface
    points: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["n_params", "n_tokens", "loss", "predicted"])
    )
    samples: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=CONSTANTS))

    @property
    def family(self) -> LossSurface:
        """The fit, then every bootstrap sample, as one surface with constants (1 + samples, 1)."""
        fitted = [[vars(self.surface)[name] for name in CONSTANTS]]
        return LossSurface(*np.vstack([fitted, self.samples.to_numpy(float)]).T[:, :, None])

    @property
    def residuals(self) -> np.ndarray:
        """Log of measured over predicted loss at every point."""
        return np.log((self.points.loss / self.points.predicted).to_numpy(float))

    def is_outside(self, n_params: ArrayLike, n_tokens: ArrayLike) -> np.ndarray:
        """Say where N or D lies beyond the points."""
        return _outside(n_params, self.points.n_params) | _outside(n_tokens, self.points.n_tokens)

    def table(self, level: float = 0.9) -> pd.DataFrame:
        """Tabulate constants and exponents a, b with bootstrap errors and percentile intervals."""
        family = self.family
        draws = vars(family) | {"a": family.exponent, "b": 1 - family.exponent}
        rows = [
            {
                "constant": name,
                "value": values[0, 0],
                "standard_error": pd.Series(values[1:, 0]).std(),
            }
            | dict(zip(("low", "high"), _interval(values[1:, 0], level), strict=True))
            for name, values in draws.items()
        ]
        return pd.DataFrame(rows)

    def optimum(self, flops: ArrayLike, level: float = 0.9) -> pd.DataFrame:
        """Tabulate the optimum of C = 6 N D for each C, with percentile intervals."""
        flops, family = np.atleast_1d(np.asarray(flops, float)), self.family
        n_params = family.optimal_params(flops)
        n_tokens = flops / 6 / n_params
        draws = {"n_params": n_params, "n_tokens": n_tokens, "tokens_per_parameter": n_tokens / n_params}  # fmt: skip
        draws["loss"] = family.loss(n_params, n_tokens)
        table = pd.DataFrame({"flops": flops} | _summarise(draws, level))
        return table.assign(is_extrapolated=self.is_outside(table.n_params, table.n_tokens))


def _outside(values: ArrayLike, measured: pd.Series) -> np.ndarray:
    values = np.asarray(values)
    return ~((values >= measured.min()) & (values <= measured.max()))


def _interval(draws: np.ndarray, level: float) -> np.ndarray:
    """Percentile interval over the first axis; NaN without draws."""
    if len(draws) == 0:
        return np.full((2, *draws.shape[1:]), np.nan)
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)


def _summarise(draws: dict[str, np.ndarray], level: float) -> dict[str, np.ndarray]:
    """Take the first of each quantity's draws as its value, and the interval of the others."""
    summary = {}
    for name, values in draws.items():
        low, high = _interval(values[1:], level)
        summary |= {name: values[0], f"{name}_low": low, f"{name}_high": high}
    return summary


def fit_loss_surface(
    n_params: ArrayLike,
    n_tokens: ArrayLike,
    loss: ArrayLike,
    *,
    n_bootstrap: int = 0,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> SurfaceFit:
    """Fit the surface: Huber loss on log loss, summed, from many starts; bootstrap it over points.

    Points that share a label in ``groups`` are resampled together: those of one trunk are not
    independent. On one core, 250 points take a tenth of a second, 4 000 samples of them ten.
    """
    points = _check_points({"n_params": n_params, "n_tokens": n_tokens, "loss": loss})
    labels = _check_labels(groups, len(points), n_bootstrap)
    # An order and an origin of our own: the answer depends neither on the caller's nor on units.
    order = np.lexsort((labels, points.loss, points.n_tokens, points.n_params))
    logs = np.log(points.iloc[order].to_numpy(float)).T
    centre = logs[:2].mean(axis=1)
    logs[:2] -= centre[:, None]
    if groups is not None:
        labels = np.unique(labels[order], return_inverse=True)[1]

    rng = np.random.default_rng(seed)
    theta, value = _minimise(logs, np.ones((N_STARTS, len(points))), _starts(rng, logs[2]))
    best = theta[value.argmin()]
    surface = LossSurface(*_constants(best[None], centre)[0])
    _check_terms(surface, points)
    points["predicted"] = surface.loss(points.n_params, points.n_tokens)
    samples = _constants(_bootstrap(rng, logs, labels, best, n_bootstrap), centre)
    return SurfaceFit(surface, points, pd.DataFrame(samples, columns=CONSTANTS))


def _check_points(columns: dict[str, ArrayLike]) -> pd.DataFrame:
    """Put the points in a table, or say why they can't identify a surface."""
    columns = {name: np.asarray(values, float).ravel() for name, values in columns.items()}
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise ValueError(f"the columns differ in length ({lengths}); give each point all three.")
    for name, values in columns.items():
        if (bad := values[~(np.isfinite(values) & (values > 0))]).size:
            raise ValueError(
                f"{name} holds {bad[0]:g} ({bad.size} such points); all must be finite and positive, "
                "so leave out runs that failed."
            )
    if missing := _what_is_missing(*np.log([columns["n_params"], columns["n_tokens"]])):
        raise ValueError(missing)
    return pd.DataFrame(columns)


def _check_labels(groups: ArrayLike | None, n_points: int, n_bootstrap: int) -> np.ndarray:
    labels = np.arange(n_points) if groups is None else np.asarray(groups)
    if n_bootstrap < 0:
        raise ValueError(f"n_bootstrap={n_bootstrap} is negative; use 0 for no bootstrap.")
    if len(labels) != n_points:
        raise ValueError(f"groups has {len(labels)} labels for {n_points} points; give each one.")
    if n_bootstrap and (n_groups := len(set(labels.tolist()))) < 4:
        raise ValueError(
            f"groups has {n_groups} distinct label(s); to resample them, three must remain when one is "
            "left out, so give 4 or more, or no groups."
        )
    return labels


def _what_is_missing(x: np.ndarray, y: np.ndarray) -> str:
    """Say why points at these log N and log D can't identify five constants; "" if they can.

    Five points could be met exactly, so the sixth is the first that can disagree. Along one axis,
    A and alpha need two differences, so three values; the level itself belongs to E.
    """
    if (n_distinct := len(set(zip(x, y, strict=True)))) < 6:
        return f"{n_distinct} distinct points can't test five constants; measure 6 or more."
    for name, values in (("n_params", x), ("n_tokens", y)):
        if (n_levels := 1 + (np.diff(np.sort(values)) > 0.01).sum()) < 3:
            return (
                f"{name} has {n_levels} distinct value(s), 1 % apart or more; a constant and a power law "
                "need 3, so measure at others."
            )
    if abs(correlation := np.corrcoef(x, y)[0, 1]) > 0.999:
        return (
            f"log n_params and log n_tokens lie on one line (correlation {correlation:.4f}), so their "
            "effects can't be told apart; vary the tokens at a fixed size."
        )
    return ""


def _check_terms(surface: LossSurface, points: pd.DataFrame) -> None:
    for name, factor, exponent in (
        ("n_params", surface.A, surface.alpha),
        ("n_tokens", surface.B, surface.beta),
    ):
        low, high = points[name].min(), points[name].max()
        if factor * (low**-exponent - high**-exponent) < 1e-3 * points.loss.median():
            raise ValueError(
                f"loss does not fall as {name} grows from {low:,.0f} to {high:,.0f}; check the points, "
                "or measure over a wider range."
            )


def _constants(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Turn rows of logs (E, A and B at the centre, alpha, beta) into constants."""
    exponents = np.exp(theta[:, 3:])
    factors = np.exp(theta[:, 1:3] + exponents * centre)
    return np.column_stack([np.exp(theta[:, 0]), factors, exponents])


def _starts(rng: np.random.Generator, log_loss: np.ndarray) -> np.ndarray:
    """Draw exponents from 0.05 to 2, E as a share of the lowest loss, and split the rest."""
    exponents = rng.uniform(np.log(0.05), np.log(2), (N_STARTS, 2))
    e = rng.uniform(0.05, 0.99, N_STARTS) * np.exp(log_loss.min())
    share, rest = rng.uniform(0.1, 0.9, N_STARTS), np.exp(np.median(log_loss)) - e
    return np.column_stack([np.log([e, share * rest, (1 - share) * rest]).T, exponents])


def _bootstrap(
    rng: np.random.Generator, logs: np.ndarray, labels: np.ndarray, best: np.ndarray, n: int
) -> np.ndarray:
    """Refit n resamples, as weights on the same points, from the full fit's optimum and near it."""
    found, n_groups = [np.empty((0, 5))], labels.max() + 1
    n_at_once = max(1, 20_000 // len(labels))  # stays in the cache
    with tqdm(total=n, desc="bootstrap", unit=" samples", delay=2) as bar:
        while bar.n < n:
            weights = []
            while len(weights) < min(n_at_once, n - bar.n):
                drawn = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
                if not _what_is_missing(*logs[:2, drawn[labels] > 0]):
                    weights.append(drawn[labels])
            starts = best + 0.3 * rng.standard_normal((1 + N_RESTARTS, len(weights), 5))
            starts[0] = best
            theta, value = _minimise(
                logs, np.tile(weights, (len(starts), 1)), starts.reshape(-1, 5)
            )
            lowest = value.reshape(len(starts), -1).argmin(axis=0)
            found.append(theta.reshape(starts.shape)[lowest, np.arange(len(weights))])
            bar.update(len(weights))
    return np.concatenate(found)


def _evaluate(
    theta: np.ndarray, logs: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objective (p,), log predicted over measured loss (p, n), shares of the terms (p, 3, n)."""
    x, y, log_loss = logs
    e, a, b, alpha, beta = theta.T[:, :, None]
    terms = np.stack([e + 0 * x, a - np.exp(alpha) * x, b - np.exp(beta) * y], axis=1)
    top = terms.max(axis=1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(axis=1, keepdims=True)
    residuals = (top + np.log(total))[:, 0] - log_loss
    size = np.abs(residuals)
    inside = np.minimum(size, HUBER_DELTA)
    return (weights * inside * (size - inside / 2)).sum(axis=1), residuals, shares / total


def _minimise(
    logs: np.ndarray, weights: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise from all starts (p, 5) at once, each with its own weights (p, n) and damping.

    Levenberg and Marquardt's step on squares reweighted by Huber's rule; a problem leaves when
    three steps in a row gain nothing to speak of, or when no step helps.
    """
    theta, diagonal, active = starts.copy(), np.arange(5), np.arange(len(starts))
    value, residuals, shares = _evaluate(theta, logs, weights)
    damping, n_idle = np.full(len(theta), 1e-2), np.zeros(len(theta), int)
    for _ in range(400):
        if not len(active):
            break
        r, s, exponents = residuals[active], shares[active], np.exp(theta[active, 3:, None])
        jacobian = np.concatenate([s, -exponents * s[:, 1:] * logs[:2]], axis=1)
        weighted = jacobian * (weights[active] / np.maximum(1, np.abs(r) / HUBER_DELTA))[:, None]
        hessian = weighted @ jacobian.transpose(0, 2, 1)
        hessian[:, diagonal, diagonal] *= 1 + damping[active, None]
        hessian[:, diagonal, diagonal] += 1e-14
        step = np.linalg.solve(hessian, -weighted @ r[:, :, None])[:, :, 0]
        trial = theta[active] + np.clip(step, -1, 1)
        trial[:, 3:] = np.clip(trial[:, 3:], np.log(0.01), np.log(10))
        tried = _evaluate(trial, logs, weights[active])
        gain = value[active] - tried[0]
        helps, better = gain > 0, active[gain > 0]
        idle = helps & (gain < 1e-11 * value[active])
        theta[better] = trial[helps]
        for kept, new in zip((value, residuals, shares), tried, strict=True):
            kept[better] = new[helps]
        n_idle[active] = np.where(idle, n_idle[active] + 1, np.where(helps, 0, n_idle[active]))
        damping[active] *= np.where(helps, 0.25, 5)
        active = active[(n_idle[active] < 3) & (damping[active] < 1e8)]
    return theta, value


@dataclass(frozen=True)
class Optima:
    """The best size at each FLOP level, the slices it was read from, and the exponent a."""

    optima: pd.DataFrame
    slices: pd.DataFrame
    exponent: float
    standard_error: float


def isoflop_optima(points: pd.DataFrame, levels: ArrayLike | None = None) -> Optima:
    """Second opinion (Chinchilla's approach 2): per FLOP level, the vertex of a parabola in log N.

    ``points`` has n_params, n_tokens, flops, loss; loss is interpolated between the points of one
    size, at ``levels`` or at twelve over all. Bias: the true curve is no parabola but steeper on one
    side, so a grid that is wide, or not centred on the optimum, shifts the vertex. A vertex beyond
    its level's sizes is extrapolated and left out of the exponent.
    """
    rows, slices = [], _slice(points, levels)
    for level, part in slices.groupby("flops"):
        x = np.log(part.n_params / part.n_params.mean())
        curvature, slope, height = np.polyfit(x, part.loss, 2)
        if curvature <= 0:
            continue
        vertex = -slope / (2 * curvature)
        best = part.n_params.mean() * np.exp(vertex)
        row = {"flops": level, "n_params": best, "loss": height - curvature * vertex**2}
        row["n_tokens"] = np.exp(np.polyval(np.polyfit(x, np.log(part.n_tokens), 1), vertex))
        row |= {"curvature": curvature, "n_sizes": len(part)}
        rows.append(row | {"is_extrapolated": bool(_outside(best, part.n_params))})
    return _optima(rows, slices)


def envelope(points: pd.DataFrame, levels: ArrayLike | None = None) -> Optima:
    """Third opinion (Chinchilla's approach 1): per FLOP level, the size whose curve is lowest.

    ``points`` as for ``isoflop_optima``. Bias: it knows no sizes but those trained, and points along
    a training curve, not cooled down, lie above what a run of that length reaches, the early ones
    most. Where the smallest or largest size wins, the optimum may lie beyond: it counts as
    extrapolated and is left out of the exponent.
    """
    rows, slices = [], _slice(points, levels)
    for _, part in slices.groupby("flops"):
        row = part.loc[part.loss.idxmin()].to_dict() | {"n_sizes": len(part)}
        at_edge = row["n_params"] in (part.n_params.min(), part.n_params.max())
        rows.append(row | {"is_extrapolated": at_edge})
    return _optima(rows, slices)


def _slice(points: pd.DataFrame, levels: ArrayLike | None) -> pd.DataFrame:
    """Interpolate every size's tokens and loss at the levels its points span (to within 5 %).

    Levels that fewer than three sizes reach are dropped.
    """
    if levels is None:
        levels = np.geomspace(points.flops.min(), points.flops.max(), 12)
    levels, parts = np.sort(np.atleast_1d(levels)), []
    for size, curve in points.groupby("n_params"):
        curve = curve.groupby("flops")[["n_tokens", "loss"]].mean()
        known = np.log(curve.index.to_numpy(float))
        at = levels[(np.log(levels) > known[0] - 0.05) & (np.log(levels) < known[-1] + 0.05)]
        part = pd.DataFrame({"flops": at, "n_params": float(size)})
        part["n_tokens"] = np.exp(np.interp(np.log(at), known, np.log(curve.n_tokens)))
        parts.append(part.assign(loss=np.interp(np.log(at), known, curve.loss)))
    slices = pd.concat(parts).sort_values(["flops", "n_params"], ignore_index=True)
    return slices[slices.groupby("flops").n_params.transform("size") >= 3]


def _optima(rows: list[dict[str, float]], slices: pd.DataFrame) -> Optima:
    """Draw the line through log N* against log C."""
    if not rows:
        raise ValueError(
            f"no minimum at any FLOP level ({slices.flops.nunique()} of them reached by 3 sizes or "
            "more); train more sizes with the same compute, or choose other levels."
        )
    optima, exponent, error = pd.DataFrame(rows), np.nan, np.nan
    x, y = np.log(optima.loc[~optima.is_extrapolated, ["flops", "n_params"]].to_numpy(float)).T
    if len(x) > 1:
        exponent, intercept = np.polyfit(x, y, 1)
    if len(x) > 2:
        residual = y - exponent * x - intercept
        error = np.sqrt((residual**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return Optima(optima, slices, float(exponent), float(error))


@dataclass(frozen=True)
class BestSize:
    """What a budget asks for, and the loss it predicts at every size."""

    answer: dict[str, float | bool]
    curve: pd.DataFrame


def fastest_shapes(speeds: pd.DataFrame) -> pd.DataFrame:
    """Keep, of shapes within 15 % of each other's size, the one that trains the most N D per second."""
    speeds = speeds.dropna(subset="tokens_per_s").sort_values("n_params", ignore_index=True)
    first, labels = 0.0, []
    for n_params in speeds.n_params:
        first = first if n_params <= 1.15 * first else n_params
        labels.append(first)
    return speeds.loc[(speeds.n_params * speeds.tokens_per_s).groupby(labels).idxmax()]


def best_size(
    fit: SurfaceFit,
    speeds: pd.DataFrame,
    budget_seconds: float,
    sizes: ArrayLike | None = None,
    *,
    level: float = 0.9,
    seed: int = 0,
) -> BestSize:
    """Find the size that a time budget should train on the machine where ``speeds`` was measured.

    ``speeds`` has n_params and tokens_per_s, and the lowest and highest round's speed where known
    (tokens_per_s_low, tokens_per_s_high; half their log range is taken as one standard deviation).
    The fastest shape at each size counts; speed is interpolated in log-log and continued with the
    end slopes. Without ``sizes``, a fine grid from a tenth of the smallest size measured to ten
    times the largest. All tokens are taken to be fresh, whatever the corpus holds.

    Intervals carry the fit's bootstrap samples and the speeds' spread; ``run_low`` and ``run_high``
    also one run's scatter about the surface. The basin is all sizes within 0.01 nats of the best.
    """
    if not budget_seconds > 0:
        raise ValueError(f"budget_seconds={budget_seconds} buys no tokens; give a positive time.")
    speeds = fastest_shapes(speeds)
    if len(speeds) < 2:
        raise ValueError(f"speeds has {len(speeds)} size(s); measure 2 or more, over 15 % apart.")
    if sizes is None:
        known = np.concatenate([speeds.n_params, fit.points.n_params]).astype(float)
        sizes = np.geomspace(known.min() / 10, known.max() * 10, 401)
    sizes, rng = np.sort(np.asarray(sizes, float)), np.random.default_rng(seed)

    # As in ``family``, the first row is the fit at the speeds measured, the others are draws.
    n_draws = len(fit.samples) or N_SPEED_DRAWS
    n_tokens = budget_seconds * _draw_speeds(rng, speeds, sizes, n_draws)
    loss = fit.family.loss(sizes, n_tokens)
    best, row = loss.argmin(axis=1), np.arange(1 + n_draws)
    draws = {"n_params": sizes[best], "n_tokens": n_tokens[row, best]}
    draws |= {"tokens_per_parameter": draws["n_tokens"] / sizes[best], "loss": loss[:, best[0]]}
    draws["run"] = draws["loss"] * _draw_scatter(rng, fit, n_draws)

    curve = {"n_params": sizes, "n_tokens": n_tokens[0]} | _summarise({"loss": loss}, level)
    curve = pd.DataFrame(curve).assign(
        in_basin=loss[0] <= loss[0].min() + FLAT_NATS,
        is_extrapolated=fit.is_outside(sizes, n_tokens[0]) | _outside(sizes, speeds.n_params),
    )
    basin = curve.n_params[curve.in_basin]
    answer = {"budget_seconds": budget_seconds} | _summarise(draws, level)
    answer.pop("run")  # one run is expected at the surface, and scatters about it
    answer |= {"basin_low": basin.min(), "basin_high": basin.max()}
    answer = {name: float(value) for name, value in answer.items()}
    return BestSize(answer | {"is_extrapolated": bool(curve.is_extrapolated[best[0]])}, curve)


def _draw_speeds(
    rng: np.random.Generator, speeds: pd.DataFrame, sizes: np.ndarray, n: int
) -> np.ndarray:
    """Speeds at all sizes (1 + n, sizes) [tokens/s]: as measured, then with their spread."""
    known, log_speed = np.log(speeds[["n_params", "tokens_per_s"]].to_numpy(float)).T
    noise = rng.standard_normal((1 + n, len(known)))
    noise[0] = 0
    if "tokens_per_s_low" in speeds:
        noise *= np.log(speeds.tokens_per_s_high / speeds.tokens_per_s_low).to_numpy(float) / 2
    else:
        noise[:] = 0
    left = np.clip(np.searchsorted(known, np.log(sizes)) - 1, 0, len(known) - 2)
    share = (np.log(sizes) - known[left]) / (known[left + 1] - known[left])
    drawn = log_speed + noise
    return np.exp((1 - share) * drawn[:, left] + share * drawn[:, left + 1])


def _draw_scatter(rng: np.random.Generator, fit: SurfaceFit, n: int) -> np.ndarray:
    """Factors (1 + n,) of measured over predicted loss: none, then residuals drawn from the points.

    Widened for the five constants that were fitted to them.
    """
    n_points = len(fit.points)
    if n_points == 0:
        return np.ones(1 + n)
    scatter = np.exp(rng.choice(fit.residuals, 1 + n) * np.sqrt(n_points / (n_points - 5)))
    scatter[0] = 1
    return scatter


def budget_table(
    fit: SurfaceFit, speeds: pd.DataFrame, budgets: dict[str, float] = BUDGETS, **options
) -> pd.DataFrame:
    """Tabulate ``best_size``'s answer for every named budget [seconds]."""
    rows = [
        {"budget": name} | best_size(fit, speeds, seconds, **options).answer
        for name, seconds in budgets.items()
    ]
    return pd.DataFrame(rows)


def gpu_table(
    fit: SurfaceFit, budget_seconds: float, mfus: Sequence[float] = (0.4, 0.6)
) -> pd.DataFrame:
    """Predict the optimum for known GPUs from their datasheet peaks and an assumed range of MFU.

    Nothing here is measured: the MFU is assumed at every size, and the surface extrapolated.
    """
    rows = [
        {"gpu": name, "assumed_mfu": mfu, "flops": peak * mfu * budget_seconds}
        for name, peak in PEAK_BF16_FLOPS_PER_S.items()
        if peak is not None
        for mfu in mfus
    ]
    table = pd.DataFrame(rows)
    optima = fit.optimum(table.flops).drop(columns="flops")
    return pd.concat([table.assign(status="prediction"), optima], axis=1)


def verdict(summary: dict) -> str:
    """Say in a sentence what 03's summary recommends, and how sure it is."""
    best, hours = summary["best"], summary["budget_hours"]
    caveat = " (beyond what the ladder measured)" if best["is_extrapolated"] else ""
    ratio = "tokens_per_parameter"
    return (
        f"{60 * hours:.3g} minutes on this machine should train {best['n_params']:,.0f} parameters "
        f"(90 % interval {best['n_params_low']:,.0f} to {best['n_params_high']:,.0f}), at "
        f"{best[ratio]:.1f} tokens per parameter ({best[ratio + '_low']:.1f} to "
        f"{best[ratio + '_high']:.1f}), to a loss of {best['loss']:.3f}{caveat}; all sizes from "
        f"{best['basin_low']:,.0f} to {best['basin_high']:,.0f} are within {FLAT_NATS:g} nats of it."
    )
