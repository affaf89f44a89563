import pytest

from llmlib import bench
from llmlib.config import PRESETS, override
from llmlib.sizing import count_params, flops_per_token

MODEL, TRAIN = PRESETS["smoke"].model, PRESETS["smoke"].train


def test_measured_step_accounts_for_its_tokens():
    row = bench.measure_step(MODEL, override(TRAIN, compile=False), n_measure=3)
    assert row["n_params"] == count_params(MODEL)
    assert row["flops_per_s"] == pytest.approx(row["tokens_per_s"] * flops_per_token(MODEL))
    assert row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"]


def test_each_setting_has_its_own_memory():
    settings = {
        "small": {},
        "large": {"vocab_size": 65_536, "d_model": 256, "d_ff": 512, "n_head": 4},
    }
    table = bench.compare_settings(MODEL, TRAIN, settings, n_measure=2).set_index("setting")
    tensors_gib = 4 * 4 * table.n_params["large"] / 2**30  # weights, gradients, two moments
    assert table.memory_gib["large"] - table.memory_gib["small"] > 0.8 * tensors_gib


def test_measured_peak_names_its_type():
    peak = bench.measure_peak(sizes=(64, 128), n_repeats=1)
    assert peak["flops_per_s"] > 0
    assert peak["dtype"] in ("float32", "bfloat16")


def test_deeper_and_wider_keep_the_blocks_parameters():
    base = PRESETS["a100"].model
    own = count_params(base, embeddings=False)
    for changes in bench.deeper_and_wider(base).values():
        shape = override(base, **changes)
        assert count_params(shape, embeddings=False) == pytest.approx(own, rel=0.25)
        assert shape.d_head == base.d_head
