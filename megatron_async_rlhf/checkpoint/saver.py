"""Saves a run: the learner writes its state, the controller adds its own, then the directory gets its name.

start:    freeze the controller's state -> tell the learner to copy and write   (training continues after it)
complete: ask the learner until all its files are there -> add ours, flush, rename -> delete what is not kept
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Self

from msgspec import Struct

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints, best_version, has_own_reference
from megatron_async_rlhf.checkpoint.run_state import RunState, encode_run_state
from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import CheckpointError, ConfigError, WriteError
from megatron_async_rlhf.formats.directory import HF_DIR, describe_weights
from megatron_async_rlhf.formats.file_digests import read_digests, write_digests
from megatron_async_rlhf.learner.protocol import FinishCheckpoint, Learner, SaveCheckpoint
from megatron_async_rlhf.scheduler.state import ControllerState
from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR, RUN_STATE, unwritten
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Span

_POLL_S = 0.1


class _Save(Struct, frozen=True):
    """A save under way: frozen state, and the directories the learner writes, by the names they will have."""

    version: int
    state: bytes
    directories: list[Path]
    start: float


class Kept(Struct, frozen=True, kw_only=True):
    """Which checkpoint is kept beside the newest: the one with the `highest` or `lowest` mean of a metric."""

    metric: str | None = None
    best: str = "highest"


class CheckpointSaver:
    """Of one run; implements `Checkpoints` of the scheduler."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        learner: Learner,
        recorder: Recorder,
        resumed: RunState | None,
        *,
        kept: Kept,
        has_reference: bool,
    ) -> None:
        """
        Args:
            has_reference: a reference policy that is nowhere else is to be saved with the first checkpoint.
        """
        self._config, self._kept, self._has_reference = config, kept, has_reference
        self._template = run_dir / POLICY_TEMPLATE_DIR
        self._learner = learner
        self._recorder = recorder
        self._checkpoints = RunCheckpoints(run_dir)
        self._under_way: _Save | None = None
        self._seen: list[float] = []  # of the metric, since the last checkpoint
        self._scores: dict[int, float] = {}
        if resumed is not None and resumed.metric == kept.metric:
            self._scores = dict(resumed.scores)
        self._metric_exists = bool(self._scores)

    @classmethod
    def of_run(
        cls, config: RunConfig, run_dir: Path, learner: Learner, recorder: Recorder, resumed: RunState | None
    ) -> Self:
        """Of RL, which keeps what `checkpoint` says."""
        kept = Kept(metric=config.checkpoint.keep_best, best=config.checkpoint.best)
        return cls(config, run_dir, learner, recorder, resumed, kept=kept, has_reference=has_own_reference(config))

    def observe(self, metrics: dict[str, float]) -> None:
        """As `Checkpoints.observe`.

        Raises:
            ConfigError: there is no such metric as `checkpoint.keep_best`.
        """
        metric = self._kept.metric
        if metric is None:
            return
        if metric in metrics:
            self._seen.append(metrics[metric])
            self._metric_exists = True
        # Not every step has every metric: one without groups lacks the loss, a stale one the log-probability gap.
        elif metrics.get("num_sequences") and not self._metric_exists:
            raise ConfigError(
                f"checkpoint.keep_best = {metric}: metrics.jsonl has no such metric; choose one of "
                f"{', '.join(sorted(metrics))}"
            )

    @property
    def best(self) -> int | None:
        """The version of the checkpoint with the best mean, of those that are there; None without a metric."""
        complete = self._checkpoints.versions()
        scores = {version: score for version, score in self._scores.items() if version in complete}
        return best_version(scores, self._kept.best)

    def is_best(self, value: float) -> bool:
        """Whether a checkpoint with this mean would be the best."""
        sign = 1 if self._kept.best == "highest" else -1
        return all(sign * value > sign * score for score in self._scores.values())

    def is_due(self, version: int) -> bool:
        every = self._config.checkpoint.every_steps
        return every is not None and version % every == 0 and not self.is_saved(version)

    def is_saved(self, version: int) -> bool:
        return version in self._checkpoints.versions()

    async def start(self, state: ControllerState) -> None:
        """As `Checkpoints.start`.

        Raises:
            LearnerError, WriteError: naming the directory. What was written of it is deleted.
        """
        version, metric = state.version, self._kept.metric
        if self._seen:
            self._scores[version] = fmean(self._seen)
            self._seen = []
        directories = [self._checkpoints.path(version)]
        if self._has_reference and not self._checkpoints.reference.exists():
            directories.append(self._checkpoints.reference)
        frozen = RunState(controller=state, totals=self._recorder.totals, metric=metric, scores=self._scores)
        self._under_way = _Save(version, encode_run_state(frozen), directories, now())
        checkpoint, *reference = (str(self._checkpoints.partial(path)) for path in directories)
        command = SaveCheckpoint(
            checkpoint=checkpoint,
            reference=reference[0] if reference else None,
            snapshot=self._config.checkpoint.async_save,
        )
        with self._gives_room_back(self._under_way):
            await self._learner.execute(command)

    async def complete(self, *, deletes: bool = True) -> None:
        """As `Checkpoints.complete`.

        Raises:
            LearnerError, WriteError, CheckpointError: one line naming the directory. What was written of it is deleted,
                unless it is still being written.
        """
        save, self._under_way = self._under_way, None
        assert save is not None  # `start` came before
        limit = self._config.checkpoint.timeout_s
        with self._gives_room_back(save):
            while not (answer := await self._learner.execute(FinishCheckpoint())).saved:
                if now() - save.start > limit:
                    raise CheckpointError(
                        f"{save.directories[0]} was not written within {limit:g} s; raise checkpoint.timeout_s"
                    )
                await asyncio.sleep(_POLL_S)
            await asyncio.to_thread(self._put_in_place, save)
        if deletes:
            await asyncio.to_thread(self._prune)
        span = Span(
            name=f"checkpoint {save.version}",
            start=save.start,
            end=now(),
            process="checkpoints",
            args={"version": save.version},
        )
        self._recorder.saved(save.version, [span, *answer.spans])

    @contextmanager
    def _gives_room_back(self, save: _Save) -> Iterator[None]:
        """Deletes what a save has written whose files nobody can write: the disk may be full, and the run has last words."""
        try:
            yield
        except (WriteError, OSError) as error:
            for directory in save.directories:
                self._checkpoints.discard_partial(directory)
            if isinstance(error, OSError):
                raise CheckpointError(unwritten(save.directories[0], error)) from None
            raise

    def _put_in_place(self, save: _Save) -> None:
        checkpoint = save.directories[0]
        (self._checkpoints.partial(checkpoint) / RUN_STATE).write_bytes(save.state)
        for directory in reversed(save.directories):  # a checkpoint is no use without the reference
            dtype = self._config.learner.weights_dtype
            partial = self._checkpoints.partial(directory)
            describe_weights(self._template, partial / HF_DIR, dtype)
            write_digests(partial, known=read_digests(partial) or {})
            self._checkpoints.put_in_place(directory)

    def _prune(self) -> None:
        self._checkpoints.prune(self._config.checkpoint.keep_last, self.best)
