"""Commands the controller sends to the learner, and what it answers. No torch: both sides import it.

The learner is a group of SPMD ranks; rank 0 receives a command, all ranks execute it, rank 0 answers. Commands
are executed one at a time in the order they were sent, except BeginPush.
"""

import signal
from typing import Literal, Protocol

import msgspec
from msgspec import Struct

from megatron_async_rlhf.types import PushReport, Sequence, Span, StepMetrics, TokenizedPair, TrainingGroup

WAITING_MESSAGES = 8  # on either side of the connection: a rollout's pieces must not pile up
DUMP_STACKS = signal.SIGUSR1  # to a rank: write where every thread is into the log


class Command(Struct, frozen=True, kw_only=True, tag=True):
    """Base of all commands; `id` pairs an answer with its question."""

    id: int = 0


class WaitUntilReady(Command, frozen=True, kw_only=True, tag=True):
    """Answers as soon as the model is built on every rank."""


class StartSupervised(Command, frozen=True, kw_only=True, tag=True):
    """A fresh optimizer for `steps` steps of supervised fine-tuning, a stage of its own."""

    steps: int


class ResumeSupervised(Command, frozen=True, kw_only=True, tag=True):
    """Instead of StartSupervised: continues from a checkpoint, after the steps that it has made."""

    checkpoint: str
    steps: int


class TrainSupervised(Command, frozen=True, kw_only=True, tag=True):
    """The `step`-th optimizer step of the warm start or of supervised fine-tuning."""

    step: int
    sequences: list[Sequence]


class EvaluateSupervised(Command, frozen=True, kw_only=True, tag=True):
    """The loss of TrainSupervised on these sequences, nothing changed."""

    sequences: list[Sequence]


class StartPairs(Command, frozen=True, kw_only=True, tag=True):
    """A fresh optimizer for `steps` steps on preference pairs."""

    steps: int


class TrainPairs(Command, frozen=True, kw_only=True, tag=True):
    """The `step`-th optimizer step of a reward model."""

    step: int
    pairs: list[TokenizedPair]


class ScoreRewards(Command, frozen=True, kw_only=True, tag=True):
    """A reward model's reward of each sequence, read at its last token."""

    sequences: list[list[int]]


class StartReinforcement(Command, frozen=True, kw_only=True, tag=True):
    """Makes the policy version 0, with a fresh optimizer: also the reference and the start of a value model, if the
    algorithm has them."""


class ResumeReinforcement(Command, frozen=True, kw_only=True, tag=True):
    """Instead of StartReinforcement: continues from a checkpoint, at its policy version.

    Attributes:
        checkpoint: directory that SaveCheckpoint wrote, in whatever layout.
        reference: directory with the reference policy's weights; None: the policy this learner was built with.
    """

    checkpoint: str
    reference: str | None


class TrainRollout(Command, frozen=True, kw_only=True, tag=True):
    """Optimizer steps of RL on one rollout: each mini-batch once per epoch, each time a new policy version.

    Attributes:
        version: the version the learner must be at; anything else is a bug and an error.
        mini_batches: the groups of each. One without groups has nothing to teach: the version advances, nothing changes.
        epochs: how often to go over the mini-batches.
    """

    version: int
    mini_batches: list[list[TrainingGroup]]
    epochs: int = 1


class RolloutHeader(Command, frozen=True, kw_only=True, tag=True):
    """TrainRollout on the wire: what every rank must know of it. Its samples follow in pieces, see `learner.rollout`.

    Attributes:
        groups: how many samples each group has, by mini-batch.
        sampled: whether all samples of a mini-batch bring the sampler's log-probabilities.
        rewards, lengths, prompt_lengths: of each sample of all mini-batches, one after the other.
    """

    version: int
    epochs: int
    groups: list[list[int]]
    sampled: list[bool]
    rewards: list[float]
    lengths: list[int]
    prompt_lengths: list[int]


class Score(Command, frozen=True, kw_only=True, tag=True):
    """Log-probabilities of completions under the policy as it is, at the sampling temperature."""

    sequences: list[Sequence]


