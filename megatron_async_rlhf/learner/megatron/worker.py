"""One learner process: joins its group, then executes the controller's commands until told to stop.

    rank 0:       receive command -> broadcast it -> execute -> answer
    other ranks:                     receive it   -> execute

A rollout is too large for that: only its sizes are broadcast, and its samples go to the ranks that train on them.

Started once per rank with the environment `torchrun` or `srun` gives (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT):
`python -m megatron_async_rlhf.learner.megatron.worker --run-dir runs/x --listen tcp://127.0.0.1:5555`.

An error every rank raises alike (a `LearnerError` or a failed push) is answered; anything else ends this process,
and with it the run, because the other ranks may be waiting inside a collective.
"""

import argparse
import faulthandler
import logging
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import zmq

from megatron_async_rlhf.config.beats import IDLE_BEAT_S
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import LearnerError, NonFiniteLossError, TransferError, WriteError
from megatron_async_rlhf.learner.megatron.distribution import receive_rollout
from megatron_async_rlhf.learner.megatron.layers.spec import fused_parts
from megatron_async_rlhf.learner.megatron.learner import MegatronLearner
from megatron_async_rlhf.learner.megatron.parallel import Placement, join_learner
from megatron_async_rlhf.learner.megatron.reward_learner import RewardModelLearner
from megatron_async_rlhf.learner.protocol import (
    DUMP_STACKS,
    WAITING_MESSAGES,
    Answer,
    AnyCommand,
    EvaluateSupervised,
    ExportWeights,
    FinishCheckpoint,
    FinishPush,
    JoinTransfer,
    PushWeights,
    ResumeReinforcement,
    ResumeSupervised,
    RolloutHeader,
    SaveCheckpoint,
    Score,
    StartReinforcement,
    StartSupervised,
    Stop,
    TrainSupervised,
    WaitUntilReady,
    decode_command,
    encode_answer,
)
from megatron_async_rlhf.learner.rollout import Rollout
from megatron_async_rlhf.models.architecture import policy_architecture
from megatron_async_rlhf.run_secret import as_server
from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR, RESOLVED_CONFIG

_log = logging.getLogger(__name__)


class CommandChannel:
    """The controller's commands, the same on every rank, and a rollout's samples, each rank its own."""

    def __init__(self, placement: Placement, listen: str) -> None:
        self._placement = placement
        self._socket: zmq.Socket[bytes] | None = None
        if placement.rank == 0:
            self._socket = zmq.Context.instance().socket(zmq.PAIR)
            self._socket.set_hwm(WAITING_MESSAGES)
            as_server(self._socket)
            self._socket.bind(listen)

    def receive(self) -> AnyCommand:
        """Block until the controller sends something."""
        while True:
            raw = self._broadcast(self._poll())
            if raw:
                return decode_command(raw)

    def receive_rollout(
        self, header: RolloutHeader, *, unit: int, budget: int, share: bool, timeout_s: float
    ) -> Rollout:
        """The samples that follow a header; see `distribution.receive_rollout`."""
        return receive_rollout(
            header, lambda: self._next_piece(timeout_s), self._placement, unit=unit, budget=budget, share=share
        )

    def answer(self, answer: Answer) -> None:
        if self._socket:
            self._socket.send(encode_answer(answer))

    def _next_piece(self, timeout_s: float) -> bytes:
        """On rank 0."""
        assert self._socket is not None
        if not self._socket.poll(int(timeout_s * 1000)):
            raise TimeoutError(f"the rest of a rollout did not come within learner.timeout_s = {timeout_s:g} s")
        return self._socket.recv()

    def _poll(self) -> bytes:
        """Empty if nothing came yet, and on other ranks than 0."""
        if self._socket is None or not self._socket.poll(int(IDLE_BEAT_S * 1000)):
            return b""
        return self._socket.recv()

    def _broadcast(self, raw: bytes) -> bytes:
        if dist.get_world_size() == 1:
            return raw
        size = torch.tensor([len(raw)])
        dist.broadcast(size, src=0, group=self._placement.control)
        if not size.item():
            return b""
        buffer = (
            torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(size.item(), dtype=torch.uint8)
        )
        dist.broadcast(buffer, src=0, group=self._placement.control)
        return buffer.numpy().tobytes()

    def close(self) -> None:
        if self._socket:
            self._socket.close(linger=1000)


