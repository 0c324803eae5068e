"""Metrics as TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path

from birl_ext.errors import MissingDependencyError
from birl_ext.runs.job import Metrics

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    raise MissingDependencyError(
        "--tensorboard needs tensorboard", fix='pip install "birl_ext[log]"'
    ) from None

__all__ = ["TensorBoardWriter"]


class TensorBoardWriter:
    """Writes the rows it is called with, for ``tensorboard --logdir RUN``; each outlives a kill.

    Each session writes a file of its own, which starts by voiding the rows it writes again. The
    record is metrics.jsonl: here the rows of sessions without this writer are missing.

    Args:
        folder: of the event files; created with the first row.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def __call__(self, row: Metrics) -> None:
        step = int(row["step"])
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _open(self, step: int) -> SummaryWriter:
        self._folder.mkdir(exist_ok=True)
        # TensorBoard reads by name. SummaryWriter's names tell sessions apart by the second and the
        # process only, so what voids rows could be read before them.
        sessions = len(list(self._folder.glob("earlier-*")))
        for number, file in enumerate(self._folder.glob("events.*"), sessions + 1):
            file.rename(self._folder / f"earlier-{number:06}.tfevents")
        return SummaryWriter(str(self._folder), purge_step=step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
