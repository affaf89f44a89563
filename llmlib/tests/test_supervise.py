"""The supervisor against real training processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from jupyter_client.manager import start_new_kernel

from llmlib import runs, supervise
from llmlib.config import PRESETS, override

MODEL = PRESETS["smoke"].model
ENDLESS = override(PRESETS["smoke"].train, budget_steps=10**6)
SCRIPT = """
import sys
from pathlib import Path
from llmlib.supervise import supervise
supervise(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def start_supervisor(run, tokens):
    """Supervise a run from a process of its own, as a kernel does."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(run), str(tokens)], stdout=subprocess.DEVNULL
    )


def cell_code(run, tokens):
    """The same as a cell of a notebook."""
    return f"import sys\nsys.argv = ['', {str(run)!r}, {str(tokens)!r}]\n{SCRIPT}"


class Kernel:
    """A kernel as a front end sees it: cells go in, messages come out."""

    def __init__(self):
        self.manager, self.client = start_new_kernel()

    def send(self, code, allow_stdin):
        return self.client.execute(code, allow_stdin=allow_stdin)

    def interrupt(self):
        self.manager.interrupt_kernel()

    def wait(self, cell):
        """Return the kernel's answer and what the cell displayed, by type of message."""
        displayed = {"display_data": [], "update_display_data": []}
        while True:
            message = self._next(self.client.get_iopub_msg, cell)
            if message["msg_type"] in displayed:
                displayed[message["msg_type"]].append(message["content"]["data"])
            if message["content"].get("execution_state") == "idle":
                return self._next(self.client.get_shell_msg, cell)["content"], displayed

    def _next(self, receive, cell):
        while (message := receive(timeout=300))["parent_header"].get("msg_id") != cell:
            pass
        return message


@pytest.fixture
def kernel():
    kernel = Kernel()
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def steps_of(run):
    return runs.read_metrics(run).query("kind == 'step'").step.tolist()


def test_run_survives_its_supervisor_and_never_runs_twice(make_run, smoke_tokens, monkeypatch):
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.1)
    run = make_run(MODEL, ENDLESS)
    kernel = start_supervisor(run, smoke_tokens)
    wait_for(lambda: supervise.last_metrics(run) is not None)
    kernel.send_signal(signal.SIGKILL)  # a kernel that died
    kernel.wait()
    wait_for(lambda: runs.lock_owner(run) is None)  # the run noticed, saved itself and left
    assert "supervis" in (run / "train.log").read_text()
    assert not (run / "training.json").exists()

    n_steps = steps_of(run)[-1] + 100
    config = runs.read_json(run / "config.json")
    config["train"]["budget_steps"] = n_steps
    runs.write_json(run / "config.json", config)
    other = start_supervisor(run, smoke_tokens)
    wait_for(lambda: runs.lock_owner(run) is not None or (run / "training.json").exists())
    result = supervise.supervise(run, smoke_tokens)  # attaches to what is there
    assert other.wait() == 0
    assert result["n_steps"] == n_steps
    assert steps_of(run) == list(range(1, n_steps + 1))
    log = (run / "train.log").read_text()
    assert log.count("validation set") == 2  # begun once, resumed once, never a third


def test_interrupting_the_cell_saves_the_run(make_run, smoke_tokens):
    run = make_run(MODEL, ENDLESS)
    kernel = start_supervisor(run, smoke_tokens)
    wait_for(lambda: supervise.last_metrics(run) is not None)
    os.kill(kernel.pid, signal.SIGINT)
    assert kernel.wait(timeout=600) != 0
    assert runs.lock_owner(run) is None
    newest = max((run / "checkpoints").iterdir(), key=lambda p: p.name)
    assert int(newest.name) == steps_of(run)[-1]


def test_interrupting_a_kernel_saves_the_run(make_run, smoke_tokens, kernel):
    run = make_run(MODEL, ENDLESS)
    code = cell_code(run, smoke_tokens)
    cell = kernel.send(code, allow_stdin=True)
    wait_for(lambda: supervise.last_metrics(run) is not None)
    kernel.interrupt()
    answer, _ = kernel.wait(cell)
    assert answer["ename"] == "KeyboardInterrupt"
    assert runs.lock_owner(run) is None
    newest = max((run / "checkpoints").iterdir(), key=lambda p: p.name)
    assert int(newest.name) == steps_of(run)[-1]


@pytest.mark.parametrize("attended", [True, False], ids=["a-person", "papermill"])
def test_a_cell_shows_one_line_and_to_a_person_one_curve(make_run, smoke_tokens, kernel, attended):
    run = make_run(MODEL, override(PRESETS["smoke"].train, budget_steps=60))
    code = cell_code(run, smoke_tokens)
    settings = "module.POLL_SECONDS, module.CURVE_SECONDS = 0.1, 1e9"
    code = f"from llmlib import supervise as module\n{settings}\n{code}"
    answer, displayed = kernel.wait(kernel.send(code, allow_stdin=attended))
    assert answer["status"] == "ok"
    figures = {kind: ["image/png" in data for data in shown] for kind, shown in displayed.items()}
    assert figures["display_data"] == [False, True][: 1 + attended]  # later ones replace these
    assert figures["update_display_data"].count(False) > 2
    assert figures["update_display_data"].count(True) == attended  # it was drawn at the end
    assert "step 60 " in displayed["update_display_data"][-1 - attended]["text/plain"]


def test_a_readers_mistake_in_the_run_is_a_value_error_here(make_run, smoke_tokens):
    small = override(MODEL, vocab_size=256)
    run = make_run(small, PRESETS["smoke"].train)
    with pytest.raises(ValueError, match=r"tokenizer has 512 tokens.*vocab_size is 256"):
        supervise.supervise(run, smoke_tokens)


def test_progress_line_tells_loss_speed_and_time_left(tmp_path):
    assert "starting" in supervise.progress_line(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "step", "step": 7, "progress": 0.5, "loss": 2.5, "tokens_per_s": 1234.5, '
        '"mfu": 0.41, "seconds_left": 3725.0}\n{"kind": "event", "text": "x"}\n{"kind": "st'
    )
    line = supervise.progress_line(tmp_path)
    for part in ("50%", "step 7", "loss 2.500", "1,234 tokens/s", "MFU 41%", "1:02:05 left"):
        assert part in line
