"""Peak memory of one learner rank of each pipeline stage, in bytes.

always there: weights, gradients, optimizer, reference, value model, staging buffers of a push, fixed part
on top, the largest of:
    forward-backward   what the layers of all micro-batches in flight keep, and the worst moment of a backward pass
    optimizer          temporaries of Adam
"""

from dataclasses import dataclass, fields

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.estimate.activations import (
    FLOAT32,
    LayerShare,
    attention_kernel_bytes,
    backward_bytes,
    chunks_in_flight,
    head_bytes,
    layer_bytes,
)
from megatron_async_rlhf.estimate.holdings import Holding, learner_holdings, value_holdings
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.layout import LearnerLayout

LOGITS_BLOCK = {
    "cpu": 2**25,
    "cuda": 2**27,
}  # elements of a block of logits, as in `learner/megatron/layers/logprobs.py`
MIB = 2**20
FIXED_CPU = 350 * MIB  # a process with torch, Megatron and its process groups before it has a model, measured
# CUDA context with torch's kernels, cuBLAS workspaces, and NCCL's buffers of the tensor, data, pipeline, control and
# transfer groups. An assumption, not yet measured.
FIXED_CUDA = 2048 * MIB


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a learner is for.

    Attributes:
        sequences: of one optimizer step, at most, on all ranks.
        has_pushes: its weights go to generators.
    """

    sequences: int
    has_reference: bool = False
    has_value_model: bool = False
    has_pushes: bool = False

    @classmethod
    def of_run(cls, config: RunConfig) -> "Work":
        """RL, and the warm start before it."""
        algorithm, schedule = config.algorithm, config.schedule
        warm_start = config.warm_start.batch_size if config.warm_start.steps else 0
        return cls(
            sequences=max(algorithm.trained_samples * schedule.prompts_per_step, warm_start),
            has_reference=algorithm.has_reference,
            has_value_model=algorithm.has_value_model,
            has_pushes=True,
        )


@dataclass(frozen=True, kw_only=True)
class LearnerMemory:
    """Bytes of one rank. `host` lies in the machine's memory beside a GPU's, and is 0 on a CPU."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    value: int  # PPO's value model: weights, gradients and optimizer
    activations: int  # kept between forward and backward
    working: int  # the worst moment on top of what is kept
    push: int
    fixed: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


def learner_memory(config: RunConfig, arch: Architecture, work: Work | None = None) -> list[LearnerMemory]:
    """Of a rank of each pipeline stage, the first stage first.

    Args:
        work: default: that of a run.
    """
    holdings, work = learner_holdings(arch, LearnerLayout.of(config.learner)), work or Work.of_run(config)
    return [_stage_memory(config, arch, work, stage, holding) for stage, holding in enumerate(holdings)]


def micro_batch_tokens(config: RunConfig, arch: Architecture, work: Work) -> int:
    """Tokens of the largest micro-batch of one rank: the budget, or all there is to train on if that is less."""
    learner = config.learner
    return min(learner.micro_batch_tokens, _step_tokens(config, arch, work)) // learner.context_parallel


