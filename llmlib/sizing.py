"""Counting, peaks, memory, and the loss surface L(N, D) = E + A/N^alpha + B/D^beta. No torch.

Symbols as in the scaling-law papers: N parameters, D tokens, C FLOPs; N counts the tied embedding
once. The surface is fitted as Hoffmann et al. 2022 (arXiv:2203.15556) did, with the objective that
Besiroglu et al. 2024 (arXiv:2404.10102) set right. The optimum in time is in ``isotime``.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import OptimizeResult, least_squares

from llmlib.config import LOGITS_AT_ONCE, ModelConfig, TrainConfig, with_micro_batch

# Dense bf16 peaks from NVIDIA's datasheets [FLOP/s], by the words of the name that the driver
# gives. A device that is not here has no datasheet MFU: never a guess.
PEAK_BF16_FLOPS_PER_S = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}
PEAK_BF16_FLOPS_PER_S |= {"A10": 125e12, "A10G": 70e12, "L4": 121e12, "L40S": 362e12}
PEAK_BF16_FLOPS_PER_S |= {"RTX 3090": 71e12, "RTX 4090": 165e12}
# Their memory [GB]; of two sizes the smaller.
MEMORY_GB = {"A10": 24, "A10G": 24, "A100": 40, "H100": 80, "H200": 141, "L4": 24, "L40S": 48}
MEMORY_GB |= {"RTX 3090": 24, "RTX 4090": 24}
WRITE_UP = {110e6: 3.134, 138e6: 3.125, 166e6: 3.123, 180e6: 3.104}  # N: loss, 3 hours of an A100
OTHER_CHIPS = {"MIG", "NVL", "Laptop", "D", "Ti", "SUPER"}  # share a name, not a peak
# Of a hidden parameter: what the optimizer keeps, and what it needs besides while it steps [bytes].
OPTIMIZER_BYTES = {"adamw": (8, 0), "muon": (4, 8), "sophia": (8, 9), "sophia_writeup": (8, 9)}
HUBER_DELTA = 1e-3  # on log loss, summed over points: both papers
MAX_EXPONENT = 5.0  # of the fit


def datasheet_peak(device_name: str, table: dict = PEAK_BF16_FLOPS_PER_S) -> float | None:
    """Look up a GPU's dense bf16 peak by the name its driver gives [FLOP/s], None if unknown."""
    words = set(device_name.replace("-", " ").split())
    known = [name for name in table if set(name.split()) <= words and not OTHER_CHIPS & words]
    return table[max(known, key=len)] if known else None


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
    """Training FLOPs for one token, forward and backward [FLOP/token]: PaLM, arXiv:2204.02311.

    6 per matmul parameter, the tied head included, plus attention over the whole window (kernels
    that skip its masked half do fewer). Embedding look-ups are free.
    """
    head = config.vocab_size * config.d_model
    attention = 12 * config.n_layer * config.d_model * config.seq_len
    return 6.0 * (_matmul_params_in_blocks(config) + head) + attention


