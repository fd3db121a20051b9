"""The learner as one rank sees it: model, reference, optimizer, policy version, and a method per command.

All ranks run the same methods in the same order; what differs by rank is decided by `Placement`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_async_rlhf.algorithms.online_dpo import online_dpo_loss
from megatron_async_rlhf.algorithms.supervised import supervised_loss
from megatron_async_rlhf.checkpoint.sources import open_weights
from megatron_async_rlhf.checkpoint.weights import CheckpointWeights
from megatron_async_rlhf.config.architecture import Architecture
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.devices import known_peak
from megatron_async_rlhf.errors import LearnerError, NonFiniteLossError
from megatron_async_rlhf.learner.flops import forward_flops
from megatron_async_rlhf.learner.megatron.background_save import BackgroundSave
from megatron_async_rlhf.learner.megatron.batching import MicroBatch, cut_micro_batches
from megatron_async_rlhf.learner.megatron.data_parallel import ReplicatedPolicy
from megatron_async_rlhf.learner.megatron.fp8 import for_forward_passes
from megatron_async_rlhf.learner.megatron.model import build_model
from megatron_async_rlhf.learner.megatron.optimizer import build_optimizer
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.reference import Reference, ResidentReference, SwappedReference
from megatron_async_rlhf.learner.megatron.steps import MicroLoss, Passes, gather_policy_logprobs
from megatron_async_rlhf.learner.megatron.training_state import (
    load_training_state,
    on_host,
    training_state,
    weights_state,
)
from megatron_async_rlhf.learner.megatron.weight_push import WeightPush
from megatron_async_rlhf.learner.megatron.weights import RandomWeights, gather_weights, load_weights, named_parameters
from megatron_async_rlhf.learner.meter import Meter
from megatron_async_rlhf.learner.protocol import (
    Answer,
    ExportWeights,
    FinishCheckpoint,
    FinishPush,
    JoinTransfer,
    PushWeights,
    ResumeReinforcement,
    SaveCheckpoint,
    Score,
    TrainRollout,
    TrainSupervised,
)
from megatron_async_rlhf.types import Sequence, StepMetrics
from megatron_async_rlhf.weights.hf_files import write_safetensors
from megatron_async_rlhf.weights.hf_mapping import hf_shapes
from megatron_async_rlhf.weights.stored import TensorSpec


class MegatronLearner:
    """Model, optimizer and policy version of one rank."""

    def __init__(self, config: RunConfig, arch: Architecture, placement: Placement) -> None:
        self.config = config
        self.arch = arch
        self.placement = placement
        self.version = 0
        self._meter = Meter(f"learner.{placement.rank}", placement.synchronize)
        self.chunks = build_model(arch, placement, config.learner)
        hf = config.model.hf
        load_weights(self.chunks, arch, placement, open_weights(hf) if hf else RandomWeights(arch, config.run.seed))
        self._policy = ReplicatedPolicy(self.chunks, config.learner, self._meter)
        self._reference: Reference | None = None
        self._peak_flops = _peak_flops(config)
        # After the wrapper, which moves the parameters into its own buffer if it shards the optimizer.
        self._push = WeightPush(config, arch, placement, named_parameters(self.chunks))
        self._save = BackgroundSave(placement)
        self._passes = Passes(placement, vocab_size=arch.vocab_size, temperature=config.generator.temperature)
        # The warm start imitates text; only RL sees the policy through the sampling temperature.
        self._warm_start_passes = Passes(placement, vocab_size=arch.vocab_size, temperature=1.0)
        self._optimizer, self._scheduler = build_optimizer(
            self._policy, config.learner, config.warm_start, max(config.warm_start.steps, 1)
        )

    def train_supervised(self, command: TrainSupervised) -> Answer:
        """One warm-start step over `command.sequences`."""
        batches = self._cut(command.sequences, unit=1)
        num_tokens = sum(len(s.token_ids) - s.prompt_length for s in command.sequences)
        if not num_tokens:
            raise LearnerError(f"warm start step {command.step}: no sequence has a completion to learn from")

        def loss(batch: MicroBatch, logprobs_T: torch.Tensor):
            return supervised_loss(logprobs_T, batch.mask_T, num_tokens=num_tokens)

        metrics = self._optimize(self._warm_start_passes, batches, loss, f"warm start step {command.step}")
        metrics |= self._measured(command.sequences, passes=3)
        return self._answer(command.id, metrics)

    def start_reinforcement(self) -> None:
        """Freeze a copy of the policy as the reference; begin RL with a fresh optimizer at version 0."""
        self.gather_parameters()
        self._begin_reinforcement()
        self.version = 0

    def resume_reinforcement(self, command: ResumeReinforcement) -> Answer:
        """Go on from a checkpoint: its version, weights and optimizer state, the reference it was trained against."""
        if command.reference is not None:
            reader = CheckpointWeights(Path(command.reference), self.arch)
            load_weights(self.chunks, self.arch, self.placement, reader)
        self._begin_reinforcement()
        self.version = load_training_state(Path(command.checkpoint), self.chunks, self._optimizer, self._scheduler)
        return self._answer(command.id)

    def save_checkpoint(self, command: SaveCheckpoint) -> Answer:
        """Start writing a checkpoint, and the reference policy if it is asked for."""
        with self._meter.span("start checkpoint"):
            self.gather_parameters()
            states = {}
            if command.reference is not None:
                with self._reference_chunks() as chunks:
                    states[Path(command.reference)] = on_host(weights_state(chunks))
            states[Path(command.checkpoint)] = training_state(
                self.chunks, self._optimizer, self._scheduler, self.version
            )
            self._save.start(states, snapshot=command.snapshot)
        return self._answer(command.id)

    def finish_checkpoint(self, command: FinishCheckpoint) -> Answer:
        """Complete the checkpoint if every rank's files are written."""
        span = self._save.finish()
        if span is not None:
            self._meter.add(span)
        return self._answer(command.id, saved=span is not None)

    def train_rollout(self, command: TrainRollout) -> Answer:
        """An optimizer step per mini-batch and epoch; one without groups advances the version and changes nothing."""
        if self._reference is None:
            raise LearnerError("TrainRollout came before StartReinforcement: there is no reference policy yet")
        if command.version != self.version:
            raise LearnerError(f"asked to train policy version {command.version}, but the learner is at {self.version}")
        steps: list[StepMetrics] = []
        logprobs: list[list[float]] = []
        for groups in command.mini_batches * command.epochs:
            pairs = [sequence for group in groups for sequence in group.sequences]
            metrics: dict[str, float] = {"num_sequences": len(pairs), "num_pairs": len(pairs) / 2}
            if pairs:
                batches = self._cut(pairs, unit=2)
                self._score_by_reference(batches)
                loss = self._preference_loss(num_pairs=len(pairs) // 2)
                metrics |= self._optimize(self._passes, batches, loss, f"step {self.version}")
                metrics |= self._measured(pairs, passes=4)
                if not steps:
                    logprobs = gather_policy_logprobs(batches, self.placement, len(pairs))
            self.version += 1
            steps.append(StepMetrics(values=metrics))
        return self._answer(command.id, steps=steps, logprobs=logprobs)

    def score(self, command: Score) -> Answer:
        """Policy log-probabilities of each sequence's completion tokens."""
        batches = self._cut(command.sequences, unit=1)
        self.gather_parameters()
        with self._meter.span("score"):
            for batch, logprobs_T in zip(batches, self._passes.logprob_pass(self.chunks, batches), strict=False):
                batch.policy_T = logprobs_T
        return self._answer(
            command.id, logprobs=gather_policy_logprobs(batches, self.placement, len(command.sequences))
        )

    def export_weights(self, command: ExportWeights) -> Answer:
        """Write safetensors shards and their index from rank 0; the other ranks send their parts."""
        with self._meter.span("export"):
            stream = self.gathered_weights()
            if self.placement.rank == 0:
                dtype = self.config.learner.weights_dtype
                specs = [TensorSpec(name, shape, dtype) for name, shape in hf_shapes(self.arch).items()]
                write_safetensors(Path(command.directory), specs, stream)
            else:
                for _ in stream:
                    pass
        return self._answer(command.id)

    def gathered_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole Hugging Face tensors on rank 0; see `weights.gather_weights`. Collective."""
        self.gather_parameters()
        return gather_weights(self.chunks, self.arch, self.placement)

    def gather_parameters(self) -> None:
        """Make this rank's shards whole where the optimizer's ranks each updated a part of them. Collective."""
        self._policy.gather_parameters()

    def join_transfer(self, command: JoinTransfer) -> Answer:
        """Meet the generators' workers, every learner rank."""
        self._push.join(command)
        return self._answer(command.id)

    def push_weights(self, command: PushWeights) -> Answer:
        """Start sending the policy to every generator worker, which must be receiving by now."""
        if command.version != self.version:
            raise LearnerError(f"asked to push policy version {command.version}, but the learner is at {self.version}")
        with self._meter.span("start push"):
            self.gather_parameters()
            self._push.start(verify=command.verify)
        return self._answer(command.id)

    def finish_push(self, command: FinishPush) -> Answer:
        """Wait until every generator holds what was sent, or the push has failed."""
        report, span = self._push.finish()
        self._meter.add(span)
        return self._answer(command.id, push=report)

    def _begin_reinforcement(self) -> None:
        """The weights as they are become the reference; a fresh optimizer."""
        learner = self.config.learner
        if learner.reference == "swapped":
            self._reference = SwappedReference(self.chunks)
        else:
            frozen = build_model(self.arch, self.placement, for_forward_passes(learner))
            self._reference = ResidentReference(frozen, self.chunks)
        self._optimizer, self._scheduler = build_optimizer(self._policy, learner, learner, self.config.schedule.steps)

    def _cut(self, sequences: list[Sequence], unit: int) -> list[MicroBatch]:
        return cut_micro_batches(sequences, unit, self.config.learner.micro_batch_tokens, self.placement)

    def _preference_loss(self, num_pairs: int) -> MicroLoss:
        algorithm = self.config.algorithm

        def loss(batch: MicroBatch, logprobs_T: torch.Tensor):
            policy_S = batch.completions.sum(logprobs_T)
            reference_S = batch.completions.sum(batch.reference_T)
            return online_dpo_loss(
                policy_S[0::2],
                policy_S[1::2],
                reference_S[0::2],
                reference_S[1::2],
                policy_S.new_tensor([float(index >= 0) for index in batch.indices[0::2]]),
                beta=algorithm.beta,
                loss=algorithm.loss,
                num_pairs=num_pairs,
            )

        return loss

    def _score_by_reference(self, batches: list[MicroBatch]) -> None:
        with self._reference_chunks() as chunks, self._meter.span("reference"):
            for batch, logprobs_T in zip(batches, self._passes.logprob_pass(chunks, batches), strict=False):
                batch.reference_T = logprobs_T

    @contextmanager
    def _reference_chunks(self) -> Iterator[list[GPTModel]]:
        """The reference's model; the policy's own one with other weights in it, if they are swapped in."""
        if isinstance(self._reference, SwappedReference):
            self.gather_parameters()
            with self._meter.span("wait for push"):
                self._push.wait_until_weights_may_change()
        with self._reference.model() as chunks:
            yield chunks

    def _optimize(self, passes: Passes, batches: list[MicroBatch], loss: MicroLoss, what: str) -> dict[str, float]:
        """Forward, backward, clip, step.

        Raises:
            NonFiniteLossError: on every rank alike, before any weight changes.
        """
        self._policy.begin_step()
        self._optimizer.zero_grad()
        with self._meter.span("forward-backward"):
            metrics = passes.train_pass(self._policy.chunks, batches, loss)
        learning_rate = self._optimizer.param_groups[0]["lr"]
        with self._meter.span("gradient norm"):
            self._optimizer.prepare_grads()
            norm = float(self._optimizer.get_grad_norm())
        if not (torch.tensor(metrics["loss"]).isfinite() and torch.tensor(norm).isfinite()):
            raise NonFiniteLossError(f"{what}: loss {metrics['loss']}, gradient norm {norm}; lower the learning rate")
        with self._meter.span("wait for push"):
            self._push.wait_until_weights_may_change()
        with self._meter.span("optimizer"):
            self._optimizer.step()
            self._policy.parameters_changed()
            self._scheduler.step(increment=1)
        return metrics | {"grad_norm": norm, "learning_rate": learning_rate}

    def _measured(self, sequences: list[Sequence], passes: int) -> dict[str, float]:
        """Times and rates of the step over `sequences`; backward counts as two passes, the reference's as one."""
        lengths = [len(s.token_ids) - 1 for s in sequences]
        outputs = sum(len(s.token_ids) - s.prompt_length for s in sequences)
        flops = passes * forward_flops(self.arch, lengths, outputs)
        return self._meter.step_metrics(sum(lengths), flops, self._peak_flops)

    def _answer(self, command_id: int, metrics: dict[str, float] | None = None, **fields: Any) -> Answer:
        return Answer(
            id=command_id,
            metrics=None if metrics is None else StepMetrics(values=metrics),
            spans=self._meter.take(),
            **fields,
        )


def _peak_flops(config: RunConfig) -> float | None:
    """What all ranks' devices could do in a second, if that is known."""
    learner = config.learner
    peak = None if learner.peak_tflops is None else learner.peak_tflops * 1e12
    if peak is None and config.run.device == "cuda":
        peak = known_peak(torch.cuda.get_device_name(), "fp8" if learner.fp8 else learner.precision)
    return None if peak is None else peak * learner.world_size
