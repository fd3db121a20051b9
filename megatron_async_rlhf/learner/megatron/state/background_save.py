"""Writes Megatron checkpoints while training continues: the plan at once, files from a thread, then one last word.

    start:  every rank plans and starts its thread                           (collective; training continues after it)
    thread: write, flush and hash this rank's files                          (no collectives)
    finish: if all threads are done, rank 0 writes what makes the files a checkpoint   (collective)

No collective has a write in it, so that a full disk fails the same command on every rank and nobody waits for who failed.
That is why Megatron's own `save` is not called, in which rank 0 writes before all ranks plan, but the steps it consists of.

A thread rather than the processes of Megatron's own `AsyncCallsQueue`. Its fork copies a process in which gloo, the
weight push and OpenMP have threads, and whatever lock one of them holds at that moment stays locked in the child for
ever; its spawn imports Megatron once more on every rank. A thread does neither, dies with its rank, so that nothing
writes into a directory that a restarted run cleans up, and torch releases the interpreter's lock while it writes.
"""

import errno
import io
import os
import queue
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.errors import LearnerError, WriteError
from megatron_async_rlhf.formats.directory import COMMON, write_format
from megatron_async_rlhf.formats.file_digests import FileDigest, digest_file, write_digests
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.plain_values import of_all_ranks
from megatron_async_rlhf.types import Span

# Megatron would start a manager process to carry results between processes; here they stay in one.
filesystem_async._results_queue = queue.Queue()


class _PlannedSave(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the plan; keeps the writer for whoever writes. One file per rank.

    Attributes:
        common: what is not sharded, as the file rank 0 writes it to.
        digests: of this rank's files, once they are written.
        writer: of this rank's files.
    """

    writer: FileSystemWriterAsync

    def __init__(self, directory: Path, state: dict) -> None:
        """Collective."""
        super().__init__("torch_dist", 1, thread_count=1)
        self.directory = directory
        self._failed: OSError | None = None
        sharded, common = save_preprocess(state, True)
        buffer = io.BytesIO()
        torch.save(common, buffer)
        self.common = buffer.getvalue()
        self.digests: dict[str, FileDigest] = {}
        self._request = self.async_save(sharded, directory)

    def finish(self, digests: Mapping[str, FileDigest]) -> None:
        """Make the files a checkpoint. Collective; raises OSError on rank 0 only, after all ranks have met.

        Args:
            digests: of all ranks' files.
        """
        for finalize in self._request.finalize_fns:
            finalize()
        if self._failed is not None:
            raise self._failed
        if dist.get_rank() == 0:
            write_format(self.directory)
            write_digests(self.directory, known=digests)

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, save_state_dict_ret) -> AsyncRequest:
        self.writer = writer
        writer.results_queue = queue.Queue()  # of its own: several checkpoints may be under way
        write_metadata = writer.finish

        def finish(*arguments) -> None:  # rank 0, which all others wait for
            try:
                write_metadata(*arguments)
            except OSError as error:
                self._failed = error

        writer.finish = finish
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        return request._replace(async_fn=None, async_fn_args=(), preload_fn=None)


class BackgroundSave:
    """At most one save under way on this rank. Collective over the learner: every rank makes the same calls."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[Span] | None = None
        self._plans: list[_PlannedSave] = []
        self._names = ""

    def start(self, states: Mapping[Path, dict]) -> None:
        """Begin to write each sharded state dict into its directory; what is in host memory must not change meanwhile.

        Raises:
            WriteError: the same on every rank.
        """
        if self._under_way is not None:
            raise LearnerError("SaveCheckpoint came before the save under way was finished with FinishCheckpoint")
        self._names = " and ".join(map(str, states))
        self._make_directories(states)
        self._plans = [_PlannedSave(directory, state) for directory, state in states.items()]
        for plan in self._plans:
            plan.writer.write_buckets = [_staged(bucket) for bucket in plan.writer.write_buckets]
        self._under_way = self._thread.submit(self._write, self._plans)

    def finish(self) -> Span | None:
        """When the files were written, once they are on every rank; None before.

        Raises:
            WriteError: the same on every rank: all that failed, naming directory and rank. Nobody writes there any more.
        """
        if self._under_way is None:
            raise LearnerError("FinishCheckpoint came without SaveCheckpoint")
        if not all(of_all_ranks(self._under_way.done(), bool, self._placement.control)):
            return None
        written, self._under_way = self._under_way, None
        plans, self._plans = self._plans, []
        self._agree(written.exception())
        failed = None
        for plan, digests in zip(plans, self._digests_of(plans), strict=True):
            try:
                plan.finish(digests)
            except OSError as error:
                failed = failed or error
        self._agree(failed)
        return written.result()

    def _digests_of(self, plans: list[_PlannedSave]) -> list[dict[str, FileDigest]]:
        """Of all ranks' files, by plan."""
        mine = [plan.digests for plan in plans]
        of_ranks = of_all_ranks(mine, list[dict[str, FileDigest]], self._placement.control)
        return [{name: digest for rank in of_ranks for name, digest in rank[n].items()} for n in range(len(plans))]

    def _make_directories(self, directories: Mapping[Path, dict]) -> None:
        """Rank 0 makes them before anybody writes."""
        failed = None
        if self._placement.rank == 0:
            try:
                for directory in directories:
                    directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                failed = error
        self._agree(failed)

    def _agree(self, error: BaseException | None) -> None:
        """All ranks fail if one did."""
        mine = error and f"learner.{self._placement.rank}: {_line(error)}"
        if failed := [line for line in of_all_ranks(mine, str | None, self._placement.control) if line]:
            full = any(os.strerror(errno.ENOSPC) in line for line in failed)
            way_out = "; make room there, then continue with --resume" if full else ""
            raise WriteError(f"checkpoint {self._names} could not be written ({'; '.join(failed)}){way_out}")

    def _write(self, plans: list[_PlannedSave]) -> Span:
        start = now()
        for plan in plans:
            writer, written = plan.writer, {}
            if self._placement.rank == 0:
                with (plan.directory / COMMON).open("wb") as file:
                    file.write(plan.common)
                    file.flush()
                    os.fsync(file.fileno())
            for number, bucket in enumerate(writer.write_buckets):
                results: queue.Queue = queue.Queue()
                counts: queue.Queue[int] = queue.Queue()
                counts.put(number)
                FileSystemWriterAsync.write_preloaded_data(
                    [writer.transforms] if hasattr(writer, "transforms") else [], number, bucket, results, counts, True
                )
                _, written[number] = results.get_nowait()
                if isinstance(written[number], Exception):
                    raise written[number]
                plan.digests[Path(bucket[0]).name] = digest_file(Path(bucket[0]))
            writer.results_queue.put(written)
            writer.write_buckets = [(path, name, ([], [])) for path, name, _ in writer.write_buckets]  # frees the copy
        return Span(
            name="write checkpoint",
            start=start,
            end=now(),
            process=f"learner.{self._placement.rank}",
            lane="checkpoint",
        )


def _staged(bucket: tuple) -> tuple:
    """A file's content in host memory."""
    path, name, (objects, tensors) = bucket
    return path, name, (objects, [(item, tensor.detach().to("cpu")) for item, tensor in tensors])


def _line(error: BaseException) -> str:
    # When the disk is full, torch fails once more while it gives up, and hides what was wrong.
    if isinstance(error.__context__, OSError):
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
