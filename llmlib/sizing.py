"""Counting, peaks, and how big a model a budget should train. No torch.

Symbols as in the scaling-law papers: N parameters, D tokens, C FLOPs. The loss surface
L(N, D) = E + A/N^alpha + B/D^beta is fitted as Hoffmann et al. 2022 (arXiv:2203.15556) did, with the
objective that Besiroglu et al. 2024 (arXiv:2404.10102) set right; measured speeds turn FLOPs into
time. N counts the tied embedding once: use one count for points, speeds and sizes alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.interpolate import make_interp_spline
from scipy.optimize import OptimizeResult, minimize
from scipy.special import expit, huber, logit

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
CONSTANTS = ["E", "A", "B", "alpha", "beta"]
HUBER_DELTA = 1e-3  # on log loss, summed over points: both papers
MAX_EXPONENT = 5.0  # the fit keeps alpha and beta between 0 and this


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
    """A fitted surface, with one row of constants per bootstrap sample."""

    samples: np.ndarray = field(default_factory=lambda: np.empty((0, 5)))

    @property
    def family(self) -> LossSurface:
        """All bootstrap samples as one surface, with constants (n, 1)."""
        return LossSurface(*self.samples.T[:, :, None])

    def table(self) -> pd.DataFrame:
        """Tabulate the constants with bootstrap standard errors and 90 % intervals."""
        table = pd.DataFrame({"constant": CONSTANTS})
        table["value"] = [getattr(self, name) for name in CONSTANTS]
        samples = pd.DataFrame(self.samples)
        table["standard_error"] = samples.std()
        return table.assign(low=samples.quantile(0.05), high=samples.quantile(0.95))


def fit_loss_surface(
    n_params: ArrayLike,
    n_tokens: ArrayLike,
    loss: ArrayLike,
    *,
    n_bootstrap: int = 0,
    seed: int = 0,
) -> SurfaceFit:
    """Fit the surface from a grid of starts, and resamples of the points from that optimum."""
    points = np.array([np.ravel(column) for column in (n_params, n_tokens, loss)], float)
    if not (np.isfinite(points) & (points > 0)).all():
        raise ValueError("points must be finite and positive; leave out runs that failed.")
    if len(np.unique(points[:2], axis=1).T) < 6 or min(len(np.unique(p)) for p in points[:2]) < 3:
        raise ValueError(
            f"{points.shape[1]} points can't test five constants; measure 6 or more, at 3 or more "
            "sizes and 3 or more token counts."
        )
    logs = np.log(points)
    logs[:2] -= (centre := logs[:2].mean(axis=1, keepdims=True))  # frees exponents from factors
    grid = product((0.3, 0.8), (0.1, 0.4, 1.2), (0.1, 0.4, 1.2))
    fits = [_minimise(logs, _start(logs[2], *guess)) for guess in grid]
    best = min(fits, key=lambda fit: fit.fun).x
    rng, n = np.random.default_rng(seed), logs.shape[1]
    draws = [_minimise(logs[:, rng.integers(n, size=n)], best).x for _ in range(n_bootstrap)]
    e, a, b, *exponents = np.array([best, *draws]).T
    alpha, beta = MAX_EXPONENT * expit(exponents)
    factors = np.exp([e, a + alpha * centre[0], b + beta * centre[1]])
    first, *samples = np.array([*factors, alpha, beta]).T
    return SurfaceFit(*first.tolist(), samples=np.reshape(samples, (-1, 5)))


def _start(log_loss: np.ndarray, share: float, *exponents: float) -> list[float]:
    """Begin with E as a share of the lowest loss, and halve the rest between the terms."""
    e = share * np.exp(log_loss.min())
    half = (np.exp(np.median(log_loss)) - e) / 2
    return [*np.log([e, half, half]), *logit(np.divide(exponents, MAX_EXPONENT))]


def _minimise(logs: np.ndarray, start: ArrayLike) -> OptimizeResult:
    """Minimise Huber's loss on log loss by BFGS over log E, log A, log B, logit alpha, logit beta.

    ``logs`` holds log N and log D, centred, and log loss; A and B are those at the centre.
    """

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        exponents = MAX_EXPONENT * expit(theta[3:])
        slopes = -exponents[:, None] * logs[:2]  # of log terms in the logarithm of an exponent
        terms = theta[:3, None] + [0 * logs[0], *slopes]
        log_sum = np.logaddexp.reduce(terms)
        residual = (log_sum - logs[2]) / HUBER_DELTA
        pull = np.clip(residual, -1, 1) / HUBER_DELTA * np.exp(terms - log_sum)
        by_logit = (pull[1:] * slopes).sum(axis=1) * (1 - exponents / MAX_EXPONENT)
        return huber(1, residual).sum(), np.append(pull.sum(axis=1), by_logit)

    return minimize(objective, start, jac=True, method="BFGS", options={"gtol": 0.01})


def best_size(fit: SurfaceFit, speeds: pd.DataFrame, budget_seconds: float) -> pd.DataFrame:
    """Tabulate the loss that a time budget buys at every size, by measured speeds.

    ``speeds`` has n_params and tokens_per_s; of shapes within 15 % of each other's size the fastest
    counts, and log speed is linear in log size between them and beyond. Returns n_params, n_tokens
    and loss with its 90 % interval (low, high); best_low and best_high, the same in every row, hold
    90 % of the samples' optima. Without samples the intervals are NaN.
    """
    speeds = speeds.dropna(subset="tokens_per_s").sort_values("n_params", ignore_index=True)
    size = (speeds.n_params.pct_change() > 0.15).cumsum()
    speeds = speeds.loc[speeds.groupby(size).tokens_per_s.idxmax()]
    if len(speeds) < 2 or not budget_seconds > 0:
        raise ValueError(
            f"{len(speeds)} sizes for {budget_seconds} seconds; measure 2 or more, over 15 % apart, "
            "and give a positive time."
        )
    sizes = np.geomspace(speeds.n_params.min() / 10, speeds.n_params.max() * 10, 401)
    line = make_interp_spline(np.log(speeds.n_params), np.log(speeds.tokens_per_s), k=1)
    n_tokens = budget_seconds * np.exp(line(np.log(sizes)))
    draws = pd.DataFrame(fit.family.loss(sizes, n_tokens))
    optima = pd.Series(sizes[draws.to_numpy().argmin(axis=1)])
    table = {"n_params": sizes, "n_tokens": n_tokens, "loss": fit.loss(sizes, n_tokens)}
    table |= {"low": draws.quantile(0.05), "high": draws.quantile(0.95)}
    table |= {"best_low": optima.quantile(0.05), "best_high": optima.quantile(0.95)}
    return pd.DataFrame(table)
