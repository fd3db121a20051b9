"""Weight pushes on one learner rank: joins the transfer group, sends in the background, tells when weights may change.

PushWeights: start a thread that sends, from a copy if there is to be a snapshot       (the answer comes at once)
             the push is offered: it packs what it can, waits for BeginPush, and gives up if the weights change before
training:    forward and backward continue; the optimizer's step waits until the thread has read the weights
FinishPush:  wait for the thread; all ranks learn whether any failed
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event

import torch
import torch.distributed as dist
from msgspec import Struct

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import LearnerError, TransferError
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.plain_values import of_all_ranks
from megatron_async_rlhf.learner.megatron.transfer.push_offers import PushOffers
from megatron_async_rlhf.learner.protocol import JoinTransfer
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.types import PushReport, Span
from megatron_async_rlhf.weights.blame import root_cause
from megatron_async_rlhf.weights.messages import agree
from megatron_async_rlhf.weights.plan import configured_transfer
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.send import Sender
from megatron_async_rlhf.weights.transports.open import open_transport
from megatron_async_rlhf.weights.transports.rendezvous import host_store, join_store
from megatron_async_rlhf.weights.transports.transport import Transport

Parameters = dict[str, torch.nn.Parameter]  # see `weights.named_parameters`


class _Ending(Struct, frozen=True):
    """How a push ended on one rank: a report or an error, and when."""

    report: PushReport | None
    error: str | None
    start: float
    end: float


class _Sending:
    """A push that was started or offered.

    Attributes:
        weights_read: nothing reads the weights any more.
        dropped: the offer was not taken; known once `weights_read` is set.
        began: when sending began or was given up; 0 before.
        ending: to be waited for.
    """

    ending: Future[_Ending]

    def __init__(self, *, offered: bool) -> None:
        self.offered = offered
        self.weights_read = Event()
        self.dropped = False
        self.began = 0.0


class WeightPush:
    """This rank's connection to the generators. Collective over the learner: every rank makes the same calls."""

    def __init__(self, config: RunConfig, arch: Architecture, placement: Placement, parameters: Parameters) -> None:
        self._config, self._arch, self._placement = config, arch, placement
        self._parameters = parameters
        self._store: dist.Store | None = None  # on rank 0: the rendezvous outlives the groups that meet through it
        self._sender: Sender | None = None
        self._transport: Transport | None = None
        self._thread = ThreadPoolExecutor(1, "weight-push", _take_device, (placement.device,))
        self._offers = PushOffers(placement, config.learner.timeout_s)
        self._under_way: _Sending | None = None
        # Beside the training's stream, so that both run at once.
        self._stream = torch.cuda.Stream(placement.device) if placement.device.type == "cuda" else None

    def join(self, command: JoinTransfer) -> None:
        """Meet the generators' workers anew, whatever was before.

        Raises:
            TransferError: the same on every rank.
        """
        self._leave()
        error = None
        try:
            self._join(command)
        except TransferError as failure:
            error = str(failure)
        self._agree(error, now())

    def start(self, *, verify: bool, offered: int | None = None) -> str:
        """Begin sending the weights as they are now, or offer to send them as this version.

        Returns the address for BeginPush, on rank 0.

        Raises:
            LearnerError: not connected, or the push before was not finished.
            TransferError: the connection was lost in an earlier push.
        """
        if self._sender is None:
            raise LearnerError("PushWeights came before JoinTransfer: no generator is connected")
        if self._under_way is not None:
            raise LearnerError("PushWeights came before the push under way was finished with FinishPush")
        if offered is not None:
            self._offers.make(offered)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # for the optimizer's step
        self._under_way = sending = _Sending(offered=offered is not None)
        sending.ending = self._thread.submit(self._send, sending, self._sender, verify)
        return self._offers.address

    def wait_until_weights_may_change(self) -> None:
        """Returns when no push reads the parameters any more; drops one that only was offered. `finish` tells errors."""
        if self._under_way is None:
            return
        self._offers.withdraw()
        self._under_way.weights_read.wait()
        if self._under_way.dropped:
            self._under_way = None

    def finish(self) -> tuple[PushReport, Span]:
        """The push under way, once it has ended.

        Raises:
            TransferError: the same on every rank: the first that failed, wherever that was.
        """
        if self._under_way is None:
            raise LearnerError("FinishPush came without PushWeights")
        ending, self._under_way = self._under_way.ending.result(), None
        self._agree(ending.error, ending.end)
        report, process = ending.report, f"learner.{self._placement.rank}"
        assert report is not None  # without one there is an error
        args: dict[str, int | float] = {"bytes": report.wire_bytes, "digests": report.compared}
        return report, Span(name="push", start=ending.start, end=ending.end, process=process, lane="push", args=args)

    def close(self) -> None:
        """Leave the generators for good; a push under way fails. An interpreter that ends with an NCCL communicator open
        may hang in it, or crash."""
        self._offers.close()
        self._leave()
        self._thread.shutdown()
        self._store = None

    def _join(self, command: JoinTransfer) -> None:
        config, placement = self._config, self._placement
        self._offers.listen(command.host)  # whether there will be an offer ever, nobody knows
        roster = Roster(
            senders=placement.layout.ranks,
            generators=command.generators,
            tensor_parallel=config.generator.tensor_parallel,
        )
        timeout_s = config.weights.timeout_s
        if placement.rank == 0:
            self._store = self._store or host_store(command.host, command.port, timeout_s)
            store = self._store
        else:
            store = join_store(command.host, command.port, timeout_s)
        self._transport = transport = open_transport(
            config.weights.transport,
            store,
            roster,
            placement.rank,
            session=command.session,
            timeout_s=timeout_s,
            device=placement.device,
        )
        plan = configured_transfer(config, self._arch)
        agree(transport, roster, plan.fingerprint)
        self._sender = Sender(plan, roster, transport)

    def _send(self, sending: _Sending, sender: Sender, verify: bool) -> _Ending:
        report = error = None
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                report = sender.push(self._weights().__getitem__, verify=verify, begin=lambda: self._begin(sending))
        except TransferError as failure:
            error = str(failure)
            if not sending.began:  # the other ranks hear the verdict together with this one
                self._begin(sending)
        finally:
            self._all_read(sending)
        return _Ending(report, error, sending.began, now())

    def _begin(self, sending: _Sending) -> bool:
        """Whether what has been packed is to be sent."""
        if sending.offered:
            sending.dropped = not self._offers.verdict()
        sending.began = now()
        if self._config.weights.snapshot:
            self._all_read(sending)
        return not sending.dropped

    def _weights(self) -> dict[str, torch.Tensor]:
        copied = self._config.weights.snapshot
        return {name: p.detach().clone() if copied else p.detach() for name, p in self._parameters.items()}

    def _all_read(self, sending: _Sending) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        sending.weights_read.set()

    def _leave(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._sender = self._transport = None

    def _agree(self, error: str | None, when: float) -> None:
        """All ranks fail, with the same error, if one did."""
        gathered = of_all_ranks((when, error), tuple[float, str | None], self._placement.control)
        errors = [message for _, message in sorted(gathered, key=lambda pair: pair[0]) if message]
        if errors:
            self._leave()
            raise TransferError(root_cause(errors))


def _take_device(device: torch.device) -> None:
    """A new thread is on the first GPU, where `torch.cuda.stream` would make a context when it ends."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
