"""Counting, peaks, and how big a model a budget should train. No torch.

Symbols as in the scaling-law papers: N parameters, D tokens, C FLOPs. The loss surface
L(N, D) = E + A/N^alpha + B/D^beta is fitted as Hoffmann et al. 2022 (arXiv:2203.15556) did, with the
objective that Besiroglu et al. 2024 (arXiv:2404.10102) set right; measured speeds turn FLOPs into
time. N counts the tied embedding once: use one count for points, speeds and sizes alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from llmlib.config import ModelConfig

# Dense bf16 peaks from NVIDIA's datasheets [FLOP/s], by the words of the name that the driver
# gives. A device that is not here has no datasheet MFU: never a guess.
PEAK_BF16_FLOPS_PER_S = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}
OTHER_CHIPS = {"MIG", "NVL", "Laptop", "D", "Ti", "SUPER"}  # share a name, not a peak
HUBER_DELTA = 1e-3  # on log loss, summed over points: both papers


def datasheet_peak(device_name: str) -> float | None:
    """Look up a GPU's dense bf16 peak by the name its driver gives [FLOP/s], None if unknown."""
    words = device_name.replace("-", " ").split()
    if OTHER_CHIPS & set(words):
        return None
    for name in sorted(PEAK_BF16_FLOPS_PER_S, key=len, reverse=True):
        if set(name.split()) <= set(words):
            return PEAK_BF16_FLOPS_PER_S[name]
    return None