def step_memory(model: ModelConfig, train: TrainConfig) -> int:
    """Estimate the most memory that a step holds on one GPU [bytes]; eager, so an upper bound.

    A parameter has 4 bytes of weight, 4 of gradient and its optimizer state. A micro-batch adds
    copies of the matrices in the data type of the products (``b`` bytes a number); per token and
    layer, the inputs of norms (4) and of products, attention and activation (``b``); and the loss's
    chunk of logits with what becomes of it (17 a logit; a later chunk begins while the one before
    and its gradient of the head are there) or, if more, the head's gradient as it forms. Where
    the optimizer needs more than all that while it steps, that is the peak.
    """
    d, b = model.d_model, 4 if train.dtype == "float32" else 2
    hidden, head = _matmul_params_in_blocks(model), model.vocab_size * d
    kept, stepping = OPTIMIZER_BYTES[train.optimizer]
    always = 16 * count_params(model) + (kept - 8) * hidden
    casts = b * (hidden + head) if b == 2 else 0
    n_tokens = train.micro_batch * model.seq_len
    per_layer = (18 + 5 * b) * d + 4 * b * model.d_ff
    if model.arch == "gpt2":
        per_layer = (8 + 6 * b) * d + 2 * b * model.d_ff
    activations = n_tokens * (model.n_layer * per_layer + (8 + 2 * b) * d)
    n_rows = 2 ** int(math.log2(max(LOGITS_AT_ONCE["cuda"] // model.vocab_size, 1)))
    logits = min(n_rows, n_tokens) * model.vocab_size
    loss = max(17 * logits, (5 + b) * logits + 8 * head)
    if n_tokens > n_rows:
        loss += b * logits + 4 * head
    return always + max(casts + activations + loss, stepping * hidden)


def fitting_micro_batch(model: ModelConfig, train: TrainConfig, memory_bytes: float | None) -> int:
    """Return the largest divisor of a step's sequences that fits into 90 % of a card by estimate.

    1 if none does, since a compiled step needs less; without a card (None) the config's own.
    """
    if memory_bytes is None:
        return train.micro_batch
    sizes, room = range(train.n_sequences, 1, -1), 0.9 * memory_bytes
    cuts = (with_micro_batch(train, n) for n in sizes if train.n_sequences % n == 0)
    return next((cut.micro_batch for cut in cuts if step_memory(model, cut) <= room), 1)


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
    samples: "LossSurface | None" = None  # of a fit: constants (n, 1), fitted to resampled points

    def loss(self, n_params: ArrayLike, n_tokens: ArrayLike) -> np.ndarray:
        """Return the loss [nats/token] at N and D, which are broadcast."""
        return self.E + self.A / n_params**self.alpha + self.B / n_tokens**self.beta

    def optimal_params(self, flops: ArrayLike) -> np.ndarray:
        """Minimise the loss under C = 6 N D in closed form (Hoffmann et al. 2022, equation 4)."""
        both = self.alpha + self.beta
        ratio = self.alpha * self.A / (self.beta * self.B)
        return ratio ** (1 / both) * (flops / 6) ** (self.beta / both)


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


def fit_loss_surface(
    n_params: ArrayLike, n_tokens: ArrayLike, loss: ArrayLike, *, n_samples: int = 0, seed: int = 0
) -> LossSurface:
    """Fit the surface to measured losses, and to ``n_samples`` resamples of the points."""
    points = np.array([n_params, n_tokens, loss], float)
    n_each = min(len(np.unique(p)) for p in points[:2])
    if not (points > 0).all() or len(np.unique(points[:2], axis=1).T) < 6 or n_each < 3:
        raise ValueError(
            f"{points.shape[1]} points can't test five constants; measure 6 or more, at 3 or more "
            "sizes and 3 or more token counts, and leave out runs without a loss."
        )
    centre = np.exp(np.log(points[:2]).mean(axis=1, keepdims=True))
    points[:2] /= centre  # so that A and B do not depend on the exponents
    starts = [[points[2].min() / 3] * 3 + [exponent] * 2 for exponent in (0.1, 0.4, 1.2)]
    best = min((_minimise(points, start) for start in starts), key=lambda fit: fit.cost).x
    rng, n = np.random.default_rng(seed), points.shape[1]
    draws = [_minimise(points[:, rng.integers(n, size=n)], best).x for _ in range(n_samples)]
    constants = np.array([best, *draws]).T[:, :, None]
    constants[1:3] *= centre[:, None] ** constants[3:]  # A and B at the centre, to those at 1
    return LossSurface(*constants[:, 0, 0].tolist(), LossSurface(*constants[:, 1:]))


def _minimise(points: np.ndarray, start: ArrayLike) -> OptimizeResult:
    """Minimise Huber's loss on log loss over the five constants."""

    def residuals(constants: np.ndarray) -> np.ndarray:
        return np.log(LossSurface(*constants).loss(*points[:2]) / points[2])

    limits = (0, [np.inf] * 3 + [MAX_EXPONENT] * 2)
    return least_squares(residuals, start, bounds=limits, loss="huber", f_scale=HUBER_DELTA)
