"""Host memory that a save of a checkpoint takes: what is written is copied, on the ranks that write it.

Of the ranks that hold the same weights the first one writes. There are `tensor_parallel` of them in a pipeline stage.
"""

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.estimate.activations import FLOAT32
from megatron_async_rlhf.estimate.holdings import learner_holdings, value_holdings
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.layout import LearnerLayout


def save_memory(config: RunConfig, arch: Architecture) -> list[int]:
    """Bytes of a rank of each pipeline stage that writes, the first stage first; of the first checkpoint, which may
    bring the reference along."""
    layout = LearnerLayout.of(config.learner)
    holdings = learner_holdings(arch, layout)
    numbers = [held.total for held in holdings]
    if arch.tie_embeddings and len(numbers) > 1:  # the last stage's copy is not saved
        numbers[-1] -= holdings[-1].vocabulary * arch.hidden_size
    per_number = _bytes_per_number(config.learner)
    item = ITEM_BYTES[config.learner.weights_dtype] if config.algorithm.has_reference else 0
    stages = [(per_number + item) * count for count in numbers]
    if config.algorithm.has_value_model:
        values = value_holdings(arch, layout)
        stages = [bytes_ + per_number * held.total for bytes_, held in zip(stages, values, strict=True)]
    return stages


def _bytes_per_number(learner: LearnerSection) -> int:
    """Adam's moments, its float32 weights if it has any, and the weights; before those are copied, a flat buffer in
    which the shares of a divided optimizer come together."""
    state = 2 * FLOAT32 if learner.precision == "fp32" else 3 * FLOAT32
    weights = ITEM_BYTES[learner.weights_dtype]
    return state + (FLOAT32 if learner.distributed_optimizer else weights)
