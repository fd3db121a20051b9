"""A model that is trained: its chunks, its gradients, its optimizer and schedule, and one optimizer step of it.

A step of several models (policy and value model) changes all or none of them: see `training_step`.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_async_rlhf.config.sections import LearnerSection, OptimizerKeys
from megatron_async_rlhf.errors import NonFiniteLossError
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch
from megatron_async_rlhf.learner.megatron.training.data_parallel import ReplicatedChunks
from megatron_async_rlhf.learner.megatron.training.optimizer import build_optimizer
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss, Passes
from megatron_async_rlhf.learner.meter import Meter


class TrainedModel:
    """This rank's part of a model.

    Attributes:
        chunks: one per virtual stage, without the wrapper that reduces gradients.
        steps: that the optimizer has made.
    """

    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler

    def __init__(self, chunks: list[GPTModel], learner: LearnerSection, meter: Meter) -> None:
        self.chunks = chunks
        self._learner = learner
        self._meter = meter
        self._replicated = ReplicatedChunks(chunks, learner, meter)
        self.steps = 0

    def restart(self, keys: OptimizerKeys, steps: int) -> None:
        """A fresh optimizer and schedule. The old ones go first: together they would need memory that a step does not."""
        self._drop_optimizer()
        self.steps = 0
        self.optimizer, self.schedule = build_optimizer(self._replicated, self._learner, keys, steps)

    def gather_parameters(self) -> None:
        """Make this rank's shards whole where the optimizer's ranks each updated a part of them. Collective."""
        self._replicated.gather_parameters()

    def _drop_optimizer(self) -> None:
        for attribute in ("optimizer", "schedule"):
            vars(self).pop(attribute, None)
        for parameter in (parameter for chunk in self.chunks for parameter in chunk.parameters()):
            vars(parameter).pop("main_param", None)  # Megatron's handle to the optimizer's float32 copy
        gc.collect()  # Megatron's optimizers are in reference cycles

    def accumulate(self, passes: Passes, batches: list[MicroBatch], loss: MicroLoss) -> dict[str, float]:
        """Forward and backward: leaves reduced gradients; the metrics of `Passes.train_pass` and `grad_norm`."""
        self._replicated.begin_step()
        self.optimizer.zero_grad()
        with self._meter.span("forward-backward"):
            metrics = passes.train_pass(self._replicated.chunks, batches, loss)
        with self._meter.span("gradient norm"):
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
        return metrics | {"grad_norm": norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}

    def step(self) -> None:
        """Clip, change the weights, advance the schedule."""
        with self._meter.span("optimizer"):
            self.optimizer.step()
            self._replicated.parameters_changed()
            self.steps += 1
            self.schedule.step(increment=1)

    def pass_over(self) -> None:
        """A step with nothing to learn from: weights and Adam's state stay, the schedule advances."""
        self.schedule.step(increment=1)


@dataclass(frozen=True, kw_only=True)
class ModelStep:
    """What one model learns in a step; `label` names it in an error, if it is not the policy."""

    label: str = ""
    model: TrainedModel
    passes: Passes
    loss: MicroLoss


def training_step(
    steps: Sequence[ModelStep], batches: list[MicroBatch], before_change: Callable[[], None], what: str
) -> list[dict[str, float]]:
    """One optimizer step of each step's model on the same micro-batches; the metrics of each.

    Args:
        before_change: called when all gradients are there, before any weight changes.
        what: the step's name in an error.

    Raises:
        NonFiniteLossError: on every rank alike, before any weight changes.
    """
    learned = [step.model.accumulate(step.passes, batches, step.loss) for step in steps]
    for step, metrics in zip(steps, learned, strict=True):
        loss, norm = metrics["loss"], metrics["grad_norm"]
        if not torch.tensor([loss, norm]).isfinite().all():
            where = what + (f", {step.label}" if step.label else "")
            raise NonFiniteLossError(f"{where}: loss {loss}, gradient norm {norm}; lower the learning rate")
    before_change()
    for step in steps:
        step.model.step()
    return learned