def count_params(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Count trainable parameters; the tied token embedding counts once, or not at all."""
    d, n_layer = config.d_model, config.n_layer
    tables = config.vocab_size * d + (config.seq_len * d if config.arch == "gpt2" else 0)
    norms = (2 * n_layer + 1) * d
    return _matmul_params_in_blocks(config) + norms + (tables if embeddings else 0)


def _matmul_params_in_blocks(config: ModelConfig) -> int:
    n_ff_matrices = 3 if config.arch == "llama" else 2
    per_block = 4 * config.d_model**2 + n_ff_matrices * config.d_model * config.d_ff
    return config.n_layer * per_block


def flops_per_token(config: ModelConfig) -> float:
    """Training FLOPs for one token, forward and backward [FLOP/token].

    6 per matmul parameter, the tied head included, plus attention over the whole window (kernels
    that skip its masked half do fewer). Embedding look-ups are free. PaLM, appendix B
    (arXiv:2204.02311).
    """
    head = config.vocab_size * config.d_model
    attention = 12 * config.n_layer * config.d_model * config.seq_len
    return 6.0 * (_matmul_params_in_blocks(config) + head) + attention


def params_at_ratio(flops: float, ratio: float) -> float:
    """Solve C = 6 N D for N when D = ratio * N (Chinchilla's rule of thumb: ratio 20)."""
    return (flops / (6 * ratio)) ** 0.5


@dataclass(frozen=True)
class LossSurface:
    """L(N, D) = E + A / N^alpha + B / D^beta [nats/token]; arrays as constants are many surfaces."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n_params: ArrayLike, n_tokens: ArrayLike) -> np.ndarray:
        """Return the loss [nats/token] at N and D, which are broadcast."""
        return self.E + self.A / n_params**self.alpha + self.B / n_tokens**self.beta

    @property
    def exponent(self) -> float:
        """The a of N* = G (C/6)^a; tokens grow with b = 1 - a."""
        return self.beta / (self.alpha + self.beta)

    def optimal_params(self, flops: ArrayLike) -> np.ndarray:
        """Minimise the loss under C = 6 N D in closed form (Hoffmann et al. 2022, equation 4)."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        return ratio ** (1 / (self.alpha + self.beta)) * (flops / 6) ** self.exponent


PUBLISHED_FITS = {
    "Hoffmann et al. 2022": LossSurface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "Besiroglu et al. 2024": LossSurface(E=1.817, A=482.0, B=2085.0, alpha=0.348, beta=0.366),
}


def published_optima(flops: float) -> pd.DataFrame:
    """Tabulate where the published fits and 20:1 put the optimum of C = 6 N D."""
    optima = {name: fit.optimal_params(flops) for name, fit in PUBLISHED_FITS.items()}
    optima["20 tokens per parameter"] = params_at_ratio(flops, 20)
    table = pd.DataFrame({"source": optima.keys(), "n_params": optima.values()})
    table["n_tokens"] = flops / 6 / table.n_params
    return table.assign(tokens_per_parameter=table.n_tokens / table.n_params)


@dataclass(frozen=True)
class SurfaceFit(LossSurface):
    """A fitted surface, with one row of constants (E, A, B, alpha, beta) per bootstrap sample."""

    samples: np.ndarray = None

    @property
    def family(self) -> LossSurface:
        """All bootstrap samples as one surface, with constants (n, 1)."""
        return LossSurface(*np.asarray(self.samples, float).T[:, :, None])

    def table(self) -> pd.DataFrame:
        """Tabulate the constants with their bootstrap standard errors."""
        names = ("E", "A", "B", "alpha", "beta")
        values = [getattr(self, name) for name in names]
        errors = np.std(self.samples, axis=0, ddof=1) if len(self.samples) > 1 else np.nan
        return pd.DataFrame({"constant": names, "value": values, "standard_error": errors})


def fit_loss_surface(
    n_params: ArrayLike,
    n_tokens: ArrayLike,
    loss: ArrayLike,
    *,
    n_bootstrap: int = 0,
    seed: int = 0,
) -> SurfaceFit:
    """Fit the surface by BFGS from a grid of starts; bootstrap it over the points, refitted from it.

    Huber loss on log loss, summed over points, with the terms in logarithms (both papers).
    """
    points = np.array([np.asarray(v, float).ravel() for v in (n_params, n_tokens, loss)])
    if not (np.isfinite(points) & (points > 0)).all():
        raise ValueError("points must be finite and positive; leave out runs that failed.")
    if len(np.unique(points[:2], axis=1).T) < 6 or min(len(np.unique(p)) for p in points[:2]) < 3:
        raise ValueError(
            f"{points.shape[1]} points can't test five constants; measure 6 or more, at 3 or more "
            "sizes and 3 or more token counts."
        )
    logs = np.log(points)
    grid = product((0.1, 0.4, 1.2), (0.1, 0.4, 1.2), (0.2, 0.8))
    starts = [_start(logs, *values) for values in grid]
    fits = [_minimise(logs, start) for start in starts]
    best = min((fit for fit in fits if np.isfinite(fit.fun)), key=lambda fit: fit.fun).x
    rng, n = np.random.default_rng(seed), logs.shape[1]
    resamples = [logs[:, rng.integers(n, size=n)] for _ in range(n_bootstrap)]
    with np.errstate(over="ignore"):
        samples = np.array([np.exp(_minimise(sample, best, 100).x) for sample in resamples])
    return SurfaceFit(*np.exp(best), samples=samples.reshape(-1, 5))


def _start(logs: np.ndarray, alpha: float, beta: float, e_share: float) -> list:
    """Begin with E as a share of the lowest loss, and halve the rest between the terms."""
    x, y = logs[:2].mean(axis=1)
    e = e_share * np.exp(logs[2].min())
    rest = np.exp(np.median(logs[2])) - e
    log_a, log_b = np.log(rest / 2) + alpha * x, np.log(rest / 2) + beta * y
    return [np.log(e), log_a, log_b, np.log(alpha), np.log(beta)]


def _minimise(logs: np.ndarray, start: ArrayLike, n_iterations: int = 500):
    x, y, log_loss = logs

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        e, a, b, log_alpha, log_beta = theta
        alpha, beta = np.exp(np.clip([log_alpha, log_beta], -5, 3))
        terms = np.stack([e + 0 * x, a - alpha * x, b - beta * y])
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        residual = top + np.log(total) - log_loss
        size = np.minimum(np.abs(residual), HUBER_DELTA)
        shares *= np.sign(residual) * size / total
        by_exponent = [-alpha * (shares[1] * x).sum(), -beta * (shares[2] * y).sum()]
        value = (size * (np.abs(residual) - size / 2)).sum()
        # In units of delta squared, so that BFGS's tolerance on the gradient means something.
        return value / HUBER_DELTA**2, np.array(
            [*shares.sum(axis=1), *by_exponent]
        ) / HUBER_DELTA**2

    return minimize(objective, start, jac=True, method="BFGS", options={"maxiter": n_iterations})


def best_size(fit: SurfaceFit, speeds: pd.DataFrame, budget_seconds: float) -> pd.DataFrame:
    """Tabulate the loss that a time budget buys at every size, by measured speeds.

    ``speeds`` has n_params and tokens_per_s, interpolated in log-log and continued with the end
    slopes. Returns n_params, n_tokens and loss with its 90 % interval; ``best_low`` and ``best_high``
    (the same in every row) hold 90 % of the bootstrap samples' optima.
    """
    known = np.log(speeds.sort_values("n_params")[["n_params", "tokens_per_s"]].to_numpy(float))
    sizes = np.geomspace(np.exp(known[0, 0]) / 10, np.exp(known[-1, 0]) * 10, 401)
    n_tokens = budget_seconds * np.exp(_interpolate(np.log(sizes), *known.T))
    table = pd.DataFrame({"n_params": sizes, "n_tokens": n_tokens})
    table["loss"] = fit.loss(sizes, n_tokens)
    if len(fit.samples):
        with np.errstate(over="ignore"):  # constants that a sample leaves undetermined
            draws = fit.family.loss(sizes, n_tokens)
        table["low"], table["high"] = np.quantile(draws, [0.05, 0.95], axis=0)
        low, high = np.quantile(sizes[draws.argmin(axis=1)], [0.05, 0.95])
        table = table.assign(best_low=low, best_high=high)
    return table


def _interpolate(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    left = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    return y[left] + (at - x[left]) * (y[left + 1] - y[left]) / (x[left + 1] - x[left])
