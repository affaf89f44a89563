import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmlib import sizing
from llmlib.config import ModelConfig, gpt2_config, llama_config
from llmlib.model import build_model

SMALL = [
    llama_config(3, 64, d_head=16, vocab_size=320, seq_len=32),
    gpt2_config(n_layer=3, d_model=64, n_head=4, vocab_size=320, seq_len=32),
]


def test_recipe_has_179_983_360_parameters():
    assert sizing.count_params(ModelConfig()) == 179_983_360
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(ModelConfig()).parameters()) == 179_983_360


def test_baseline_has_123_6_million_parameters_without_its_positions():
    config = gpt2_config()
    assert (sizing.count_params(config) - config.seq_len * config.d_model) / 1e6 == pytest.approx(
        123.6, abs=0.05
    )


@pytest.mark.parametrize("config", SMALL, ids=lambda c: c.arch)
def test_parameter_formula_equals_numel(config):
    model = build_model(config)
    tables = [p for name, p in model.named_parameters() if name.startswith("embed_")]
    assert sum(p.numel() for p in model.parameters()) == sizing.count_params(config)
    assert sum(p.numel() for p in tables) == sizing.count_params(config) - sizing.count_params(
        config, embeddings=False
    )


@pytest.mark.parametrize("config", SMALL, ids=lambda c: c.arch)
def test_flops_per_token_equal_torchs_counter(config):
    model, tokens = build_model(config), torch.zeros(2, config.seq_len, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() / tokens.numel() == sizing.flops_per_token(config)


def test_recipe_costs_1_143_gigaflop_per_token():
    assert sizing.flops_per_token(ModelConfig()) == pytest.approx(1.143e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-16GB", None),
        ("Some GPU of 2031", None),
        ("CPU", None),
    ],
)
def test_datasheet_peak_is_known_or_none(name, peak):
    assert sizing.datasheet_peak(name) == peak
