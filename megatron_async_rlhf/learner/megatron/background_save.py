"""Writes Megatron checkpoints while training goes on: the plan at once, files from a thread, then one last word.

    start:  every rank plans and starts its thread                           (collective; training goes on after it)
    thread: write and flush this rank's files                                (no collectives)
    finish: if all threads are done, rank 0 writes what makes the files a checkpoint   (collective)

A thread rather than the processes of Megatron's own `AsyncCallsQueue`. Its fork copies a process in which gloo, the
weight push and OpenMP have threads, and whatever lock one of them holds at that moment stays locked in the child for
ever; its spawn imports Megatron once more on every rank. A thread does neither, dies with its rank, so that nothing
writes into a directory that a restarted run cleans up, and torch releases the interpreter's lock while it writes.
"""

import logging
import queue
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_async_rlhf.errors import LearnerError
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.types import Span

_log = logging.getLogger(__name__)

# Megatron would start a manager process to carry results between processes; here they stay in one.
filesystem_async._results_queue = queue.Queue()


class _PlannedSave(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the plan; keeps the writer for whoever writes. One file per rank."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.writer: FileSystemWriterAsync | None = None

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, save_state_dict_ret) -> AsyncRequest:
        self.writer = writer
        writer.results_queue = queue.Queue()  # of its own: several checkpoints may be under way
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        return request._replace(async_fn=None, async_fn_args=(), preload_fn=None)


class BackgroundSave:
    """At most one save under way on this rank. Collective over the learner: every rank makes the same calls."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[Span] | None = None
        self._requests: list[AsyncRequest] = []
        self._names = ""

    def start(self, states: Mapping[Path, dict]) -> None:
        """Begin to write each sharded state dict into its directory; what is in host memory must not change meanwhile.

        Raises:
            LearnerError: the same on every rank.
        """
        if self._under_way is not None:
            raise LearnerError("SaveCheckpoint came before the save under way was finished with FinishCheckpoint")
        self._names = " and ".join(map(str, states))
        self._make_directories(states)
        writers = []
        for directory, state in states.items():
            strategy = _PlannedSave()
            request = dist_checkpointing.save(state, str(directory), sharded_strategy=strategy, async_sharded_save=True)
            self._requests.append(request)
            writers.append(strategy.writer)
        for writer in writers:
            writer.write_buckets = [_staged(bucket) for bucket in writer.write_buckets]
        self._under_way = self._thread.submit(self._write, writers)

    def finish(self) -> Span | None:
        """When the files were written, once they are on every rank; None before.

        Raises:
            LearnerError: the same on every rank: all that failed, naming directory and rank.
        """
        if self._under_way is None:
            raise LearnerError("FinishCheckpoint came without SaveCheckpoint")
        error = self._under_way.exception() if self._under_way.done() else None
        mine = (self._under_way.done(), error and f"learner.{self._placement.rank}: {_line(error)}")
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self._placement.control)
        if not all(done for done, _ in everyone):
            return None
        requests, self._requests = self._requests, []
        written, self._under_way = self._under_way, None
        if failed := [message for _, message in everyone if message]:
            raise LearnerError(f"checkpoint {self._names} could not be written ({'; '.join(failed)})")
        for request in requests:
            for finalize in request.finalize_fns:
                finalize()
        return written.result()

    def _make_directories(self, directories: Mapping[Path, dict]) -> None:
        """Rank 0 makes them before anybody writes; all ranks fail if it cannot."""
        message = [None]
        if self._placement.rank == 0:
            try:
                for directory in directories:
                    directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                message = [f"checkpoint {self._names} could not be written ({error.strerror or error})"]
        dist.broadcast_object_list(message, src=0, group=self._placement.control)
        if message[0]:
            raise LearnerError(message[0])

    def _write(self, writers: list[FileSystemWriterAsync]) -> Span:
        start = time.time()
        for writer in writers:
            written = {}
            for number, bucket in enumerate(writer.write_buckets):
                results, counts = queue.Queue(), queue.Queue()
                counts.put(number)
                FileSystemWriterAsync.write_preloaded_data(
                    [writer.transforms] if hasattr(writer, "transforms") else [], number, bucket, results, counts, True
                )
                _, written[number] = results.get_nowait()
                if isinstance(written[number], Exception):
                    raise written[number]
            writer.results_queue.put(written)
            writer.write_buckets = [(path, name, ([], [])) for path, name, _ in writer.write_buckets]  # frees the copy
        return Span(
            name="write checkpoint",
            start=start,
            end=time.time(),
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
