"""Variants compute what they claim to, and tables say what was measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from llmlib import bench
from llmlib.bench import Variant, build_variant
from llmlib.config import SCALES, DataConfig, override, resize
from llmlib.model import build_model
from llmlib.sizing import count_params, flops_per_token

MODEL, TRAIN = SCALES["smoke"].model, SCALES["smoke"].train
FEW = {"n_rounds": 2, "n_steps": 1}


@pytest.fixture
def tokens():
    draws = torch.randint(MODEL.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    return draws[:, :-1].contiguous(), draws[:, 1:].contiguous()


def test_every_rmsnorm_becomes_a_layer_norm_of_its_size():
    altered = build_variant(Variant("", MODEL, TRAIN, "LayerNorm"))
    norms = [m for m in altered.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * MODEL.n_layer + 1
    assert not any(isinstance(m, torch.nn.RMSNorm) for m in altered.modules())
    assert sum(p.numel() for p in altered.parameters()) == count_params(MODEL)


def test_transformers_computes_the_same_function(tokens):
    pytest.importorskip("transformers")
    ours, theirs = build_model(MODEL), build_variant(Variant("", MODEL, TRAIN, "transformers"))
    theirs.model.model.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(*tokens), ours(*tokens))
    assert sum(p.numel() for p in theirs.parameters()) == count_params(MODEL)


def test_a_variant_that_fails_costs_one_row():
    huge = override(MODEL, vocab_size=2**40)  # whose memory no machine has
    variants = [Variant("ours", MODEL, TRAIN), Variant("huge", huge, TRAIN)]
    variants += [Variant("plain", MODEL, override(TRAIN, dtype="float32"), claim=1.5)]
    table = bench.measure(variants, **FEW).set_index("name")
    assert table.note["huge"].startswith("failed: ") and "alloc" in table.note["huge"]
    assert table.tokens_per_s.notna().to_dict() == {"ours": True, "huge": False, "plain": True}
    row = table.loc["plain"]
    assert row.tokens_per_s_low <= row.tokens_per_s <= row.tokens_per_s_high
    assert row.speed_up_low <= row.speed_up <= row.speed_up_high
    assert row.flops_per_s == pytest.approx(row.tokens_per_s * flops_per_token(MODEL))
    assert row.claim == 1.5 and row.note == "" and table.speed_up["ours"] == 1


def test_where_two_do_not_fit_each_is_timed_in_a_process_of_its_own(monkeypatch):
    ours, plain = Variant("ours", MODEL, TRAIN), Variant("plain", MODEL, TRAIN)
    small, calls, in_process = resize(MODEL, arch="llama", n_layer=1), [], bench.in_process
    room = (bench._memory(ours) + bench._memory(plain)) * 0.99 / 0.9
    monkeypatch.setattr(bench.runs, "environment", lambda: {"memory_bytes": room})
    note = lambda function, *how: calls.append(function.__name__) or in_process(function, *how)  # noqa: E731
    monkeypatch.setattr(bench, "in_process", note)
    variants = [ours, plain, Variant("small", small, TRAIN)]
    table = bench.measure(variants, n_rounds=1, n_steps=1)
    assert calls == ["_take_turns", "_time"] and table.name.tolist() == ["ours", "plain", "small"]
    assert table.note.tolist() == ["", "timed alone: no memory for two", ""]
    assert table.speed_up[1] == pytest.approx(table.tokens_per_s[0] / table.tokens_per_s[1])


def test_compiler_that_fails_leaves_a_note_and_the_step_uncompiled(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("model.cpp:1: fatal error: Python.h: No such file")

    compiled = lambda model, _: torch.compile(model, backend=broken)  # noqa: E731
    monkeypatch.setattr(bench.devices, "compile_model", compiled)
    timed = bench.TimedStep(Variant("ours", MODEL, override(TRAIN, compile=True)))
    assert "Python.h: No such file" in timed.note and timed.take(1) > 0


def test_speed_up_is_the_median_of_the_turns_ratios():
    row = bench._row(Variant("", MODEL, TRAIN), (2.0, 3.0, 9.0), (1.0, 1.0, 2.0))
    assert (row["speed_up"], row["speed_up_low"], row["speed_up_high"]) == (3.0, 2.0, 4.5)
    assert row["tokens_per_s"] == TRAIN.n_sequences * MODEL.seq_len / 3.0


@pytest.mark.parametrize("scale", SCALES)
def test_variants_of_a_scale_keep_its_step(scale):
    model, train = SCALES[scale].model, SCALES[scale].train
    ours, *others = bench.variants(model, train, scale)
    assert (ours.model, ours.train) == (model, train)
    assert {v.train.n_sequences for v in others} == {train.n_sequences}
    assert {v.model.d_head for v in others} == {model.d_head}
    own, shapes = count_params(model), [v for v in others if v.kind == "shape"]
    assert all(count_params(v.model) == pytest.approx(own, rel=0.1) for v in others[: -len(shapes)])
    sizes = sorted({own, *(count_params(v.model) for v in shapes)})
    assert sizes[-1] > 1.15 * sizes[0]
    assert len({v.name for v in others}) == len(others)


def test_micro_batch_grows_until_speed_stops_rising():
    def choose(*speeds):
        sizes = [2**i for i in range(len(speeds))]
        table = pd.DataFrame({"micro_batch": sizes, "speed_up": 20 / np.array(speeds)})
        table["grad_accum"] = 16 // table.micro_batch
        return bench.choose_micro_batch(table.sample(frac=1, random_state=0))

    assert choose(10, 20, 20.3, 40) == {"micro_batch": 2, "grad_accum": 8}
    assert choose(10, 20, 30, np.nan) == {"micro_batch": 4, "grad_accum": 4}  # out of memory
    assert choose(10, 5) == {"micro_batch": 1, "grad_accum": 16}


def test_kinds_of_work_and_idle_time_add_up_to_the_step():
    table = bench.in_process(bench.profile_step, Variant("", MODEL, TRAIN), 2).set_index("kind")
    assert list(table.index) == [*bench.KINDS, "idle and other"]
    assert table.share.sum() == pytest.approx(1) and (table.seconds >= 0).all()
    assert (table.seconds[["matrix products", "attention", "optimizer and clipping"]] > 0).all()


def test_peak_is_a_rate_of_the_product():
    assert bench.matmul_peak(64) > 0


def test_routes_make_the_same_tokens_from_the_same_shards(tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text(f"document {i}: the cat sat on the mat\n" * 20)
    config = DataConfig(corpus=str(tmp_path), tokenizer="bpe", bpe_vocab_size=300, test_size=0.05)
    for n_tokens in (None, 1):  # all shards, or the first
        table = bench.tokenising_routes(override(config, n_tokens=n_tokens), 1)
        assert table.route.tolist() == ["llmlib.prepare", "datasets.map"]
        assert (table[["seconds", "mb_per_s"]] > 0).all(axis=None)
        assert table.times_usual_route[1] == 1