def serve(execute: Callable[[AnyCommand], Answer], channel: CommandChannel) -> None:
    """Execute commands until `Stop`."""
    while True:
        command = channel.receive()
        if isinstance(command, Stop):
            channel.answer(Answer(id=command.id))
            return
        try:
            answer = execute(command)
        except NonFiniteLossError as error:
            answer = Answer(id=command.id, error=str(error), error_kind="non_finite")
        except WriteError as error:
            answer = Answer(id=command.id, error=str(error), error_kind="write")
        except TransferError as error:
            answer = Answer(id=command.id, error=str(error), error_kind="transfer")
        except LearnerError as error:
            answer = Answer(id=command.id, error=str(error))
        if answer.error:
            _log.error("%s: %s", type(command).__name__, answer.error)
        channel.answer(answer)


def _execute(learner: MegatronLearner, channel: CommandChannel, command: AnyCommand) -> Answer:
    match command:
        case WaitUntilReady():
            return Answer(id=command.id)
        case StartSupervised():
            learner.start_supervised(command)
            return Answer(id=command.id)
        case ResumeSupervised():
            return learner.resume_supervised(command)
        case TrainSupervised():
            return learner.train_supervised(command)
        case EvaluateSupervised():
            return learner.evaluate_supervised(command)
        case StartReinforcement():
            learner.start_reinforcement()
            return Answer(id=command.id)
        case ResumeReinforcement():
            return learner.resume_reinforcement(command)
        case RolloutHeader():
            rollout = channel.receive_rollout(
                command,
                unit=learner.config.algorithm.sequences_together,
                budget=learner.config.learner.micro_batch_tokens,
                share=learner.config.learner.share_prompts,
                timeout_s=learner.config.learner.timeout_s,
            )
            return learner.train_rollout(rollout)
        case Score():
            return learner.score(command)
        case JoinTransfer():
            return learner.join_transfer(command)
        case PushWeights():
            return learner.push_weights(command)
        case FinishPush():
            return learner.finish_push(command)
        case SaveCheckpoint():
            return learner.save_checkpoint(command)
        case FinishCheckpoint():
            return learner.finish_checkpoint(command)
        case ExportWeights():
            return learner.export_weights(command)
    raise LearnerError(f"no such command: {type(command).__name__}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--listen", required=True, help="ZeroMQ address rank 0 takes commands on")
    parser.add_argument("--reward-model", action="store_true", help="train a reward model, and no policy")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Where every thread is, in the log: asked for when the learner is silent, and who does not react is the cause.
    faulthandler.register(DUMP_STACKS, all_threads=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        # A scheduler sends them to all of a job, and a checkpoint takes every rank; the supervisor ends us otherwise.
        signal.signal(number, signal.SIG_IGN)
    start = time.monotonic()
    config = load_config(arguments.run_dir / RESOLVED_CONFIG)
    arch = policy_architecture(config.model, arguments.run_dir / POLICY_TEMPLATE_DIR)
    placement = join_learner(config.learner, config.run.device)
    learner: MegatronLearner | RewardModelLearner
    if arguments.reward_model:
        learner = RewardModelLearner(config, arch.with_score_head(), placement)
    else:
        learner = MegatronLearner(config, arch, placement)
    _log.info("; ".join(f"{part}: {what}" for part, what in fused_parts(placement.device).items()))
    _log.info("rank %d of %d ready after %.1f s", placement.rank, dist.get_world_size(), time.monotonic() - start)
    channel = CommandChannel(placement, arguments.listen)
    own = learner.execute if isinstance(learner, RewardModelLearner) else partial(_execute, learner, channel)
    serve(own, channel)
    learner.close()
    channel.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
