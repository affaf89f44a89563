"""What a run is made of: the recipe's numbers, and mistakes that are named."""

import pytest

from llmlib import config
from llmlib.config import SCALES, DataConfig, ModelConfig, TrainConfig


def test_a100_is_the_winning_recipe():
    model, train = SCALES["a100"].model, SCALES["a100"].train
    assert config.llama_config(10, 1024) == model
    assert (model.n_layer, model.n_head, model.d_model, model.d_ff) == (10, 16, 1024, 2816)
    assert (model.vocab_size, model.seq_len) == (50_304, 512)
    assert (model.rope_theta, model.norm_eps) == (1e4, 1e-5)
    assert train.n_sequences * model.seq_len == 131_072
    assert (train.lr, train.betas, train.weight_decay) == (1.25e-3, (0.9, 0.95), 0.1)
    assert (train.budget_seconds, train.warmup, train.final_lr) == (10_800, 0.05, 0.1)
    assert train.grad_clip == 1.0


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_survives_json_and_has_the_rates_of_both_recipes(scale):
    preset = SCALES[scale]
    for part in (preset.model, preset.train, preset.data):
        assert type(part)(**config.to_json(part)) == part
    best = config.override(preset.train, **config.recipe("best", scale))
    assert (best.optimizer, best.lr) == ("muon", config.RATES["best"][scale]["lr"])
    assert config.override(preset.train, **config.recipe("winner2024", scale)) == preset.train


@pytest.mark.parametrize("scale", config.SCALES)
def test_vocabulary_of_the_tokens_decides_the_models_in_multiples_of_64(scale):
    base = config.get_scale(scale)
    for vocab_size, padded in ((50_257, 50_304), (512, 512), (513, 576), (100_277, 100_288)):
        fitted = config.fit_vocabulary(base, vocab_size)
        assert fitted.model == config.override(base.model, vocab_size=padded)
        assert (fitted.data, fitted.train) == (base.data, base.train)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: config.get_scale("laptob"), ["laptob", "smoke, laptop, a100"]),
        (lambda: config.recipe("winner", "laptop"), ["winner", "winner2024, adamw, best"]),
        (lambda: ModelConfig(d_model=100), ["d_model=100", "n_head=16", "d_model=128"]),
        (lambda: ModelConfig(d_model=48), ["d_model=48", "even", "d_model=64"]),
        (lambda: ModelConfig(arch="mamba"), ["mamba", "llama, gpt2"]),
        (lambda: TrainConfig(budget_hours=-1.5), ["budget_hours=-1.5", "positive"]),
        (lambda: TrainConfig(budget_hours=None), ["no budget", "give one of"]),
        (lambda: TrainConfig(budget_steps=5), ["budget_hours", "budget_steps", "give one of"]),
        (lambda: TrainConfig(warmup=1.5), ["warmup=1.5", "0 to 0.99"]),
        (lambda: TrainConfig(cooldown=-0.1), ["cooldown=-0.1", "0 to 0.99"]),
        (lambda: TrainConfig(embed_lr=-1.0), ["embed_lr=-1.0"]),
        (lambda: TrainConfig(lr="1e-3"), ["lr='1e-3' is text", "1.0e-3"]),
        (lambda: DataConfig(bpe_vocab_size=100), ["bpe_vocab_size=100", "257"]),
        (lambda: TrainConfig(optimizer="adam"), ["'adam'", "adamw, muon, sophia"]),
        (lambda: TrainConfig(schedule="step"), ["'step'", "one_cycle", "linear"]),
        (lambda: TrainConfig(tracker="wandb"), ["'wandb'", "tensorboard"]),
        (lambda: TrainConfig(dtype="int8"), ["'int8'", "bfloat16"]),
        (lambda: DataConfig(test_size=1.0), ["test_size=1.0", "0 to 0.99"]),
        (lambda: config.with_micro_batch(TrainConfig(), 7), ["micro_batch=7", "256 sequences"]),
    ],
)
def test_bad_values_are_named_with_the_remedy(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_resize_keeps_what_is_not_asked_for():
    base = SCALES["laptop"].model
    assert config.resize(base, arch="llama") == base
    wide = config.resize(base, arch="llama", d_model=256)
    assert (wide.n_layer, wide.d_model, wide.d_head) == (base.n_layer, 256, base.d_head)
    assert (wide.vocab_size, wide.seq_len) == (base.vocab_size, base.seq_len)
    assert config.resize(base, arch="gpt2").d_ff == 4 * base.d_model
    baseline = config.resize(ModelConfig(vocab_size=576), arch="gpt2")
    shape = {"n_layer": 12, "n_head": 12, "d_model": 768, "d_ff": 3072, "vocab_size": 576}
    assert baseline == ModelConfig(arch="gpt2", **shape)
