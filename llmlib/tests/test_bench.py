"""Variants compute what they claim to, and tables say what was measured."""

import numpy as np
import pandas as pd
import pytest
import torch

from llmlib import bench
from llmlib.bench import Variant
from llmlib.config import SCALES, DataConfig, override
from llmlib.model import build_model
from llmlib.sizing import count_params, step_memory

MODEL, TRAIN = SCALES["smoke"].model, SCALES["smoke"].train


def test_every_rmsnorm_becomes_a_layer_norm_of_its_size():
    altered = bench.with_layer_norms(MODEL)
    norms = [m for m in altered.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * MODEL.n_layer + 1
    assert not any(isinstance(m, torch.nn.RMSNorm) for m in altered.modules())
    assert sum(p.numel() for p in altered.parameters()) == count_params(MODEL)


def test_transformers_computes_the_same_function():
    pytest.importorskip("transformers")
    draws = torch.randint(MODEL.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    tokens = draws[:, :-1].contiguous(), draws[:, 1:].contiguous()
    ours, theirs = build_model(MODEL), bench.TransformersLlama(MODEL)
    theirs.model.model.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(*tokens), ours(*tokens))
    assert sum(p.numel() for p in theirs.parameters()) == count_params(MODEL)


def test_a_variant_that_fails_costs_one_row():
    huge = override(MODEL, vocab_size=2**40)  # whose memory no machine has
    variants = [Variant("ours", MODEL, TRAIN), Variant("huge", huge, TRAIN)]
    variants += [Variant("plain", MODEL, override(TRAIN, dtype="float32"), claim=1.5)]
    table = bench.measure(variants, n_processes=2, n_rounds=2, n_steps=1).set_index("name")
    assert table.note["huge"].startswith("failed: ") and "alloc" in table.note["huge"]
    assert table.tokens_per_s.notna().to_dict() == {"ours": True, "huge": False, "plain": True}
    assert table.claim["plain"] == 1.5 and table.note["plain"] == ""
    assert table.loc["ours", ["speed_up", "speed_up_low", "speed_up_high"]].tolist() == [1, 1, 1]


@pytest.fixture
def processes(monkeypatch):
    """Each process's variants, by name; they take turns at speeds by name, process and round."""
    met, speeds = [], {}

    def turns(_, variants, n_rounds, n_steps):
        met.append([v.name for v in variants])
        speed = {name: speeds[name][len(met) - 1] if speeds else [1.0] for name in met[-1]}
        return [(i, name, speed[name][i], "") for i in range(n_rounds) for name in met[-1]]

    monkeypatch.setattr(bench, "in_process", turns)
    return met, speeds


def test_rows_hold_the_medians_of_processes(processes):
    """An outlier turn moves no interval, and a speed-up compares the turns of one round."""
    met, speeds = processes  # the machine is half as fast in the second process
    speeds["ours"] = [[8.0, 8.0, 8.0], [4.0, 4.0, 4.0], [8.0, 8.0, 0.1]]
    speeds["plain"] = [[4.0, 4.0, 0.1], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]]
    variants = [Variant("ours", MODEL, TRAIN), Variant("plain", MODEL, TRAIN)]
    columns = [
        f"{name}{end}" for name in ("tokens_per_s", "speed_up") for end in ("", "_low", "_high")
    ]
    table = bench.measure(variants, n_processes=3, n_rounds=3, n_steps=1)
    assert table.loc[1, columns].tolist() == [4, 2, 4, 2, 2, 2]
    met.clear()
    speeds["ours"], speeds["plain"] = [[8.0, 8.0, 8.0]], [[4.0, 2.0, 3.0]]
    table = bench.measure(variants, n_processes=1, n_rounds=3, n_steps=1)
    assert table.loc[1, columns[:3]].tolist() == [3, 2, 4]


