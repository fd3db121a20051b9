"""How long an optimizer step takes in the learner, of sequences of average length: matrix products, what ranks send each other,
pipeline bubbles, and Adam.

a step of one data-parallel copy:
    micro-batches x (compute + collectives of tensor parallelism) x (1 + bubble) -> gradients between copies -> Adam
"""

from dataclasses import dataclass, replace

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.holdings import learner_holdings
from megatron_async_rlhf.estimate.machines import Machine
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.flops import output_flops, passes_before_updates, token_flops
from megatron_async_rlhf.models.layout import LearnerLayout

_HIDDEN = 0.7  # of the gradients' way between copies, by the backward pass, with `overlap_grad_reduce`
_ADAM_BYTES = 34  # a number: gradient twice, weights, both moments read; weights, both moments and their copy written


@dataclass(frozen=True, kw_only=True)
class LearnerStep:
    """Seconds of an optimizer step.

    Attributes:
        compute: matrix products, and what is computed again.
        tensor: collectives of tensor parallelism, which nothing hides.
        bubble: a pipeline stage waits for others.
        reduction: gradients, and with a distributed optimizer weights, on their way between copies.
        optimizer: Adam.
        tokens: that are trained; a prompt is in each of its sequences.
    """

    compute: float
    tensor: float
    bubble: float
    reduction: float
    optimizer: float
    tokens: float

    @property
    def per_token(self) -> float:
        """Of what grows with the tokens."""
        return (self.compute + self.tensor + self.bubble) / self.tokens

    @property
    def fixed(self) -> float:
        """Whatever is trained."""
        return self.reduction + self.optimizer

    def scaled(self, factor: float) -> "LearnerStep":
        """All of it so many times as long."""
        times = ("compute", "tensor", "bubble", "reduction", "optimizer")
        return replace(self, **{name: factor * getattr(self, name) for name in times})

    @property
    def total(self) -> float:
        return self.fixed + self.compute + self.tensor + self.bubble


def learner_step(
    config: RunConfig, arch: Architecture, machine: Machine, prompt: float, completion: float
) -> LearnerStep:
    """
    Args:
        prompt, completion: tokens of each, on average.
    """
    learner, length = config.learner, prompt + completion
    tokens = config.algorithm.trained_samples * config.schedule.prompts_per_step * length
    computed = tokens * computed_share(config, prompt, completion)
    own = computed / learner.data_parallel / learner.context_parallel  # of one rank's sequences
    stages = learner.pipeline_parallel
    compute = own * trained_token_flops(config, arch, length) / (machine.learner * learner.tensor_parallel * stages)
    tensor = own * _tensor_bytes_per_token(config, arch) / machine.link
    micro_batches = max(1.0, computed / learner.data_parallel / learner.micro_batch_tokens)
    bubble = (stages - 1) / (micro_batches * learner.virtual_stages) * (compute + tensor)
    held = max(holding.total for holding in learner_holdings(arch, LearnerLayout.of(learner)))
    copies, divided = learner.copies, learner.distributed_optimizer
    way = machine.network if learner.world_size > _ranks_on_a_machine(config) else machine.link
    # A ring sends (copies - 1) / copies of the gradients twice; a distributed optimizer once, and the weights once.
    sent = (4 + (ITEM_BYTES[learner.weights_dtype] if divided else 4)) * held * (copies - 1) / copies
    reduction = sent / way * (1 - _HIDDEN * learner.overlap_grad_reduce)
    return LearnerStep(
        compute=compute,
        tensor=tensor,
        bubble=bubble,
        reduction=reduction,
        optimizer=_ADAM_BYTES * held / (copies if divided else 1) / machine.bandwidth,
        tokens=tokens,
    )


def computed_share(config: RunConfig, prompt: float, completion: float) -> float:
    """Of the tokens of a group's sequences those that are computed: with `share_prompts` its prompt counts once."""
    samples = config.algorithm.trained_samples if config.learner.share_prompts else 1
    return (prompt / samples + completion) / (prompt + completion)


def trained_token_flops(config: RunConfig, arch: Architecture, length: float) -> float:
    """In one optimizer step: forward, backward (twice that), what is computed again, and a step's share of the passes
    before the updates, which an epoch more does not repeat. The same of a value model, which has no logits."""
    algorithm, schedule = config.algorithm, config.schedule
    training = 4 if config.learner.recompute == "full" else 3
    before = passes_before_updates(algorithm, schedule.updates_per_rollout) / schedule.epochs
    # Logits are computed again in blocks, see `learner/megatron/layers/logprobs.py`.
    policy = (training + before) * token_flops(arch, length / 2) + output_flops(arch)
    value = (training + 1 / schedule.epochs) * (token_flops(arch, length / 2) - output_flops(arch))
    return policy + value * algorithm.has_value_model


def _tensor_bytes_per_token(config: RunConfig, arch: Architecture) -> float:
    """Two sums over all tensor-parallel ranks in each layer and pass, as a ring sends them, on one pipeline stage."""
    learner, schedule = config.learner, config.schedule
    ranks = learner.tensor_parallel
    if ranks == 1:
        return 0.0
    passes: float = 2 + (learner.recompute == "full")
    passes += passes_before_updates(config.algorithm, schedule.updates_per_rollout) / schedule.epochs
    passes += config.algorithm.has_value_model * (passes + 1 / schedule.epochs - 1)
    size = ITEM_BYTES[learner.weights_dtype] * arch.hidden_size
    return 2 * passes * arch.layers / learner.pipeline_parallel * size * 2 * (ranks - 1) / ranks


def _ranks_on_a_machine(config: RunConfig) -> int:
    return config.launch.gpus_per_node if config.run.device == "cuda" else config.learner.world_size
