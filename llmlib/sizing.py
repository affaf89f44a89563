"""Counting: parameters, FLOPs, peaks, and how many of each a budget should buy. No torch.

Symbols as in the scaling-law papers: N parameters, D tokens, C FLOPs. Loss surfaces are ``surface``'s.
"""

from __future__ import annotations

from llmlib.config import ModelConfig

# Dense bf16 peaks from NVIDIA's datasheets [FLOP/s]. A device that is not here has no datasheet
# MFU: never a guess.
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
    "V100": None,  # fp16 only: no bf16 peak
}


def datasheet_peak(device_name: str) -> float | None:
    """Look up a GPU's dense bf16 peak by the name its driver gives [FLOP/s], None if unknown."""
    words = device_name.replace("-", " ").split()
    for name in sorted(PEAK_BF16_FLOPS_PER_S, key=len, reverse=True):
        if all(word in words for word in name.split()):
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


def tokens_for(budget_seconds: float, tokens_per_s: float) -> float:
    """Count the tokens that a budget buys at a measured speed."""
    return budget_seconds * tokens_per_s
