"""Other people's curves, in the shapes that trackers and scripts leave them."""

import math

import pytest

from llmlib import analysis, external

STEPS = ["step", "loss", "val_loss"]
FILES = {  # name: text, and by run the rows of step, loss and val_loss
    "ours.csv": (
        "step,loss,tokens,val_loss\n10,3.5,100,\n20,3.0,200,3.25\n",
        {"": [[10, 3.5, None], [20, 3.0, None], [20, None, 3.25]]},
    ),
    "ours.jsonl": (
        '{"step": 10, "loss": 3.5}\n{"step": 20, "val_loss": 3.25}\n',
        {"": [[10, 3.5, None], [20, None, 3.25]]},
    ),
    "wandb_panel.csv": (
        '"Step","wide - val/loss","wide - val/loss__MIN","deep - val/loss"\n"0","10.8","10.8",""\n"100","6.2","6.2","6.4"\n',
        {"deep": [[100, None, 6.4]], "wide": [[0, None, 10.8], [100, None, 6.2]]},
    ),
    "lightning.csv": (
        "epoch,step,train_loss_step,train_loss_epoch,val_loss\n0,49,6.1,,\n0,99,5.2,,\n0,99,,,5.3\n0,99,,5.6,\n",
        {"": [[49, 6.1, None], [99, 5.2, None], [99, None, 5.3]]},
    ),
    "tensorboard.csv": (
        "Wall time,Step,Value\n1700000000.5,0,10.9\n1700000010.5,100,6.2\n",
        {"": [[0, 10.9, None], [100, 6.2, None]]},
    ),
    "trainer_state.json": (
        '{"log_history": [{"step": 100, "loss": 6.2}, {"step": 100, "eval_loss": 6.3}]}',
        {"": [[100, 6.2, None], [100, None, 6.3]]},
    ),
    "nanogpt.log": (
        "step 0: train loss 10.91, val loss 10.92\niter 0: loss 10.9, time 3011.2ms, mfu -100.00%\niter 10: loss 9.5, time 301.2ms\n",
        {"": [[0, 10.9, None], [0, None, 10.92], [10, 9.5, None]]},
    ),
    "llmc_main.log": (
        "s:0 tel:10.9\ns:0 trl:10.95 lr:0.000001 norm:5.1\ns:250 trl:6.2 lr:0.0006\n",
        {"": [[0, 10.95, None], [0, None, 10.9], [250, 6.2, None]]},
    ),
    "llmc_stdout.txt": (
        "step    1/19560 | loss 10.99 (+nanz)| norm 15.3 (+nanz)| lr 1.00e-06\n",
        {"": [[1, 10.99, None]]},
    ),
    "modded.txt": (
        "step:0/1000 val_loss:10.82 train_time:0ms\nstep:125/1000 val_loss:4.6 train_time:20012ms step_avg:160.1ms\n",
        {"": [[0, None, 10.82], [125, None, 4.6]]},
    ),
    "excel.csv": ("step;loss\n0;10,9\n100;6,2\n", {"": [[0, 10.9, None], [100, 6.2, None]]}),
    "gaps.csv": (
        "\ufeffstep,loss\n0,10.9\n100,NaN\n200,Infinity\n300,6.0\n",
        {"": [[0, 10.9, None], [300, 6.0, None]]},
    ),
    "restarted.csv": (
        "step,loss\n0,9\n100,7\n200,6\n100,7.1\n",
        {"": [[0, 9, None], [100, 7.1, None], [200, 6, None]]},
    ),
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
    text, expected = FILES[name]
    prefix = put(name, text)
    curves, skipped = external.load_curves(tmp_path)
    assert not skipped
    assert list(curves) == [f"{prefix}: {run}" if run else prefix for run in expected]
    for curve, rows in zip(curves.values(), expected.values(), strict=True):
        assert curve.columns.tolist() == analysis.CURVE_COLUMNS
        assert curve[STEPS].astype(object).replace(math.nan, None).to_numpy().tolist() == rows
        assert curve.kind.tolist() == ["step" if loss else "eval" for _, loss, _ in rows]


def test_units_are_seconds(tmp_path, put):
    put("modded.txt", FILES["modded.txt"][0])
    put("tensorboard.csv", FILES["tensorboard.csv"][0])
    curves, _ = external.load_curves(tmp_path)
    assert [curve.seconds.tolist() for curve in curves.values()] == [[0, 20.012], [0, 10]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "iteration,loss\n1,4.0\n", ["columns iteration, loss", "needs step and loss"]),
        ("b.csv", "Name,State,val/loss\nwide,finished,3\n", ["columns Name, State", "needs step"]),
        ("c.csv", "step,loss\n1,four\n", ["not numbers"]),
        ("d.csv", "", ["was not read"]),
        ("e.json", "{}", ["log_history"]),
        ("f.txt", "nothing of the kind\n", ["needs step"]),
        ("g.png", b"\x89PNG\r\n\x1a\n\xff", ["was not read"]),
    ],
)
def test_a_file_that_is_no_curve_is_named_and_the_others_are_read(
    tmp_path, put, name, content, words
):
    (refused, good) = (put(name, content), put("good.csv", "step,loss\n1,4.0\n"))
    put("._good.csv", b"\x00\x05\x16")  # macOS keeps such beside a file
    curves, [message] = external.load_curves(tmp_path)
    assert list(curves) == [good]
    assert all(word in message for word in [refused, *words]), message


def test_a_curve_of_steps_and_losses_alone_knows_no_other_axis(tmp_path, put):
    name = put("theirs.csv", "step,loss\n1,4.0\n2,3.0\n3,3.0\n")
    curve = external.load_curves(tmp_path)[0][name]
    assert curve[["tokens", "seconds", "flops"]].isna().all(axis=None)
    assert analysis.smooth(curve, 1e-9).smoothed.tolist() == [4.0, 3.0, 3.0]


def test_a_score_knows_no_axis(tmp_path, put):
    name = put("theirs.csv", "loss,perplexity,n_tokens,val_sha256\n2.5,12.2,64,abc\n")
    [score] = external.load_curves(tmp_path)[0][name].to_dict("records")
    assert (score["kind"], score["val_loss"]) == ("score", 2.5)
    assert all(math.isnan(score[axis]) for axis in analysis.AXES)
