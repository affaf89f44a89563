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
    assert analysis.domain_table([{"domains": {}}]).empty


def test_smoothing_is_centred_and_leaves_validations_alone():
    steps = pd.DataFrame({"kind": "step", "loss": np.arange(100.0)})
    curve = pd.concat([steps, pd.DataFrame({"kind": ["eval"]})], ignore_index=True)
    smoothed = analysis.smooth(curve, 0.05).smoothed
    assert smoothed[10:90].tolist() == steps.loss[10:90].tolist()  # on a line, no lag
    assert math.isnan(smoothed.iloc[100])
    assert analysis.smooth(curve, 1e-9).smoothed[:100].tolist() == steps.loss.tolist()


STEPS = ["step", "loss", "val_loss"]
FILES = {  # what trackers and logs write
    "ours.csv": "step,loss,tokens,val_loss\n10,3.5,100,\n20,3.0,200,3.25\n",
    "ours.jsonl": '{"step": 10, "loss": 3.5}\n{"step": 20, "val_loss": 3.25}\n',
    "wandb_panel.csv": '"Step","wide - val/loss","wide - val/loss__MIN","deep - val/loss"\n"0","10.8","10.8",""\n"100","6.2","6.2","6.4"\n',
    "lightning.csv": "epoch,step,train_loss_step,train_loss_epoch,val_loss\n0,49,6.1,,\n0,99,5.2,,\n0,99,,,5.3\n0,99,,5.6,\n",
    "tensorboard.csv": "Wall time,Step,Value\n1700000000.5,0,10.9\n1700000010.5,100,6.2\n",
    "trainer_state.json": '{"log_history": [{"step": 100, "loss": 6.2}, {"step": 100, "eval_loss": 6.3}]}',
    "nanogpt.log": "step 0: train loss 10.91, val loss 10.92\niter 0: loss 10.9, time 3011.2ms, mfu -100.00%\niter 10: loss 9.5, time 301.2ms\n",
    "llmc_main.log": "s:0 tel:10.9\ns:0 trl:10.95 lr:0.000001 norm:5.1\ns:250 trl:6.2 lr:0.0006\n",
    "llmc_stdout.txt": "step    1/19560 | loss 10.99 (+nanz)| norm 15.3 (+nanz)| lr 1.00e-06\n",
    "modded.txt": "step:0/1000 val_loss:10.82 train_time:0ms\nstep:125/1000 val_loss:4.6 train_time:20012ms step_avg:160.1ms\n",
    "excel.csv": "step;loss\n0;10,9\n100;6,2\n",
    "gaps.csv": "\ufeffstep,loss\n0,10.9\n100,NaN\n200,Infinity\n300,6.0\n",
    "restarted.csv": "step,loss\n0,9\n100,7\n200,6\n100,7.1\n",
    "both.csv": "step,loss,train_loss\n1,4.0,\n2,3.0,\n3,,3.5\n",  # the more usual column is read
}
CURVES = {  # what is read of it, by run: rows of STEPS
    "ours.csv": {"": [[10, 3.5, None], [20, 3.0, None], [20, None, 3.25]]},
    "ours.jsonl": {"": [[10, 3.5, None], [20, None, 3.25]]},
    "wandb_panel.csv": {"deep": [[100, None, 6.4]], "wide": [[0, None, 10.8], [100, None, 6.2]]},
    "lightning.csv": {"": [[49, 6.1, None], [99, 5.2, None], [99, None, 5.3]]},
    "tensorboard.csv": {"": [[0, 10.9, None], [100, 6.2, None]]},
    "trainer_state.json": {"": [[100, 6.2, None], [100, None, 6.3]]},
    "nanogpt.log": {"": [[0, 10.9, None], [0, None, 10.92], [10, 9.5, None]]},
    "llmc_main.log": {"": [[0, 10.95, None], [0, None, 10.9], [250, 6.2, None]]},
    "llmc_stdout.txt": {"": [[1, 10.99, None]]},
    "modded.txt": {"": [[0, None, 10.82], [125, None, 4.6]]},
    "excel.csv": {"": [[0, 10.9, None], [100, 6.2, None]]},
    "gaps.csv": {"": [[0, 10.9, None], [300, 6.0, None]]},
    "restarted.csv": {"": [[0, 9, None], [100, 7.1, None], [200, 6, None]]},
    "both.csv": {"": [[1, 4.0, None], [2, 3.0, None]]},
}


@pytest.fixture
def put(tmp_path):
    def put(name, content):
        path = tmp_path / "theirs" / "external" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"theirs/external/{name}"

    return put


@pytest.mark.parametrize("name", FILES)
def test_curves_of_trackers_and_logs_are_read(tmp_path, put, name):
    prefix, expected = put(name, FILES[name]), CURVES[name]
    curves, skipped = analysis.load_curves(tmp_path)
    assert not skipped
    assert list(curves) == [f"{prefix}: {run}" if run else prefix for run in expected]
    for curve, rows in zip(curves.values(), expected.values(), strict=True):
        assert curve.columns.tolist() == analysis.CURVE_COLUMNS
        assert curve[STEPS].astype(object).replace(math.nan, None).to_numpy().tolist() == rows
        assert curve.kind.tolist() == ["step" if loss else "eval" for _, loss, _ in rows]


def test_a_curve_knows_the_axes_of_its_file_alone_in_our_units(tmp_path, put):
    for name in ("modded.txt", "restarted.csv", "tensorboard.csv"):
        put(name, FILES[name])
    curves = analysis.load_curves(tmp_path)[0].values()
    assert [c.seconds.dropna().tolist() for c in curves] == [[0, 20.012], [], [0, 10]]
    assert pd.concat(curves)[["tokens", "flops"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "iteration,loss\n1,4.0\n", ["columns iteration, loss", "needs step and loss"]),
        ("b.csv", "Name,State,val/loss\nwide,finished,3\n", ["columns Name, State", "needs step"]),
        ("c.csv", "step,loss\n1,four\n", ["as numbers"]),
        ("d.csv", "", ["was not read"]),
        ("e.json", "{}", ["log_history"]),
        ("f.txt", "nothing of the kind\n", ["needs step"]),
        ("g.png", b"\x89PNG\r\n\x1a\n\xff", ["was not read"]),
        ("h.csv", "Wall time,Step,Value\n", ["was not read"]),
    ],
)
def test_what_is_no_curve_is_named_and_the_others_are_read(tmp_path, put, name, content, words):
    (refused, good) = (put(name, content), put("good.csv", "step,loss\n1,4.0\n"))
    put("._good.csv", b"\x00\x05\x16")  # macOS keeps such beside a file
    curves, [message] = analysis.load_curves(tmp_path)
    assert list(curves) == [good]
    assert all(word in message for word in [refused, *words]), message


def test_a_score_knows_no_axis(tmp_path, put):
    name = put("theirs.csv", "loss,perplexity,n_tokens,val_sha256\n2.5,12.2,64,abc\n")
    [score] = analysis.load_curves(tmp_path)[0][name].to_dict("records")
    assert (score["kind"], score["val_loss"]) == ("score", 2.5)
    assert all(math.isnan(score[axis]) for axis in analysis.AXES)