class JoinTransfer(Command, frozen=True, kw_only=True, tag=True):
    """Rendezvous of every learner rank with the generators' workers; rank 0 listens on `host:port`.

    Attributes:
        session: a name no earlier rendezvous of this run had; all members give the same.
        generators: the replicas that take part, in the order weights travel along them.
    """

    host: str
    port: int
    session: str
    generators: list[str]


class PushWeights(Command, frozen=True, kw_only=True, tag=True):
    """Start sending the policy to every generator; answered at once. Training may continue until it changes weights.

    Attributes:
        offered: send only when BeginPush comes; if none has come before weights change, the push is dropped.
    """

    version: int
    verify: bool
    offered: bool = False


class BeginPush(Command, frozen=True, kw_only=True, tag=True):
    """Begin the push of `version` that was offered; the answer's `begun` is false if it has been dropped.

    Executed at once, also while another command is: it goes to the `begin_at` of a push's answer.
    """

    version: int


class FinishPush(Command, frozen=True, kw_only=True, tag=True):
    """Wait for the push under way, which is not one that was dropped; the answer carries its report."""


class SaveCheckpoint(Command, frozen=True, kw_only=True, tag=True):
    """Start writing all that training needs to continue; answered as soon as training may continue.

    Attributes:
        checkpoint: directory to write into, made if need be.
        reference: directory for the reference policy's weights, if they are to be written too.
        snapshot: write from a copy; without it no weight may change before the save is finished.
    """

    checkpoint: str
    reference: str | None
    snapshot: bool


class FinishCheckpoint(Command, frozen=True, kw_only=True, tag=True):
    """Ask for the end of the save under way; never waits for it. The answer's `saved` says whether it is complete."""


class ExportWeights(Command, frozen=True, kw_only=True, tag=True):
    """Write the policy as Hugging Face safetensors into `directory` (config and tokenizer are already there)."""

    directory: str


class Stop(Command, frozen=True, kw_only=True, tag=True):
    """End the learner's processes cleanly."""


# What a learner receives in turn.
AnyCommand = (
    WaitUntilReady
    | StartSupervised
    | ResumeSupervised
    | TrainSupervised
    | EvaluateSupervised
    | StartPairs
    | TrainPairs
    | ScoreRewards
    | StartReinforcement
    | ResumeReinforcement
    | RolloutHeader
    | Score
    | JoinTransfer
    | PushWeights
    | FinishPush
    | SaveCheckpoint
    | FinishCheckpoint
    | ExportWeights
    | Stop
)


class Answer(Struct, frozen=True, kw_only=True):
    """The learner's answer to the command with the same `id`; `error` is one line, or None."""

    id: int
    error: str | None = None
    error_kind: Literal["", "non_finite", "transfer", "write"] = ""
    metrics: StepMetrics | None = None  # of TrainSupervised, EvaluateSupervised and TrainPairs
    steps: list[StepMetrics] = []  # of TrainRollout, one per optimizer step
    # of each sequence's completion tokens, in the command's order, before any update the command made; of a rollout
    # those of its first mini-batch
    logprobs: list[list[float]] = []
    rewards: list[float] = []  # of ScoreRewards, in the command's order
    push: PushReport | None = None
    begin_at: str = ""  # of PushWeights: ZeroMQ address for BeginPush
    begun: bool = False  # of BeginPush
    saved: bool = False
    spans: list[Span] = []


encode_command = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(AnyCommand).decode
decode_begin_push = msgspec.msgpack.Decoder(BeginPush).decode
encode_answer = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


class Learner(Protocol):
    """The controller's view of a learner: one method, whatever is behind it.

    Raises:
        LearnerError: the command failed or no answer came within the configured timeout.
    """

    async def execute(self, command: Command) -> Answer: ...


def rollout_span(command: TrainRollout, start: float, end: float) -> Span:
    """The learner made the steps of a rollout."""
    updates = len(command.mini_batches) * command.epochs
    first, last = command.version + 1, command.version + updates
    sequences = [sequence for batch in command.mini_batches for group in batch for sequence in group.sequences]
    args: dict[str, int | float] = {
        "version": last,
        "samples": len(sequences),
        "tokens": sum(len(sequence.token_ids) - sequence.prompt_length for sequence in sequences),
    }
    name = f"step {first}" if first == last else f"steps {first} to {last}"
    return Span(name=name, start=start, end=end, process="learner", args=args)
