"""The receiving half of a weight push, inside every vLLM worker: vLLM's weight-transfer API, our backend."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_async_rlhf.errors import AsyncRLHFError, TransferError
from megatron_async_rlhf.generator.vllm.worker_model import WorkerModel
from megatron_async_rlhf.models.architecture import architecture_of_hf
from megatron_async_rlhf.models.layout import LearnerLayout
from megatron_async_rlhf.weights.messages import agree
from megatron_async_rlhf.weights.plan import TransferPlan, plan_transfer
from megatron_async_rlhf.weights.receive import Receiver
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.transports.open import open_transport
from megatron_async_rlhf.weights.transports.rendezvous import join_store


@dataclass
class SinkInit(WeightTransferInitInfo):
    """Who meets where, and what will be sent.

    Attributes:
        session, generators: as in `JoinTransfer`; `replica` is this server's place among the generators.
        learner: the fields of `LearnerLayout`.
        dtype: of the weights on the wire; must be this server's own.
    """

    host: str
    port: int
    session: str
    generators: list[str]
    replica: int
    learner: dict[str, int]
    dtype: str
    staging_bytes: int
    transport: str
    timeout_s: float


@dataclass
class SinkUpdate(WeightTransferUpdateInfo):
    """One push."""

    verify: bool


class WeightSink(WeightTransferEngine[SinkInit, SinkUpdate]):
    """Writes this worker's own slices into the model; no tensor is ever whole here."""

    init_info_cls = SinkInit
    update_info_cls = SinkUpdate
    supports_draft_weight_update = False

    _transport = None
    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: SinkInit) -> None:
        """Meet the learner anew, whatever was before.

        Raises:
            TransferError: somebody did not come, or this worker's model is not the one the learner wants to fill.
        """
        self.shutdown()
        worker = self.parallel_config.rank
        ranks = self.parallel_config.tensor_parallel_size
        layout = LearnerLayout(**init_info.learner)
        roster = Roster(senders=layout.ranks, generators=init_info.generators, tensor_parallel=ranks)
        self._transport = open_transport(
            init_info.transport,
            join_store(init_info.host, init_info.port, init_info.timeout_s),
            roster,
            roster.worker_rank(init_info.replica, worker),
            session=init_info.session,
            timeout_s=init_info.timeout_s,
            device=self.device,
        )
        plan, error = self._plan(init_info, layout, ranks)
        agree(self._transport, roster, plan.fingerprint if plan else "", error)
        assert plan is not None  # or it would not have been agreed on
        self._receiver = Receiver(plan, roster, self._transport)

    def _plan(self, init_info: SinkInit, layout: LearnerLayout, ranks: int) -> tuple[TransferPlan | None, str | None]:
        """The plan from this worker's point of view, or why it cannot take part: the learner must hear of it."""
        try:
            arch = architecture_of_hf(Path(self.model_config.model))
            plan = plan_transfer(arch, layout, ranks, dtype=init_info.dtype, staging_bytes=init_info.staging_bytes)
            self._target = WorkerModel(self.model)
            self._target.check(arch, ranks, self.parallel_config.rank, init_info.dtype)
        except AsyncRLHFError as error:
            return None, str(error)
        return plan, None

    def start_weight_update(self) -> None:
        if self._receiver is None:
            raise TransferError("a push came before the rendezvous with the learner")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator after this, which a CPU worker does not have; `Receiver` has
        # hashed, so read, every parameter when it returns.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SinkUpdate) -> None:
        try:
            assert self._receiver is not None  # `start_weight_update` has looked
            self._receiver.receive(self._target, verify=update_info.verify)
        except BaseException:
            self.shutdown()
            raise

    def finish_weight_update(self) -> None:
        """Nothing is left to do: every parameter was put to use when its last slice was in."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Abstract in vLLM before 0.30; there is nothing to call: the learner sends with `weights.send`."""
        raise NotImplementedError("the learner sends with megatron_async_rlhf.weights.send")

    def shutdown(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._transport = self._receiver = None
