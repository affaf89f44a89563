import json
import math

import numpy as np
import pandas as pd
import pytest

from llmlib import analysis, runs


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight():
    assert analysis.bits_per_byte(math.log(256), tokens_per_byte=1.0) == pytest.approx(8.0)


def shard(**domains):
    """A manifest's shard, from (documents, bytes, tokens) of each domain."""
    names = ("documents", "bytes", "tokens")
    counts = {name: dict(zip(names, values, strict=True)) for name, values in domains.items()}
    return {"domains": counts}


def test_domains_add_up_over_shards():
    split = [shard(a=(1, 40, 10)), shard(a=(2, 40, 10)), shard(b=(1, 10, 5))]
    table = analysis.domain_table(split).set_index("domain")
    assert table.documents.to_dict() == {"a": 3, "b": 1}
    assert table.share.sum() == pytest.approx(1.0)
    assert analysis.tokens_per_byte(split) == pytest.approx(25 / 90)
    [counted] = analysis.split_table({"splits": {"train": split}}).to_dict("records")
    assert counted == {"split": "train", "documents": 4, "bytes": 90, "tokens": 25}


def test_domains_are_scored_in_bits_of_their_own_bytes():
    scores = {d: np.full((9, 2), math.log(16)) for d in ("sparse", "dense", "others")}
    split = [shard(dense=(1, 400, 100), sparse=(1, 100, 100), a=(1, 40, 10), b=(1, 10, 15))]
    table = analysis.domain_scores(scores, split)
    assert table.domain.tolist() == ["dense", "others", "sparse"]
    for name in ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high"):
        assert table[name].tolist() == pytest.approx([1.0, 2.0, 4.0])  # four bits a token


def test_intervals_of_domains_are_those_of_a_mean_over_windows():
    losses = np.random.default_rng(1).normal(3.0, 0.5, 400)
    scores = {"a": np.stack([losses, losses], 1)}
    [row] = analysis.domain_scores(scores, [shard(a=(1, 90, 90))]).to_dict("records")
    half = 1.96 * losses.std() / 20
    assert (row["loss"], row["n_windows"]) == (pytest.approx(losses.mean()), 400)
    assert row["loss_high"] - row["loss"] == pytest.approx(half, rel=0.15)
    assert row["loss"] - row["loss_low"] == pytest.approx(half, rel=0.15)


# ------------------------------------------------------------------ runs and curves


def write_run(folder, **summary):
    model = {"n_layer": 1, "n_head": 1, "d_model": 8, "seq_len": 8, "vocab_size": 64}
    runs.write_json(folder / "config.json", {"format": 2, "model": model, "data": {}})
    row = {"kind": "step", "step": 1, "tokens": 8, "seconds": 0.1, "loss": 3.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    runs.write_json(folder / "summary.json", summary)


def test_runs_of_another_folder_keep_their_place_beside_ours(tmp_path):
    paths = {
        "05_full_run": tmp_path / "mine" / "05_full_run",
        "sweep/lr1": tmp_path / "mine" / "sweep" / "lr1",
        "theirs/05_full_run": tmp_path / "theirs" / "05_full_run",
    }
    for path in [*paths.values(), tmp_path / "mine" / "04_recipe" / "trials" / "deeper"]:
        write_run(path)
    assert analysis.find_runs(tmp_path / "mine", tmp_path / "theirs") == paths


def test_a_finished_runs_curve_ends_with_its_final_score(tmp_path):
    write_run(tmp_path)
    assert analysis.load_curve(tmp_path).kind.tolist() == ["step"]
    result = {"n_steps": 2, "n_tokens": 16, "seconds": {"training": 0.2}, "val": {"loss": 2.5}}
    runs.write_json(tmp_path / "result.json", result)
    step, final = analysis.load_curve(tmp_path).to_dict("records")
    assert (final["kind"], final["tokens"], final["seconds"]) == ("final", 16, 0.2)
    assert (final["val_loss"], final["flops"]) == (2.5, 2 * step["flops"])


def test_rows_of_studies_are_points_and_other_tables_are_none(tmp_path):
    row = {"id": "r1", "n_steps": 2, "n_tokens": 16, "flops": 9.0, "loss": 2.5}
    for folder, table in (("03", [row, row]), ("04", [row | {"loss": None}]), ("02", [{"id": 1}])):
        runs.write_json(tmp_path / folder / "config.json", {})
        pd.DataFrame(table).to_csv(tmp_path / folder / "table.csv", index=False)
    (tmp_path / "external").mkdir()
    (tmp_path / "external" / "x.csv").write_text("not read")
    points = analysis.load_trials(tmp_path).dropna(subset="val_loss")
    assert points.kind.tolist() == ["trial"] and points.seconds.isna().all()
    assert points[["step", "tokens", "flops", "val_loss"]].to_numpy().tolist() == [[2, 16, 9, 2.5]]
    assert analysis.load_trials(tmp_path / "none").empty


def test_domains_compare_across_finished_runs_that_have_them(tmp_path):
    write_run(tmp_path / "one", by_domain=[{"domain": "a", "bits_per_byte": 1.5}])
    write_run(tmp_path / "two", by_domain=[{"domain": "a", "bits_per_byte": 1.25}])
    write_run(tmp_path / "old")
    write_run(tmp_path / "unfinished")
    (tmp_path / "unfinished" / "summary.json").unlink()
    table = analysis.domain_comparison(analysis.find_runs(tmp_path))
    assert table.set_index("run").bits_per_byte.to_dict() == {"one": 1.5, "two": 1.25}
    assert analysis.domain_comparison({}).empty and analysis.results_table({}).empty


def test_smoothing_is_centred_and_leaves_validations_alone():
    steps = pd.DataFrame({"kind": "step", "loss": np.arange(100.0)})
    curve = pd.concat([steps, pd.DataFrame({"kind": ["eval"]})], ignore_index=True)
    smoothed = analysis.smooth(curve, 0.05).smoothed
    assert smoothed[10:90].tolist() == steps.loss[10:90].tolist()  # on a line, no lag
    assert math.isnan(smoothed.iloc[100])
