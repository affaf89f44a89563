"""Trackers: what a run logs, shown live elsewhere as well. ``metrics.jsonl`` stays the record."""

from __future__ import annotations

import atexit
import math
from pathlib import Path
from typing import Any, Protocol

TRACKERS = ["tensorboard"]


class Tracker(Protocol):
    """What takes the rows of ``metrics.jsonl`` as they are written."""

    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_tracker(name: str | None, run: Path) -> Tracker:
    """Open the named tracker on a run's folder; None tracks nothing."""
    if name is None:
        return NoTracker()
    if name not in TRACKERS:
        raise ValueError(f"tracker={name!r} is unknown; choose None or one of {TRACKERS}.")
    return TensorBoard(run / "tensorboard")


class NoTracker:
    def log(self, row: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files that ``tensorboard --logdir`` shows; numbers as curves, events as text."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                'tracker="tensorboard" needs a package that is not installed: '
                'pip install -e ".[tensorboard]"'
            ) from error
        self.folder, self.make_writer = folder, SummaryWriter
        self.writer: Any = None
        self.step = math.inf  # of the last row

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] < self.step:  # the run begins, or went back: what lay ahead is void
            self.close()
            self.writer = self.make_writer(self.folder, purge_step=row["step"] + 1, flush_secs=10)
            atexit.register(self.writer.close)  # however the run ends, its last rows are written
        self.step = row["step"]
        if row["kind"] == "event":
            self.writer.add_text("event", row["text"], self.step)
            return
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(f"{row['kind']}/{key}", value, self.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
