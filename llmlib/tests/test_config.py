import dataclasses

import pytest

from llmlib import config
from llmlib.config import DataConfig, ModelConfig, TrainConfig


def test_a100_is_the_winning_recipe():
    model, train = config.SCALES["a100"].model, config.SCALES["a100"].train
    assert (model.n_layer, model.n_head, model.d_model, model.d_ff) == (10, 16, 1024, 2816)
    assert (model.vocab_size, model.seq_len, model.rope_theta, model.norm_eps) == (
        50_304,
        512,
        1e4,
        1e-5,
    )
    assert train.micro_batch * train.grad_accum * model.seq_len == 131_072
    assert (train.lr, train.betas, train.weight_decay, train.grad_clip) == (
        1.25e-3,
        (0.9, 0.95),
        0.1,
        1.0,
    )
    assert (train.budget_seconds, train.warmup, train.final_lr) == (10_800, 0.05, 0.1)


def test_llama_config_gives_the_recipes_shape():
    assert config.llama_config(10, 1024) == ModelConfig()


@pytest.mark.parametrize("preset", config.SCALES.values(), ids=lambda p: p.name)
def test_configs_survive_json(preset):
    for part in (preset.model, preset.train, preset.data):
        assert type(part)(**config.to_json(part)) == part


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: config.get_scale("laptob"), ["laptob", "smoke, laptop, a100"]),
        (
            lambda: ModelConfig(d_model=100, n_head=16),
            ["d_model=100", "n_head=16", "n_head=20", "d_model=96"],
        ),
        (lambda: ModelConfig(d_model=48, n_head=16), ["d_head=3", "odd"]),
        (lambda: ModelConfig(arch="mamba"), ["mamba", "llama"]),
        (lambda: ModelConfig(n_layer=0), ["n_layer=0"]),
        (lambda: TrainConfig(budget_hours=0), ["budget_hours=0", "positive"]),
        (lambda: TrainConfig(budget_hours=-1.5), ["budget_hours=-1.5"]),
        (lambda: TrainConfig(budget_hours=None), ["no budget", "give one of"]),
        (lambda: TrainConfig(budget_steps=5), ["budget_hours", "budget_steps", "give one of"]),
        (lambda: TrainConfig(warmup=1.5), ["warmup=1.5", "share of the budget"]),
        (lambda: TrainConfig(warmup=-0.1), ["warmup=-0.1", "0 to 0.99"]),
        (lambda: TrainConfig(cooldown=1.0), ["cooldown=1.0", "share of the budget"]),
        (lambda: TrainConfig(grad_clip=0.0), ["grad_clip=0.0", "positive"]),
        (lambda: config.recipe("winner", "laptop"), ["winner", "winner2024, best"]),
        (lambda: TrainConfig(optimizer="adam"), ["'adam'", "adamw, muon, sophia"]),
        (lambda: TrainConfig(schedule="step"), ["'step'", "one_cycle", "linear"]),
        (lambda: TrainConfig(tracker="wandb"), ["'wandb'", "tensorboard"]),
        (lambda: TrainConfig(embed_lr=-1.0), ["embed_lr=-1.0"]),
        (lambda: DataConfig(test_size=1.0), ["test_size=1.0"]),
        (lambda: DataConfig(bpe_vocab_size=100), ["bpe_vocab_size=100", "257"]),
        (lambda: config.override(TrainConfig(), learning_rate=1.0), ["learning_rate", "lr"]),
    ],
)
def test_bad_values_are_named_with_the_remedy(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_given_budget_replaces_the_one_that_was_there():
    train = config.override(TrainConfig(), budget_tokens=1000, lr=None)
    assert (train.budget_hours, train.budget_tokens, train.lr) == (None, 1000, 1.25e-3)


@pytest.mark.parametrize("scale", config.SCALES)
def test_every_scale_has_the_winners_recipe_and_both_rates(scale):
    winner = config.SCALES[scale].train
    best = config.override(winner, **config.recipe("best", scale))
    assert (best.optimizer, best.lr) == ("muon", config.RATES["best"][scale]["lr"])
    assert config.override(winner, **config.recipe("winner2024", scale)) == winner


def test_training_without_clipping_can_be_asked_for():
    assert TrainConfig(grad_clip=None).grad_clip is None


def test_configs_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().n_layer = 3


def test_resize_keeps_what_is_not_asked_for():
    base = config.SCALES["laptop"].model
    assert config.resize(base, arch="llama") is base
    wide = config.resize(base, arch="llama", d_model=256)
    assert (wide.n_layer, wide.d_model, wide.d_head) == (base.n_layer, 256, base.d_head)
    assert (wide.vocab_size, wide.seq_len) == (base.vocab_size, base.seq_len)
    gpt2 = config.resize(ModelConfig(), arch="gpt2")
    assert (gpt2.n_layer, gpt2.n_head, gpt2.d_model, gpt2.d_ff) == (12, 12, 768, 3072)
    assert config.resize(base, arch="gpt2").d_ff == 4 * base.d_model


def test_another_micro_batch_leaves_the_tokens_per_step():
    train = TrainConfig(micro_batch=64, grad_accum=4)
    other = config.with_micro_batch(train, 8)
    assert (other.micro_batch, other.grad_accum) == (8, 32)
    assert config.with_micro_batch(train, None) == train
    with pytest.raises(ValueError, match="micro_batch=7 does not divide a step's 256 sequences"):
        config.with_micro_batch(train, 7)
