"""What was trained on, kept so that a learner alone can do it again: `async-rlhf replay`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, Self

import msgspec
from msgspec import Struct

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.learner.protocol import TrainRollout
from megatron_async_rlhf.scheduler.state import ReadyGroup
from megatron_async_rlhf.telemetry.files import writing


class RecordedGroup(Struct, frozen=True, kw_only=True):
    """Where a group of a rollout came from.

    Attributes:
        index: which group of the run.
        version: policy version it was admitted at.
        versions: the versions that sampled its tokens, of each completion, without repeats.
        generate_s: how long it took.
    """

    index: int
    version: int
    versions: list[list[int]]
    generate_s: float


class RecordedRollout(Struct, frozen=True, kw_only=True):
    """One command to the learner; `groups` are those of all its mini-batches, in order.

    Attributes:
        arrived: indices of all groups that were complete then, in order of arrival.
    """

    command: TrainRollout
    groups: list[RecordedGroup]
    arrived: list[int]

    @classmethod
    def of(cls, command: TrainRollout, rollout: Sequence[ReadyGroup], arrived: list[int]) -> Self:
        groups = [
            RecordedGroup(
                index=group.index,
                version=group.version,
                versions=[list(dict.fromkeys(c.versions)) for c in group.scored.group.completions],
                generate_s=group.generate_s,
            )
            for group in rollout
        ]
        return cls(command=command, groups=groups, arrived=arrived)

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            CheckpointError: one line.
        """
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise CheckpointError(f"{path} is broken or from another release ({error})") from None


class RolloutSink(Protocol):
    """Whoever wants to know what is trained on."""

    def write(self, command: TrainRollout, rollout: Sequence[ReadyGroup], arrived: list[int]) -> None:
        """A rollout is about to be trained; `arrived` are all groups that were complete when it was chosen, in order."""


class RolloutLog:
    """A file per rollout, named by the first of its steps."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Version 0.1.0 counted steps from 0; what it recorded can still be read.
        self._first = 0 if (directory / "step_000000.msgpack").exists() else 1

    def write(self, command: TrainRollout, rollout: Sequence[ReadyGroup], arrived: list[int]) -> None:
        record, path = RecordedRollout.of(command, rollout, arrived), self._path(command.version)
        with writing(path):
            self._directory.mkdir(exist_ok=True)
            path.write_bytes(msgspec.msgpack.encode(record))

    def cut(self, version: int) -> None:
        """Forget what was trained at this version or later: the run continues from there."""
        for path in self._directory.glob("step_*.msgpack"):
            if path >= self._path(version):
                path.unlink()

    def read(self, end: int) -> Iterator[RecordedRollout]:
        """In the order they were trained, to those whose last step is the one before `end`.

        Raises:
            CheckpointError: one line; a file is broken, or a rollout is missing.
        """
        version = 0
        paths = sorted(self._directory.glob("step_*.msgpack"))
        for path in paths:
            if path != self._path(version):
                raise CheckpointError(
                    f"{self._path(version)} is missing: the rollouts before {path.name} are not whole"
                )
            try:
                record = RecordedRollout.read(path)
            except CheckpointError:
                if version + 1 > end:
                    return  # the run was killed while it wrote this
                raise
            version += len(record.command.mini_batches) * record.command.epochs
            if version > end:  # it was killed while this was trained
                return
            yield record

    def _path(self, version: int) -> Path:
        return self._directory / f"step_{version + self._first:06d}.msgpack"
