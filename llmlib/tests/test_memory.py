"""Memory and devices of the a100 scale's step, traced on a CUDA device that is not there."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from llmlib import sizing
from llmlib.tests import fake_cuda

CASES = [  # architecture, optimizer, micro-batch; depth, width and data type, if not the scale's
    *(["llama", name, n] for name, n in (("adamw", 1), ("adamw", 32), ("muon", 8))),
    *(["gpt2", name, n] for name, n in (("adamw", 64), ("muon", 1))),
    *([arch, name, 4, 2] for arch in ("llama", "gpt2") for name in ("sophia", "sophia_writeup")),
    ["llama", "muon", 1, 8, 2048],
    ["gpt2", "adamw", 1, 4, 256],
    ["llama", "adamw", 4, 4, 768, "float32"],
]


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Pairs of a case and what its trace found; all run in one process, which no other test shares."""
    if torch.version.cuda or torch.version.hip or not shutil.which("g++"):
        pytest.skip("needs a torch without CUDA, and g++")
    try:
        library = fake_cuda.build(tmp_path_factory.mktemp("fake"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"torch's headers do not fit: {error.stderr.decode():.300}")
    command = [sys.executable, "-m", fake_cuda.__name__, str(library), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(zip(CASES, json.loads(done.stdout), strict=True))


def test_no_operator_of_a_step_mixes_devices_or_waits_for_one(traces):
    for case, found in traces:
        assert (found["device"], found["mixed"], found["waits"]) == ("cuda:0", [], []), case


def test_validation_never_needs_more_memory_than_training(traces):
    for case, found in traces:
        assert found["state"] < found["validation"] < found["step"], case


def test_estimated_memory_of_a_step_is_what_it_holds(traces):
    for case, found in traces:
        estimate = sizing.step_memory(*fake_cuda.configs(*case))
        assert estimate == pytest.approx(found["step"], rel=0.15), case
