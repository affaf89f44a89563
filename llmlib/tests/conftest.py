"""Fixtures that several test modules share: prepared tokens and run folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmlib import prepare, runs
from llmlib.config import PRESETS, ModelConfig, TrainConfig, to_json


@pytest.fixture(scope="session")
def smoke_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of the smoke preset, prepared once."""
    folder = tmp_path_factory.mktemp("smoke") / "tokens"
    prepare.prepare(PRESETS["smoke"].data, folder)
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[ModelConfig, TrainConfig], Path]:
    """Return a function that makes a run folder for ``llmlib.train``, each in its own place."""
    n_made = 0

    def make(model: ModelConfig, train: TrainConfig) -> Path:
        nonlocal n_made
        n_made += 1
        run = tmp_path / f"run-{n_made}"
        runs.write_json(run / "config.json", {"model": to_json(model), "train": to_json(train)})
        return run

    return make