@pytest.mark.parametrize("is_short", [False, True])
def test_all_take_turns_in_one_process_as_far_as_memory_goes(processes, monkeypatch, is_short):
    ours, small = Variant("ours", MODEL, TRAIN), Variant("small", MODEL, TRAIN)
    big, (met, _) = Variant("big", override(MODEL, n_layer=4), TRAIN), processes
    both = (step_memory(MODEL, TRAIN) + 16 * count_params(MODEL)) / 0.89  # one steps, one waits
    here = {"memory_bytes": both if is_short else None}
    monkeypatch.setattr(bench.runs, "environment", lambda: here)
    table = bench.measure([ours, big, small], n_processes=2, n_rounds=1, n_steps=1)
    expected = [["ours", "small"], ["big"]] if is_short else [["ours", "big", "small"]]
    assert met == 2 * expected and table.name.tolist() == ["ours", "big", "small"]
    assert table.note.str.contains("no memory").tolist() == [False, is_short, False]


def test_compiler_that_fails_leaves_a_note_and_the_step_uncompiled(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("model.cpp:1: fatal error: Python.h: No such file")

    compiled = lambda model, _: torch.compile(model, backend=broken)  # noqa: E731
    monkeypatch.setattr(bench.devices, "compile_model", compiled)
    timed = bench.TimedStep(Variant("ours", MODEL, override(TRAIN, compile=True)))
    assert "Python.h: No such file" in timed.note and timed.take(1) > 0


@pytest.mark.parametrize("scale", SCALES)
def test_variants_of_a_scale_keep_its_step_and_size(scale):
    model, train = SCALES[scale].model, SCALES[scale].train
    ours, *others = bench.variants(model, train, scale)
    assert (ours.model, ours.train) == (model, train)
    assert len({v.name for v in others}) == len(others) <= 7
    assert {v.train.n_sequences for v in others} == {train.n_sequences}
    assert {v.model.d_head for v in others} == {model.d_head}
    sizes = {v.name: count_params(v.model) for v in others}
    assert sizes == {name: pytest.approx(count_params(model), rel=0.1) for name in sizes}


@pytest.mark.parametrize(
    ("speed_ups", "chosen"),
    [
        ({"LayerNorm": (0.5, 0.6), "micro-batch 4": (1.1, 1.2), "micro-batch 16": (0.9, 1.1)}, 8),
        ({"micro-batch 4": (0.9, 0.95), "micro-batch 16": (0.7, 0.8)}, 16),
        ({"micro-batch 4": (0.9, 0.95), "micro-batch 16": (np.nan, np.nan)}, 4),  # out of memory
    ],
)
def test_micro_batch_stays_unless_another_is_faster_in_every_process(speed_ups, chosen):
    sizes = {"ours": 8, "LayerNorm": 8, "micro-batch 4": 4, "micro-batch 16": 16}
    rows = [(name, sizes[name], *x) for name, x in ({"ours": (1.0, 1.0)} | speed_ups).items()]
    table = pd.DataFrame(rows, columns=["name", "micro_batch", "speed_up", "speed_up_high"])
    assert bench.choose_micro_batch(table) == chosen


def test_kinds_of_work_and_idle_time_add_up_to_the_step():
    table = bench.in_process(bench.profile_step, Variant("", MODEL, TRAIN), 2).set_index("kind")
    assert list(table.index) == [*bench.KINDS, "idle and other"]
    assert table.share.sum() == pytest.approx(1) and (table.seconds >= 0).all()
    assert (table.seconds[["matrix products", "attention", "optimizer and clipping"]] > 0).all()


def test_routes_make_the_same_tokens_from_the_same_shards(tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text(f"document {i}: the cat sat on the mat\n" * 20)
    config = DataConfig(corpus=str(tmp_path), tokenizer="bpe", bpe_vocab_size=300, test_size=0.05)
    table = bench.tokenising_routes(override(config, n_tokens=1), 2)
    assert table.route.tolist() == ["llmlib.prepare", "datasets.map"]
    assert (table[["seconds", "mb_per_s"]] > 0).all(axis=None)
    assert table.times_usual_route[1] == 1