def micro_batches(config: RunConfig, arch: Architecture, work: Work) -> int:
    """Most micro-batches of one step on one rank: all sequences at full length."""
    return -(-_step_tokens(config, arch, work) // config.learner.micro_batch_tokens)


def _step_tokens(config: RunConfig, arch: Architecture, work: Work) -> int:
    return arch.context_length * -(-work.sequences // config.learner.data_parallel)


def _stage_memory(config: RunConfig, arch: Architecture, work: Work, stage: int, holding: Holding) -> LearnerMemory:
    learner = config.learner
    weights = _weights(learner, arch, stage, holding)
    on_cpu = config.run.device == "cpu"
    reference = weights if work.has_reference else 0
    resident = learner.reference == "resident"
    swapped = 0 if resident else 2 * reference  # in host memory: the reference's, and the policy's during its pass
    optimizer, optimizer_on_host = _optimizer(config, holding)
    value, value_on_host = _value_model(config, arch, stage) if work.has_value_model else (0, 0)
    activations, backward = _forward_backward(config, arch, work, stage, holding)
    adam = _adam_temporaries(config, holding)
    push = 2 * min(config.weights.staging_bytes, weights) if work.has_pushes else 0
    if work.has_pushes and config.weights.snapshot:
        push += weights
    return LearnerMemory(
        weights=weights,
        gradients=FLOAT32 * holding.total,  # Megatron's gradient buffer, reduced in float32
        optimizer=optimizer,
        reference=reference if resident else swapped if on_cpu else 0,
        value=value,
        activations=activations,
        working=max(backward, adam - activations, 0),
        push=push,
        fixed=FIXED_CPU if on_cpu else FIXED_CUDA,
        host=optimizer_on_host + value_on_host + (0 if on_cpu else swapped),
    )


def _value_model(config: RunConfig, arch: Architecture, stage: int) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer of a stage's part of the value model, on the device and on the host.

    Its passes take turns with the policy's, whose output matrix makes those the larger ones.
    """
    learner = config.learner
    holding = value_holdings(arch, LearnerLayout.of(learner))[stage]
    optimizer, on_host = _optimizer(config, holding)
    return _weights(learner, arch, stage, holding) + FLOAT32 * holding.total + optimizer, on_host


def _weights(learner: LearnerSection, arch: Architecture, stage: int, holding: Holding) -> int:
    """Weights in the learner's precision, and of layers in FP8 rows and columns first, which Transformer Engine keeps
    beside the bf16 ones it casts them from."""
    item = ITEM_BYTES[learner.weights_dtype]
    if learner.fp8 is None:
        return item * holding.total
    share = LayerShare.of(arch, learner)
    matrices = share.hidden * (share.qkv + share.query + 3 * share.ffn)
    layers = arch.layers // learner.pipeline_parallel
    at_ends = (stage == 0) + (stage == learner.pipeline_parallel - 1)
    in_fp8 = matrices * max(0, layers - at_ends * learner.fp8.bf16_layers)
    return item * holding.total + 2 * in_fp8


def _optimizer(config: RunConfig, holding: Holding) -> tuple[int, int]:
    """Bytes of Adam's state on the device and on the host."""
    learner = config.learner
    shared_by = learner.copies if learner.distributed_optimizer else 1
    numbers = -(-holding.total // shared_by)
    main_weights = 0 if learner.precision == "fp32" else FLOAT32 * numbers
    moments = 2 * FLOAT32 * numbers
    # Megatron's hybrid optimizer leaves the float32 weights on the GPU and keeps weights, gradients and moments of its
    # share on the host.
    moved = learner.optimizer_offload
    on_host = round(moved * (moments + 2 * FLOAT32 * numbers))
    return main_weights + round((1 - moved) * moments), on_host


def _adam_temporaries(config: RunConfig, holding: Holding) -> int:
    """On a CPU torch's AdamW takes a parameter at a time: sqrt(v), and that divided by the bias correction. On a GPU
    it takes all at once and keeps sqrt(v); Transformer Engine's and apex's keep nothing."""
    learner = config.learner
    shared_by = learner.copies if learner.distributed_optimizer else 1
    if config.run.device == "cpu":
        return 2 * FLOAT32 * min(holding.largest, -(-holding.total // shared_by))
    return 0 if learner.fp8 is not None else FLOAT32 * -(-holding.total // shared_by)


def _forward_backward(
    config: RunConfig, arch: Architecture, work: Work, stage: int, holding: Holding
) -> tuple[int, int]:
    """Bytes kept at the worst moment, and what the worst moment has on top."""
    learner = config.learner
    share = LayerShare.of(arch, learner)
    stages, tokens = learner.pipeline_parallel, micro_batch_tokens(config, arch, work)
    is_last = stage == stages - 1
    chunks = chunks_in_flight(stage, stages, learner.virtual_stages, micro_batches(config, arch, work))
    layers = arch.layers // (stages * learner.virtual_stages)
    row = share.item * share.hidden_kept * tokens
    kept = chunks * layers * layer_bytes(share, learner.recompute) * tokens
    if stages > 1:  # what came from the stage before and what went to the next stay until their gradients
        kept += chunks * row * ((stage > 0) + (not is_last))
    at_layer = backward_bytes(share, tokens)
    if learner.recompute == "full":
        at_layer += layer_bytes(share, "none") * tokens
    elif learner.recompute == "selective":
        at_layer += attention_kernel_bytes(share) * tokens
    at_head = 0
    if is_last:
        kept += head_bytes(share) * tokens
        at_head = _head_backward(share, holding, tokens, LOGITS_BLOCK[config.run.device])
    # Megatron's buffer for rows gathered from all tensor-parallel ranks; it is never freed.
    gathered = share.item * share.hidden * tokens if learner.sequence_parallel else 0
    return kept, max(at_layer, at_head) + gathered


def _head_backward(share: LayerShare, holding: Holding, tokens: int, logits_block: int) -> int:
    """Gradients of hidden states and output matrix (float32), and a block of logits or the matrix's cast; or, when
    those are gone, the gradients of the completions' hidden states and of all."""
    rows = min(tokens, max(1, logits_block // holding.vocabulary))
    cast = 0 if share.item == FLOAT32 else share.item
    block = (FLOAT32 + cast) * rows * holding.vocabulary
    matrix = holding.vocabulary * share.hidden
    row = share.item * share.hidden * tokens
    return row + max(FLOAT32 * matrix + max(block, cast * matrix), row)
