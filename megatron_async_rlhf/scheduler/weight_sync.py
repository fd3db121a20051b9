"""A weight push as the controller sees it: the learner sends, every generator receives, digests are compared."""

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from megatron_async_rlhf.config.sections import WeightsSection
from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.learner.protocol import JoinTransfer, Learner, PushReport, PushWeights
from megatron_async_rlhf.types import Span
from megatron_async_rlhf.weights.buckets import TensorSpec


class Receiver(Protocol):
    """A generator as a receiver of weights; raises GeneratorError or, inside its workers, TransferError."""

    name: str
    tensor_parallel: int

    async def pause(self) -> None: ...

    async def join_transfer(
        self, *, host: str, port: int, first_rank: int, world_size: int, timeout_s: float
    ) -> None: ...

    async def receive_weights(self, update: dict, *, version: int, timeout_s: float) -> None: ...


class WeightSync:
    """Connects once, then pushes version after version."""

    def __init__(
        self, learner: Learner, receivers: Sequence[Receiver], specs: Sequence[TensorSpec], config: WeightsSection
    ) -> None:
        self._learner = learner
        self._receivers = receivers
        self._specs = msgspec.to_builtins(list(specs))
        self._config = config
        self._pushes = 0

    async def connect(self, host: str, port: int) -> None:
        """Rendezvous of learner rank 0 and every generator worker."""
        names = [f"{r.name} rank {t}" for r in self._receivers for t in range(r.tensor_parallel)]
        first_rank = 1
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._learner.execute(JoinTransfer(host=host, port=port, receivers=names)))
            for receiver in self._receivers:
                tasks.create_task(
                    receiver.join_transfer(
                        host=host,
                        port=port,
                        first_rank=first_rank,
                        world_size=1 + len(names),
                        timeout_s=self._config.timeout_s,
                    )
                )
                first_rank += receiver.tensor_parallel

    async def push(self, version: int) -> tuple[PushReport, list[Span]]:
        """Bring every generator to `version`. The engines stay paused; nothing may be generating.

        Raises:
            TransferError: a phase failed or timed out. Digests that differ are in the report: see `require_equal`.
        """
        verify = self._config.verify == "every" or (self._config.verify == "first" and self._pushes == 0)
        update = {
            "tensors": self._specs,
            "staging_bytes": self._config.staging_mib * 2**20,
            "verify": verify,
        }
        start = time.time()
        await asyncio.gather(*(receiver.pause() for receiver in self._receivers))
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(self._learner.execute(PushWeights(version=version, verify=verify)))
            for receiver in self._receivers:
                tasks.create_task(receiver.receive_weights(update, version=version, timeout_s=self._config.timeout_s))
        self._pushes += 1
        answer = sending.result()
        whole = Span(name=f"push {version}", start=start, end=time.time(), process="weights")
        return answer.push, [whole, *answer.spans]


def require_equal(report: PushReport, version: int) -> None:
    """Stop the run if any generator worker holds other bytes than the learner sent.

    Raises:
        TransferError: names the worker and the tensor.
    """
    if report.mismatches:
        raise TransferError(
            f"push of version {version}: {len(report.mismatches)} of {report.compared} digests differ, first "
            f"{report.mismatches[0]}; that generator does not hold the learner's weights"
        )
