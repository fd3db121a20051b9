"""How long an optimizer step takes in the learner, of sequences of average length: matrix products, what ranks send each other,
pipeline bubbles, and Adam.

a step of one data-parallel copy, on its last pipeline stage, which has the output matrix beside its layers:
    micro-batches x (compute + collectives of tensor parallelism + keys and values from other context ranks) x (1 + bubble)
        -> gradients between copies -> Adam
"""

import math
from dataclasses import dataclass, replace

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.holdings import learner_holdings, value_holdings
from megatron_async_rlhf.estimate.machines import Machine
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.flops import output_flops, passes_before_updates, token_flops
from megatron_async_rlhf.models.layout import LearnerLayout

_HIDDEN = 0.7  # of the gradients' way between copies, by the backward pass, with `overlap_grad_reduce`
_ADAM_BYTES = 34  # a number: gradient twice, weights, both moments read; weights, both moments and their copy written
_MOVED_BYTES = 8  # a number of an Adam state on the host: its gradient there, its weight back
_SWAPPED_COPIES = 3  # of the weights over the bus, for a pass of a reference that is swapped in


@dataclass(frozen=True, kw_only=True)
class LearnerStep:
    """Seconds of an optimizer step.

    Attributes:
        compute: matrix products, and what is computed again.
        tensor: collectives of tensor parallelism, which nothing hides.
        context: keys, values and their gradients between context-parallel ranks, beyond the attention that hides them.
        bubble: a pipeline stage waits for others.
        reduction: gradients, and with a distributed optimizer weights, on their way between copies.
        optimizer: Adam, and what its states and a reference on the host cost.
        tokens: that are trained; a prompt is in each of its sequences.
    """

    compute: float
    tensor: float
    context: float
    bubble: float
    reduction: float
    optimizer: float
    tokens: float

    @property
    def per_token(self) -> float:
        """Of what grows with the tokens."""
        return (self.compute + self.tensor + self.context + self.bubble) / self.tokens

    @property
    def fixed(self) -> float:
        """Whatever is trained."""
        return self.reduction + self.optimizer

    def scaled(self, factor: float) -> "LearnerStep":
        """All of it so many times as long."""
        times = ("compute", "tensor", "context", "bubble", "reduction", "optimizer")
        return replace(self, **{name: factor * getattr(self, name) for name in times})

    @property
    def total(self) -> float:
        return self.fixed + self.per_token * self.tokens


def learner_step(
    config: RunConfig, arch: Architecture, machine: Machine, prompt: float, completion: float
) -> LearnerStep:
    """
    Args:
        prompt, completion: tokens of each, on average.
    """
    learner, length = config.learner, prompt + completion
    sequences = config.algorithm.trained_samples * config.schedule.prompts_per_step
    tokens = sequences * length
    computed = tokens * computed_share(config, prompt, completion)
    # What must stay together goes to one copy, and a step takes as long as that with the most.
    units = sequences / config.algorithm.sequences_together
    uneven = math.ceil(units / learner.data_parallel) / (units / learner.data_parallel)
    own = uneven * computed / learner.data_parallel / learner.context_parallel  # of one rank's sequences
    stages, output = learner.pipeline_parallel, _output_token_flops(config, arch)
    flops = (trained_token_flops(config, arch, length) - output) / stages + output
    compute = own * flops / (machine.learner * learner.tensor_parallel)
    tensor = own * _tensor_bytes_per_token(config, arch) / machine.link
    context = own * _context_s_per_token(config, arch, machine, length)
    micro_batches = max(1.0, uneven * computed / learner.data_parallel / learner.micro_batch_tokens)
    layers = compute * (1 - output / flops)  # the others, which the last stage waits for, have no more
    bubble = (stages - 1) / (micro_batches * learner.virtual_stages) * (layers + tensor + context)
    layout = LearnerLayout.of(learner)
    of_stages = [holding.total for holding in learner_holdings(arch, layout)]
    held = updated = max(of_stages)
    if config.algorithm.has_value_model:
        values = [holding.total for holding in value_holdings(arch, layout)]
        updated = max(map(sum, zip(of_stages, values, strict=True)))
    copies, divided = learner.copies, learner.distributed_optimizer
    # A ring sends (copies - 1) / copies of the gradients twice; a distributed optimizer once, and the weights once.
    sent = (4 + (ITEM_BYTES[learner.weights_dtype] if divided else 4)) * updated * (copies - 1) / copies
    reduction = sent / _way_between_copies(config, machine) * (1 - _HIDDEN * learner.overlap_grad_reduce)
    return LearnerStep(
        compute=compute,
        tensor=tensor,
        context=context,
        bubble=bubble,
        reduction=reduction,
        optimizer=_adam_s(config, machine, updated / (copies if divided else 1)) + _swapping_s(config, machine, held),
        tokens=tokens,
    )


