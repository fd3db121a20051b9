"""Reinforcement learning on one rank: what there is beside the policy, and the updates that a rollout is for.

    rollout ──> cut into micro-batches, once
            ──> passes over all of it, without gradients: reference, proximal policy, values   (those that are needed)
            ──> advantages, with sums over data-parallel ranks
            ──> per epoch and mini-batch: forward and backward of policy and value model, then both step

The proximal policy, around which ratios are clipped, is the policy as the rollout found it: one for all its updates.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from megatron_async_rlhf.algorithms.corrections import effective_sample_share
from megatron_async_rlhf.config.algorithms import PPOSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.learner.megatron.layers.fp8 import for_forward_passes
from megatron_async_rlhf.learner.megatron.model import build_model
from megatron_async_rlhf.learner.megatron.objectives.choose import choose_objective
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch, make_mini_batch
from megatron_async_rlhf.learner.megatron.objectives.objective import ValueObjective
from megatron_async_rlhf.learner.megatron.objectives.terms import observations
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.state.training_state import load_training_state, training_state
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch
from megatron_async_rlhf.learner.megatron.training.reference import Reference, ResidentReference, SwappedReference
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss, Passes, gather_policy_logprobs, read_values
from megatron_async_rlhf.learner.megatron.training.trained_model import ModelStep, TrainedModel, training_step
from megatron_async_rlhf.learner.megatron.training.value_model import build_value_model, copy_policy, read_value_model
from megatron_async_rlhf.learner.megatron.transfer.weight_push import WeightPush
from megatron_async_rlhf.learner.meter import Meter
from megatron_async_rlhf.learner.rollout import Samples
from megatron_async_rlhf.models.architecture import Architecture


class Reinforcement:
    """Made when RL begins: the policy's weights as they are become the reference, if the algorithm has one.

    Attributes:
        value_model: of an algorithm that has one.
    """

    def __init__(
        self,
        config: RunConfig,
        arch: Architecture,
        placement: Placement,
        policy: TrainedModel,
        passes: Passes,
        push: WeightPush,
        meter: Meter,
    ) -> None:
        self._config, self._placement = config, placement
        self._policy, self._passes, self._push, self._meter = policy, passes, push, meter
        self._value_passes = Passes(placement, read_values)
        self._objective = choose_objective(config)
        self._reference: Reference | None = None
        learner, steps = config.learner, config.schedule.steps
        if config.algorithm.has_reference and learner.reference == "swapped":
            self._reference = SwappedReference(policy.chunks)
        elif config.algorithm.has_reference:
            frozen = build_model(arch, placement, for_forward_passes(learner))
            self._reference = ResidentReference(frozen, policy.chunks)
        policy.restart(learner, steps)
        self.value_model: TrainedModel | None = None
        if config.algorithm.has_value_model:
            self.value_model = self._start_value_model(arch)
            self.value_model.restart(value_model_keys(config), steps)

    def updates(
        self, mini_batches: Sequence[Samples], epochs: int, version: int
    ) -> Iterator[tuple[dict[str, float], list[list[float]]]]:
        """Make the rollout's updates, one each time the next is asked for.

        A mini-batch without sequences changes nothing but the learning rates, which follow the policy's version.

        Yields each update's metrics and, of the first one and on rank 0, its sequences' log-probabilities before it.

        Args:
            version: of the policy before the first update.

        Raises:
            NonFiniteLossError: on every rank alike, before the update changes any weight.
        """
        algorithm, learner = self._config.algorithm, self._config.learner
        cut = [
            make_mini_batch(
                samples,
                self._placement,
                together=algorithm.sequences_together,
                budget=learner.micro_batch_tokens,
                needs_sampler=algorithm.is_corrected,
                share=learner.share_prompts,
            )
            for samples in mini_batches
        ]
        self._prepare([mini_batch for mini_batch in cut if mini_batch.num_sequences], epochs)
        for number in range(epochs * len(cut)):
            mini_batch = cut[number % len(cut)]
            counts = {"num_sequences": float(mini_batch.num_sequences)}
            if algorithm.sequences_together == 2:
                counts["num_pairs"] = mini_batch.num_sequences / 2
            if not mini_batch.num_sequences:
                for model in self._models:
                    model.pass_over()
                yield counts, []
                continue
            step, about = version + number + 1, {"samples": mini_batch.num_sequences, "tokens": mini_batch.num_tokens}
            with self._meter.about(version=step, **about):
                metrics = self._update(mini_batch, f"step {step}")
            logprobs = []
            if number == 0:
                logprobs = gather_policy_logprobs(mini_batch.batches, self._placement, mini_batch.num_sequences)
            yield counts | metrics, logprobs

    @contextmanager
    def reference_chunks(self) -> Iterator[list[GPTModel]]:
        """The reference's model; the policy's own one with other weights in it, if they are swapped in."""
        if isinstance(self._reference, SwappedReference):
            self._policy.gather_parameters()
            self._wait_for_push()
        assert self._reference is not None  # nobody asks where the algorithm has none
        with self._reference.model() as chunks:
            yield chunks

    def state(self, version: int, *, snapshot: bool) -> dict:
        """What a checkpoint has of policy and value model; see `training_state`. Collective."""
        for model in self._models:
            model.gather_parameters()
        return training_state(self._models, version, snapshot=snapshot)

    def load(self, checkpoint: Path) -> int:
        """Continue from what `state` became; returns its version. Collective."""
        return load_training_state(checkpoint, self._models, self._placement.control)

    @property
    def _models(self) -> list[TrainedModel]:
        return [model for model in (self._policy, self.value_model) if model is not None]

    def _start_value_model(self, arch: Architecture) -> TrainedModel:
        learner, source = self._config.learner, _value_keys(self._config).value_hf
        chunks = build_value_model(arch, self._placement, learner)
        if source is None:
            copy_policy(self._policy.chunks, chunks)
        else:
            read_value_model(chunks, arch, self._placement, source)
        return TrainedModel(chunks, learner, self._meter)

    def _prepare(self, mini_batches: list[MiniBatch], epochs: int) -> None:
        """All that is computed before the first update."""
        if self._reference is not None and mini_batches:
            with self.reference_chunks() as chunks, self._meter.span("reference"):
                self._record("reference_T", self._passes, chunks, mini_batches)
        if self._config.algorithm.scores_policy_first(epochs * len(mini_batches)):
            self._policy.gather_parameters()
            with self._meter.span("proximal"):
                self._record("proximal_T", self._passes, self._policy.chunks, mini_batches)
        if self.value_model is not None:
            self.value_model.gather_parameters()
            with self._meter.span("values"):
                self._record("values_T", self._value_passes, self.value_model.chunks, mini_batches)
        for mini_batch in mini_batches:
            self._objective.prepare(mini_batch)

    def _record(self, name: str, passes: Passes, chunks: list[GPTModel], mini_batches: list[MiniBatch]) -> None:
        """Put what a forward pass reads on the micro-batches under `name`; on the last stage, where it is."""
        for mini_batch in mini_batches:
            for batch, read_T in zip(mini_batch.batches, passes.forward_pass(chunks, mini_batch.batches), strict=False):
                setattr(batch, name, read_T)

    def _update(self, mini_batch: MiniBatch, what: str) -> dict[str, float]:
        steps = [ModelStep(model=self._policy, passes=self._passes, loss=self._policy_loss(mini_batch))]
        if self.value_model is not None:
            assert isinstance(self._objective, ValueObjective)
            loss = self._objective.value_loss(mini_batch)
            steps.append(ModelStep(label="value model", model=self.value_model, passes=self._value_passes, loss=loss))
        metrics, *others = training_step(steps, mini_batch.batches, self._wait_for_push, what)
        for of_values in others:
            metrics["loss"] += of_values["loss"]
            metrics["value/grad_norm"] = of_values["grad_norm"]
            metrics["value/learning_rate"] = of_values["learning_rate"]
            metrics = of_values | metrics
        if "correction/weight" in metrics:
            metrics["correction/effective_sample_share"] = effective_sample_share(metrics)
            del metrics["correction/weight_squared"]
        return metrics

    def _policy_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        """The objective's, with what every algorithm reports; keeps the log-probabilities."""
        objective_loss = self._objective.policy_loss(mini_batch)

        def loss(batch: MicroBatch, logprobs_T):
            batch.policy_T = logprobs_T.detach()
            total, metrics = objective_loss(batch, logprobs_T)
            return total, observations(mini_batch, batch, batch.policy_T) | metrics

        return loss

    def _wait_for_push(self) -> None:
        with self._meter.span("wait for push"):
            self._push.wait_until_weights_may_change()


def value_model_keys(config: RunConfig) -> LearnerSection:
    """The learner's section with the value model's rate; the lowest rate keeps its share of the highest."""
    learner, rate = config.learner, _value_keys(config).value_learning_rate
    if rate is None:
        return learner
    lowest = learner.min_learning_rate * (rate / learner.learning_rate)
    return learner.model_copy(update={"learning_rate": rate, "min_learning_rate": lowest})


def _value_keys(config: RunConfig) -> PPOSection:
    """Of the algorithm that has a value model."""
    assert isinstance(config.algorithm, PPOSection)
    return config.algorithm
