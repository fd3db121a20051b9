"""The learner of a reward model as one rank sees it: the model, its optimizer, and a method per command.

A sequence's reward is what the score head makes of its last token: where Transformers'
classes for sequence classification and vLLM's pooling read it too. A position stands for the token it predicts from, so a
sequence is laid with one more token behind it, which the model never sees:

    tokens   prompt  completion <end>
    target                        *      the one position whose number is read

The loss needs both sequences of a pair, so they stay in one micro-batch.
Shape legend: T tokens of a micro-batch's row, S sequences in it, P pairs in it.
"""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch

from megatron_async_rlhf.algorithms.reward_modelling import bradley_terry_loss
from megatron_async_rlhf.config.reward_modelling import RewardModellingSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import LearnerError
from megatron_async_rlhf.formats.open_weights import open_weights
from megatron_async_rlhf.formats.score_head import HF_HEAD, WithScoreHead
from megatron_async_rlhf.formats.stored import WeightReader
from megatron_async_rlhf.learner.megatron.model import build_model
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch, make_mini_batch
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.peak import peak_flops
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss, Passes, read_values
from megatron_async_rlhf.learner.megatron.training.trained_model import ModelStep, TrainedModel, training_step
from megatron_async_rlhf.learner.megatron.transfer.export import write_gathered
from megatron_async_rlhf.learner.megatron.transfer.weights import RandomWeights, gather_weights, load_weights
from megatron_async_rlhf.learner.meter import Meter
from megatron_async_rlhf.learner.protocol import (
    Answer,
    AnyCommand,
    ExportWeights,
    ScoreRewards,
    StartPairs,
    TrainPairs,
    WaitUntilReady,
)
from megatron_async_rlhf.learner.rollout import Samples
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.flops import forward_flops
from megatron_async_rlhf.types import Sequence, StepMetrics, TokenizedPair


class RewardModelLearner:
    """A reward model of one rank, and its training."""

    def __init__(self, config: RunConfig, arch: Architecture, placement: Placement) -> None:
        """
        Args:
            arch: with a score head; the weights in `model.hf` need not have one.
        """
        self.config, self.arch, self.placement = config, arch, placement
        self.version = 0  # optimizer steps
        self._keys: RewardModellingSection = config.reward_modelling
        self._meter = Meter(f"learner.{placement.rank}", placement.synchronize)
        self.chunks = build_model(arch, placement, config.learner)
        load_weights(self.chunks, arch, placement, starting_weights(config, arch))
        self.model = TrainedModel(self.chunks, config.learner, self._meter)
        self._passes = Passes(placement, read_values)
        self._peak_flops = peak_flops(config)

    def execute(self, command: AnyCommand) -> Answer:
        """
        Raises:
            LearnerError: the command is none of a reward model's, or fails.
        """
        match command:
            case WaitUntilReady():
                return self._answer(command.id)
            case StartPairs():
                self.model.restart(self._keys, command.steps)
                return self._answer(command.id)
            case TrainPairs():
                return self.train_pairs(command)
            case ScoreRewards():
                return self.score_rewards(command)
            case ExportWeights():
                return self.export_weights(command)
        raise LearnerError(f"a reward model's learner has no command {type(command).__name__}")

    def train_pairs(self, command: TrainPairs) -> Answer:
        """One step on `command.pairs`."""
        sequences = [tokens for pair in command.pairs for tokens in (pair.chosen, pair.rejected)]
        mini_batch, lengths = self._lay(sequences, together=2), list(map(len, sequences))
        if not sequences:
            raise LearnerError(f"reward model step {command.step}: there are no pairs to learn from")
        lesson = ModelStep(model=self.model, passes=self._passes, loss=self._loss(command.pairs))
        what = f"reward model step {command.step}"
        (metrics,) = training_step([lesson], mini_batch.batches, _nothing_to_wait_for, what)
        self.version = command.step
        flops = 3 * forward_flops(self.arch, lengths, len(lengths))  # backward counts as two
        metrics |= {"num_pairs": float(len(command.pairs))}
        metrics |= self._meter.step_metrics(sum(lengths), flops, self._peak_flops)
        return self._answer(command.id, metrics=StepMetrics(values=metrics))

    def score_rewards(self, command: ScoreRewards) -> Answer:
        """The reward of each sequence."""
        mini_batch = self._lay(command.sequences, together=1)
        self.model.gather_parameters()
        with self._meter.span("score"):
            passes = self._passes.forward_pass(self.chunks, mini_batch.batches)
            for batch, values_T in zip(mini_batch.batches, passes, strict=False):
                batch.values_T = values_T
            rewards = mini_batch.sum_completions(lambda batch: batch.values_T)
        return self._answer(command.id, rewards=rewards.tolist())

    def export_weights(self, command: ExportWeights) -> Answer:
        """As `write_gathered`."""
        self.model.gather_parameters()
        with self._meter.span("export"):
            stream = gather_weights(self.chunks, self.arch, self.placement)
            dtype = self.config.learner.weights_dtype
            write_gathered(Path(command.directory), stream, self.arch, dtype, self.placement)
        return self._answer(command.id)

    def close(self) -> None:
        """Nothing: it has no groups of its own."""

    def _loss(self, pairs: Seq[TokenizedPair]) -> MicroLoss:
        margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64).repeat_interleave(2)

        def loss(batch: MicroBatch, values_T: torch.Tensor):
            rewards_S = batch.completions.sum(values_T)
            return bradley_terry_loss(
                rewards_S[0::2],
                rewards_S[1::2],
                batch.is_real_S[0::2].to(rewards_S),
                margin_P=batch.pick(margins)[0::2] if self._keys.margin else None,
                center_coefficient=self._keys.center_coefficient,
                num_pairs=len(pairs),
            )

        return loss

    def _lay(self, sequences: Seq[list[int]], *, together: int) -> MiniBatch:
        """Each sequence with the token behind its last one, which alone counts as its completion."""
        rows = [Sequence(token_ids=[*tokens, tokens[-1]], prompt_length=len(tokens)) for tokens in sequences]
        samples, budget = Samples.of_sequences(rows), self.config.learner.micro_batch_tokens
        return make_mini_batch(samples, self.placement, together=together, budget=budget, needs_sampler=False)

    def _answer(self, command_id: int, **fields: Any) -> Answer:
        return Answer(id=command_id, spans=self._meter.take(), **fields)


def starting_weights(config: RunConfig, arch: Architecture) -> WeightReader:
    """What a reward model starts from; a head that `model.hf` lacks is drawn from the seed, the same in every layout.

    Raises:
        CheckpointError: no weights in `model.hf`.
    """
    drawn, hf = RandomWeights(arch, config.run.seed), config.model.hf
    if hf is None:
        return drawn
    head = torch.empty(1, arch.hidden_size)
    drawn.read_into(head, HF_HEAD, 0, 0)
    return WithScoreHead(open_weights(hf), head)


def _nothing_to_wait_for() -> None:
    """Before weights change: no push reads them."""