def _adam_s(config: RunConfig, machine: Machine, numbers: float) -> float:
    """Of a rank's share of the numbers, those on the host after the others."""
    learner = config.learner
    ranks = min(learner.world_size, _ranks_on_a_machine(config))
    of_host = min(machine.host_bandwidth / ranks, learner.threads * machine.thread_bandwidth)
    on_host_s = _MOVED_BYTES / machine.host_link + (_ADAM_BYTES - 2) / of_host
    on_host = learner.optimizer_offload
    return numbers * ((1 - on_host) * _ADAM_BYTES / machine.bandwidth + on_host * on_host_s)


def _swapping_s(config: RunConfig, machine: Machine, held: float) -> float:
    """A step's share of what a reference on the host takes for its pass over a rollout."""
    if config.learner.reference != "swapped" or not config.algorithm.has_reference:
        return 0.0
    moved = _SWAPPED_COPIES * held * ITEM_BYTES[config.learner.weights_dtype]
    return moved / machine.host_link / config.schedule.updates_per_rollout


def _way_between_copies(config: RunConfig, machine: Machine) -> float:
    """Bytes per second of a ring over all copies of a stage, which are next to each other: between machines it goes by the
    network cards of its ranks on that machine which has the fewest."""
    tensor, on_machine = config.learner.tensor_parallel, _ranks_on_a_machine(config)
    way = machine.link
    for first, last in _over_machines(config, tensor * config.learner.copies):  # of a stage
        fewest = min(on_machine - first % on_machine, last % on_machine + 1)
        way = min(way, max(1, fewest // tensor) * machine.network)
    return way


def _over_machines(config: RunConfig, ranks: int) -> list[tuple[int, int]]:
    """First and last of each group of so many learner ranks next to each other that is not on one machine."""
    on_machine = _ranks_on_a_machine(config)
    groups = ((first, first + ranks - 1) for first in range(0, config.learner.world_size, ranks))
    return [(first, last) for first, last in groups if first // on_machine != last // on_machine]


def computed_share(config: RunConfig, prompt: float, completion: float) -> float:
    """Of the tokens of a group's sequences those that are computed: with `share_prompts` its prompt counts once."""
    samples = config.algorithm.trained_samples if config.learner.share_prompts else 1
    return (prompt / samples + completion) / (prompt + completion)


def trained_token_flops(config: RunConfig, arch: Architecture, length: float) -> float:
    """In one optimizer step: forward, backward (twice that), what is computed again, and a step's share of the passes
    before the updates, which an epoch more does not repeat. The same of a value model, which has no logits."""
    forward, backward = _passes(config)
    layers = token_flops(arch, length / 2) - output_flops(arch)
    return (forward + 2 * backward) * layers + _output_token_flops(config, arch)


def _output_token_flops(config: RunConfig, arch: Architecture) -> float:
    """Of that, of logits: forward, computed again in blocks (`learner/megatron/layers/logprobs.py`), backward; and before."""
    return (4 + _passes_before(config)) * output_flops(arch)


def _passes_before(config: RunConfig) -> float:
    """An optimizer step's share."""
    schedule = config.schedule
    return passes_before_updates(config.algorithm, schedule.updates_per_rollout) / schedule.epochs


def _tensor_bytes_per_token(config: RunConfig, arch: Architecture) -> float:
    """Two sums over all tensor-parallel ranks in each layer and pass, as a ring sends them, on one pipeline stage."""
    learner = config.learner
    ranks = learner.tensor_parallel
    if ranks == 1:
        return 0.0
    size = ITEM_BYTES[learner.weights_dtype] * arch.hidden_size
    passes = sum(_passes(config))
    return 2 * passes * arch.layers / learner.pipeline_parallel * size * 2 * (ranks - 1) / ranks


def _context_s_per_token(config: RunConfig, arch: Architecture, machine: Machine, length: float) -> float:
    """Of a rank's own tokens, on one pipeline stage. In a layer's forward pass each context-parallel rank gets the others' keys
    and values, in its backward pass these and their gradients. Transformer Engine computes attention of one part while the
    next is under way; torch's attention waits for all of them."""
    learner = config.learner
    ranks, tensor = learner.context_parallel, learner.tensor_parallel
    if ranks == 1:
        return 0.0
    numbers = 2 * max(1, arch.kv_heads // tensor) * arch.head_dim * arch.layers / learner.pipeline_parallel
    way = machine.network if _over_machines(config, tensor * ranks) else machine.link
    moved = (ranks - 1) * numbers * ITEM_BYTES[learner.weights_dtype] / way
    attention = (token_flops(arch, length / 2) - token_flops(arch, 0)) / learner.pipeline_parallel
    hidden = attention / (machine.learner * tensor) if config.run.device == "cuda" else 0.0
    forward, backward = _passes(config)
    return (forward + 2 * backward) * max(0.0, moved - hidden)


def _passes(config: RunConfig) -> tuple[float, float]:
    """Forward and backward ones of an optimizer step, of the policy and the value model together."""
    again = config.learner.recompute == "full"
    forward = 1 + again + _passes_before(config)
    if not config.algorithm.has_value_model:
        return forward, 1
    return forward + 1 + again + 1 / config.schedule.epochs, 2


def _ranks_on_a_machine(config: RunConfig) -> int:
    return config.launch.gpus_per_node if config.run.device == "cuda" else config.learner.world_size
