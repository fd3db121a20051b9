"""The learner as one rank sees it: policy, policy version, what RL adds to them, and a method per command.

All ranks run the same methods in the same order; what differs by rank is decided by `Placement`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_async_rlhf.algorithms.supervised import supervised_loss
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import LearnerError
from megatron_async_rlhf.formats.checkpoint_weights import CheckpointWeights
from megatron_async_rlhf.formats.open_weights import open_weights
from megatron_async_rlhf.learner.megatron.model import build_model
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.peak import peak_flops
from megatron_async_rlhf.learner.megatron.state.background_save import BackgroundSave
from megatron_async_rlhf.learner.megatron.state.host_copy import on_host
from megatron_async_rlhf.learner.megatron.state.training_state import (
    load_training_state,
    training_state,
    weights_state,
)
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch, cut_micro_batches
from megatron_async_rlhf.learner.megatron.training.reinforcement import Reinforcement
from megatron_async_rlhf.learner.megatron.training.steps import (
    Passes,
    gather_policy_logprobs,
    read_logprobs,
    sum_over_replicas,
)
from megatron_async_rlhf.learner.megatron.training.trained_model import ModelStep, TrainedModel, training_step
from megatron_async_rlhf.learner.megatron.transfer.export import write_gathered
from megatron_async_rlhf.learner.megatron.transfer.weight_push import WeightPush
from megatron_async_rlhf.learner.megatron.transfer.weights import (
    RandomWeights,
    gather_weights,
    load_weights,
    named_parameters,
)
from megatron_async_rlhf.learner.meter import Meter
from megatron_async_rlhf.learner.protocol import (
    Answer,
    EvaluateSupervised,
    ExportWeights,
    FinishCheckpoint,
    FinishPush,
    JoinTransfer,
    PushWeights,
    ResumeReinforcement,
    ResumeSupervised,
    SaveCheckpoint,
    Score,
    StartSupervised,
    TrainSupervised,
)
from megatron_async_rlhf.learner.rollout import Rollout, Samples
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.flops import forward_flops, rollout_flops
from megatron_async_rlhf.types import StepMetrics


class MegatronLearner:
    """Policy and policy version of one rank, and once RL has begun what that needs beside them."""

    def __init__(self, config: RunConfig, arch: Architecture, placement: Placement) -> None:
        self.config = config
        self.arch = arch
        self.placement = placement
        self.version = 0
        self._meter = Meter(f"learner.{placement.rank}", placement.synchronize)
        self.chunks = build_model(arch, placement, config.learner)
        hf = config.model.hf
        load_weights(self.chunks, arch, placement, open_weights(hf) if hf else RandomWeights(arch, config.run.seed))
        self.policy = TrainedModel(self.chunks, config.learner, self._meter)
        self.reinforcement: Reinforcement | None = None
        self._peak_flops = peak_flops(config)
        # After the wrapper, which moves the parameters into its own buffer if it shards the optimizer.
        self._push = WeightPush(config, arch, placement, named_parameters(self.chunks))
        self._save = BackgroundSave(placement)
        self._passes = self._passes_at(config.generator.temperature)
        # Supervised steps imitate text; only RL sees the policy through the sampling temperature.
        self._supervised_passes = self._passes_at(1.0)
        self.policy.restart(config.warm_start, max(config.warm_start.steps, 1))

    def start_supervised(self, command: StartSupervised) -> None:
        """Begin supervised fine-tuning, after which the policy's version is the number of its steps."""
        self._restart_supervised(command.steps)
        self.version = 0

    def resume_supervised(self, command: ResumeSupervised) -> Answer:
        """Continue from a checkpoint: weights, optimizer, and the steps that were made."""
        self._restart_supervised(command.steps)
        self.version = load_training_state(Path(command.checkpoint), [self.policy], self.placement.control)
        return self._answer(command.id)

    def train_supervised(self, command: TrainSupervised) -> Answer:
        """One supervised step over `command.sequences`."""
        samples = Samples.of_sequences(command.sequences)
        batches, num_tokens = self._cut(samples), samples.completion_tokens
        if not num_tokens:
            raise LearnerError(f"supervised step {command.step}: no sequence has an answer to learn from")

        def loss(batch: MicroBatch, logprobs_T: torch.Tensor):
            return supervised_loss(logprobs_T, batch.mask_T, num_tokens=num_tokens)

        lesson = ModelStep(model=self.policy, passes=self._supervised_passes, loss=loss)
        (metrics,) = training_step([lesson], batches, self._wait_for_push, f"supervised step {command.step}")
        self.version = command.step
        lengths = _positions([samples])
        flops = 3 * forward_flops(self.arch, lengths, num_tokens)  # backward counts as two
        metrics |= self._meter.step_metrics(sum(lengths), flops, self._peak_flops)
        return self._answer(command.id, metrics)

    def evaluate_supervised(self, command: EvaluateSupervised) -> Answer:
        """Mean negative log-likelihood of the answers' tokens, and how many there are."""
        samples = Samples.of_sequences(command.sequences)
        batches, total = self._cut(samples), torch.zeros(1, dtype=torch.float64)
        self.gather_parameters()
        with self._meter.span("evaluate"):
            passes = self._supervised_passes.forward_pass(self.chunks, batches)
            for batch, logprobs_T in zip(batches, passes, strict=False):
                total -= logprobs_T[batch.mask_T].double().sum().cpu()
            total = sum_over_replicas(total, self.placement)
        num_tokens = samples.completion_tokens
        return self._answer(command.id, {"loss": float(total) / num_tokens, "tokens": float(num_tokens)})

    def start_reinforcement(self) -> None:
        """Freeze a copy of the policy as the reference, if there is to be one; begin RL at version 0."""
        self.gather_parameters()
        self._begin_reinforcement()
        self.version = 0

    def resume_reinforcement(self, command: ResumeReinforcement) -> Answer:
        """Continue from a checkpoint: its version, weights and optimizer state, the reference it was trained against."""
        if command.reference is not None:
            reader = CheckpointWeights(Path(command.reference), self.arch)
            load_weights(self.chunks, self.arch, self.placement, reader)
        self.version = self._begin_reinforcement().load(Path(command.checkpoint))
        return self._answer(command.id)

    def save_checkpoint(self, command: SaveCheckpoint) -> Answer:
        """Start writing a checkpoint, and the reference policy if it is asked for."""
        with self._meter.span("start checkpoint"):
            states = {}
            if command.reference is not None:
                with self._started("SaveCheckpoint with a reference").reference_chunks() as chunks:
                    states[Path(command.reference)] = on_host(weights_state(chunks))
            states[Path(command.checkpoint)] = self._state(snapshot=command.snapshot)
            self._save.start(states)
        return self._answer(command.id)

    def finish_checkpoint(self, command: FinishCheckpoint) -> Answer:
        """Complete the checkpoint if every rank's files are written."""
        span = self._save.finish()
        if span is not None:
            self._meter.add(span)
        return self._answer(command.id, saved=span is not None)

    def train_rollout(self, rollout: Rollout) -> Answer:
        """An optimizer step per mini-batch and epoch; one without groups advances the version and changes nothing."""
        rl = self._started("TrainRollout")
        if rollout.version != self.version:
            raise LearnerError(f"asked to train policy version {rollout.version}, but the learner is at {self.version}")
        steps: list[dict[str, float]] = []
        logprobs: list[list[float]] = []
        for metrics, logprobs_before in rl.updates(rollout.mini_batches, rollout.epochs, self.version):
            self.version += 1
            steps.append(metrics)
            logprobs = logprobs or logprobs_before
        self._push.wait_until_weights_may_change()  # also if no update changed them: the version is another one
        measured = self._measured(rollout)
        steps = [metrics | measured if metrics["num_sequences"] else metrics for metrics in steps]
        return self._answer(rollout.id, steps=[StepMetrics(values=metrics) for metrics in steps], logprobs=logprobs)

    def score(self, command: Score) -> Answer:
        """Policy log-probabilities of each sequence's completion tokens."""
        batches = self._cut(Samples.of_sequences(command.sequences))
        self.gather_parameters()
        with self._meter.span("score"):
            for batch, logprobs_T in zip(batches, self._passes.forward_pass(self.chunks, batches), strict=False):
                batch.policy_T = logprobs_T
        return self._answer(
            command.id, logprobs=gather_policy_logprobs(batches, self.placement, len(command.sequences))
        )

    def export_weights(self, command: ExportWeights) -> Answer:
        """Write safetensors shards and their index from rank 0; the other ranks send their parts.

        Raises:
            WriteError: the same on every rank.
        """
        with self._meter.span("export"):
            dtype = self.config.learner.weights_dtype
            write_gathered(Path(command.directory), self.gathered_weights(), self.arch, dtype, self.placement)
        return self._answer(command.id)

    def gathered_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole Hugging Face tensors on rank 0; see `weights.gather_weights`. Collective."""
        self.gather_parameters()
        return gather_weights(self.chunks, self.arch, self.placement)

    def gather_parameters(self) -> None:
        """Make this rank's shards whole where the optimizer's ranks each updated a part of them. Collective."""
        self.policy.gather_parameters()

    def join_transfer(self, command: JoinTransfer) -> Answer:
        """Meet the generators' workers, every learner rank."""
        self._push.join(command)
        return self._answer(command.id)

    def push_weights(self, command: PushWeights) -> Answer:
        """Start sending the policy to every generator worker, or offer to; then they must be receiving by now."""
        if command.version != self.version:
            raise LearnerError(f"asked to push policy version {command.version}, but the learner is at {self.version}")
        with self._meter.span("start push"):
            self.gather_parameters()
            begin_at = self._push.start(verify=command.verify, offered=command.version if command.offered else None)
        return self._answer(command.id, begin_at=begin_at)

    def finish_push(self, command: FinishPush) -> Answer:
        """Wait until every generator holds what was sent, or the push has failed."""
        report, span = self._push.finish()
        self._meter.add(span)
        return self._answer(command.id, push=report)

    def close(self) -> None:
        """Leave every group but the learner's own; there are no more commands."""
        self._push.close()

    def _restart_supervised(self, steps: int) -> None:
        self.policy.restart(self.config.supervised.optimizer_keys(steps), steps)

    def _state(self, *, snapshot: bool) -> dict[str, Any]:
        """What training continues from. Collective."""
        if self.reinforcement is not None:
            return self.reinforcement.state(self.version, snapshot=snapshot)
        self.gather_parameters()
        return training_state([self.policy], self.version, snapshot=snapshot)

    def _begin_reinforcement(self) -> Reinforcement:
        """The weights as they are become the reference; fresh optimizers."""
        self.reinforcement = Reinforcement(
            self.config, self.arch, self.placement, self.policy, self._passes, self._push, self._meter
        )
        return self.reinforcement

    def _started(self, what: str) -> Reinforcement:
        if self.reinforcement is None:
            raise LearnerError(f"{what} came before StartReinforcement: there is nothing to continue from yet")
        return self.reinforcement

    def _passes_at(self, temperature: float) -> Passes:
        read = read_logprobs(self.placement, vocab_size=self.arch.vocab_size, temperature=temperature)
        return Passes(self.placement, read)

    def _cut(self, samples: Samples) -> list[MicroBatch]:
        """For passes that take each sequence by itself."""
        keys = self.config.learner
        return cut_micro_batches(samples, 1, keys.micro_batch_tokens, self.placement, share=keys.share_prompts)

    def _wait_for_push(self) -> None:
        with self._meter.span("wait for push"):
            self._push.wait_until_weights_may_change()

    def _measured(self, rollout: Rollout) -> dict[str, float]:
        """Times and rates of a rollout's steps, the same for each: passes before the first one are for all of them."""
        trained = [samples for samples in rollout.mini_batches if len(samples)]
        updates = len(trained) * rollout.epochs
        if not updates:
            return {}
        lengths, outputs = _positions(trained), sum(samples.completion_tokens for samples in trained)
        flops = rollout_flops(
            self.arch, self.config.algorithm, lengths, outputs, updates=updates, epochs=rollout.epochs
        )
        return self._meter.step_metrics(rollout.epochs * sum(lengths), flops, self._peak_flops, steps=updates)

    def _answer(self, command_id: int, metrics: dict[str, float] | None = None, **fields: Any) -> Answer:
        return Answer(
            id=command_id,
            metrics=None if metrics is None else StepMetrics(values=metrics),
            spans=self._meter.take(),
            **fields,
        )


def _positions(parts: list[Samples]) -> list[int]:
    """Of each sequence: the last token predicts nothing."""
    return [length - 1 for samples in parts for length in samples.lengths]
