"""Optimizers: who is in which group, and steps against torch's plain implementation."""

import pytest
import torch

from llmlib.config import ModelConfig, TrainConfig, gpt2_config
from llmlib.model import build_model
from llmlib.optim import OPTIMIZERS, adamw, build_optimizer, set_lr

SHAPE = {"vocab_size": 64, "seq_len": 16, "n_layer": 2, "n_head": 2, "d_model": 16}
MODELS = {
    "llama": ModelConfig(d_ff=32, **SHAPE),
    "gpt2": gpt2_config(**SHAPE),
}


@pytest.mark.parametrize("arch", MODELS)
def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay(arch):
    model = build_model(MODELS[arch])
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.3))
    decay_of = [(p, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert len(decay_of) == len(list(model.parameters()))
    decay_of = {id(p): decay for p, decay in decay_of}
    for name, param in model.named_parameters():
        is_vector = "norm" in name or "ln_" in name
        assert decay_of[id(param)] == (0.0 if is_vector else 0.3), name


def test_a_parameter_without_a_group_stops_the_run(monkeypatch):
    model = build_model(MODELS["llama"])
    forgetful = lambda model, config: torch.optim.AdamW(list(model.parameters())[1:])  # noqa: E731
    monkeypatch.setitem(OPTIMIZERS, "adamw", forgetful)
    with pytest.raises(AssertionError):
        build_optimizer(model, TrainConfig())


def test_adamw_steps_match_torchs_plain_loop():
    config = TrainConfig(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ours, theirs = build_model(MODELS["llama"], seed=1), build_model(MODELS["llama"], seed=1)
    optimizer = adamw(ours, config)
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    gains = [p for p in theirs.parameters() if p.dim() == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    generator = torch.Generator().manual_seed(0)
    for lr in (3e-3, 1e-3, 1e-4):
        set_lr(optimizer, lr)
        set_lr(reference, lr)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'adam' is unknown; choose one of adamw"):
        build_optimizer(build_model(MODELS["llama"]), TrainConfig(optimizer="adam"))
