"""Metrics as TensorBoard scalars."""

from __future__ import annotations

from collections.abc import Mapping

from birl_ext.errors import MissingDependencyError
from birl_ext.runs.directory import RunDirectory

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    raise MissingDependencyError(
        "--tensorboard needs tensorboard", fix='pip install "birl_ext[log]"'
    ) from None

__all__ = ["TensorBoardWriter"]


class TensorBoardWriter:
    """Writes rows to RUN/tensorboard, for ``tensorboard --logdir RUN``.

    Each session writes a file of its own, which starts by voiding the rows it writes again. The
    record is metrics.jsonl: here the rows of sessions without this writer are missing.

    Args:
        directory: the run.
        after: rows of later steps, written by earlier sessions, are void.
    """

    def __init__(self, directory: RunDirectory, *, after: int) -> None:
        folder = directory.tensorboard
        folder.mkdir(exist_ok=True)
        # TensorBoard reads by name. SummaryWriter's names tell sessions apart by the second and the
        # process only, so what voids rows could be read before them.
        sessions = len(list(folder.glob("earlier-*")))
        for number, file in enumerate(folder.glob("events.*"), sessions + 1):
            file.rename(folder / f"earlier-{number:06}.tfevents")
        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def append(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
