"""Rules between the model's shape and the parallel layouts, with the arithmetic in the message."""

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import Fp8Keys, LearnerSection
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.models.architecture import Architecture

# What vLLM's attention on CPU can run; another size only fails once the first request arrives.
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check_layouts(config: RunConfig, arch: Architecture) -> None:
    """Refuse layouts of a run that cannot hold the model.

    Raises:
        ConfigError: one line naming key, value and rule.
    """
    check_learner_layout(config.learner, arch)
    check_tensor_parallel("generator.tensor_parallel", config.generator.tensor_parallel, arch)
    _check_padded_vocabulary("generator.tensor_parallel", config.generator.tensor_parallel, arch)
    if config.generator.max_new_tokens >= arch.context_length:
        raise ConfigError(
            f"generator.max_new_tokens = {config.generator.max_new_tokens} leaves no room for a prompt in "
            f"the context of {arch.context_length} tokens"
        )
    check_micro_batch(config.learner, config.algorithm.sequences_together, arch)
    if config.run.device == "cpu" and arch.head_dim not in _CPU_HEAD_SIZES:
        hf = config.model.hf
        whose = "" if hf is None else f"model.hf = {hf}: "
        change = "change model.heads" if hf is None else "take another model, or run this one on a GPU"
        raise ConfigError(
            f"{whose}the head size {arch.head_dim} (hidden_size / heads, or head_dim) is not one that vLLM runs on a CPU: "
            f"{', '.join(str(size) for size in _CPU_HEAD_SIZES)}; {change}"
        )


def check_learner_layout(learner: LearnerSection, arch: Architecture) -> None:
    """Refuse a layout of the learner that cannot hold the model.

    Raises:
        ConfigError: one line naming key, value and rule.
    """
    check_tensor_parallel("learner.tensor_parallel", learner.tensor_parallel, arch)
    check_interleaved_rows("learner.tensor_parallel", learner.tensor_parallel, arch)
    check_pipeline_parallel("learner.pipeline_parallel", learner.pipeline_parallel, arch)
    _check_virtual_stages(learner, arch)
    if learner.fp8 is not None:
        _check_bf16_layers(learner.fp8, learner.pipeline_parallel, arch)
        _check_fp8_sizes(learner.fp8, learner, arch)


def check_micro_batch(learner: LearnerSection, together: int, arch: Architecture) -> None:
    """Refuse a budget that one unit of a loss would exceed.

    Args:
        together: sequences that stay together.

    Raises:
        ConfigError: one line naming key, value and rule.
    """
    if learner.micro_batch_tokens < together * arch.context_length:
        what = "a preference pair of the longest sequences" if together == 2 else "one of the longest sequences"
        raise ConfigError(
            f"learner.micro_batch_tokens = {learner.micro_batch_tokens} must hold {what}: at least "
            f"{together} x {arch.context_length} = {together * arch.context_length}"
        )


def check_tensor_parallel(key: str, ranks: int, arch: Architecture) -> None:
    """Refuse ranks that do not divide the model's layers.

    Raises:
        ConfigError: one line naming `key`, value and rule.
    """
    if arch.heads % ranks:
        raise ConfigError(f"{key} = {ranks} must divide the {arch.heads} attention heads")
    if arch.ffn_size % ranks:
        raise ConfigError(f"{key} = {ranks} must divide the feed-forward size {arch.ffn_size}")
    if arch.kv_heads % ranks and ranks % arch.kv_heads:
        raise ConfigError(f"{key} = {ranks} must divide, or be a multiple of, the {arch.kv_heads} key-value heads")


def check_interleaved_rows(key: str, ranks: int, arch: Architecture) -> None:
    """Refuse ranks that do not divide query, key and value rows together, as Megatron does.

    Raises:
        ConfigError: one line naming `key`, value and rule.
    """
    rows = (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    if rows % ranks:
        raise ConfigError(
            f"{key} = {ranks} must divide the rows of query, key and value together: ({arch.heads} + 2 x "
            f"{arch.kv_heads}) heads x {arch.head_dim} = {rows}"
        )


def _check_padded_vocabulary(key: str, ranks: int, arch: Architecture) -> None:
    """vLLM pads the vocabulary to a multiple of 64 and divides that."""
    padded = -(-arch.vocab_size // 64) * 64
    if padded % ranks:
        raise ConfigError(f"{key} = {ranks} must divide the vocabulary as vLLM pads it: {padded} rows")


def check_pipeline_parallel(key: str, stages: int, arch: Architecture) -> None:
    """Refuse stages that would not have the same number of layers.

    Raises:
        ConfigError: one line naming `key`, value and rule.
    """
    if stages > arch.layers:
        raise ConfigError(f"{key} = {stages} is above the {arch.layers} layers of the model")
    if arch.layers % stages:
        raise ConfigError(
            f"{key} = {stages} must divide the model's {arch.layers} layers "
            f"({arch.layers} / {stages} leaves {arch.layers % stages})"
        )


def _check_virtual_stages(learner: LearnerSection, arch: Architecture) -> None:
    chunks = learner.pipeline_parallel * learner.virtual_stages
    if learner.virtual_stages > 1 and arch.layers % chunks:
        raise ConfigError(
            f"learner.virtual_stages = {learner.virtual_stages} on learner.pipeline_parallel = "
            f"{learner.pipeline_parallel} makes {chunks} chunks, which do not divide the model's {arch.layers} layers"
        )


def _check_bf16_layers(fp8: Fp8Keys, stages: int, arch: Architecture) -> None:
    if 2 * fp8.bf16_layers >= arch.layers:
        raise ConfigError(
            f"learner.fp8.bf16_layers = {fp8.bf16_layers} at both ends leave none of the {arch.layers} layers in FP8; "
            "lower it, or remove learner.fp8"
        )
    if fp8.bf16_layers > arch.layers // stages:
        raise ConfigError(
            f"learner.fp8.bf16_layers = {fp8.bf16_layers} is above the {arch.layers} / {stages} = {arch.layers // stages} "
            "layers of a pipeline stage; lower it, or learner.pipeline_parallel"
        )


def _check_fp8_sizes(fp8: Fp8Keys, learner: LearnerSection, arch: Architecture) -> None:
    """Both sides of every matrix, as a tensor-parallel rank has it, come in whole tiles.

    With `blockwise` a matrix may end within a block of 128, except where Transformer Engine gathers quantized rows.
    """
    ranks, tile = learner.tensor_parallel, 32 if fp8.recipe == "mxfp8" else 16
    rows = (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    for what, size, parts in (
        ("hidden size", arch.hidden_size, 1),
        ("feed-forward size", arch.ffn_size, ranks),
        ("query size, heads x head size,", arch.heads * arch.head_dim, ranks),
        ("query, key and value size together,", rows, ranks),
    ):
        if size // parts % tile:
            divided = f"{size} / {parts} = {size // parts}" if parts > 1 else f"{size}"
            raise ConfigError(
                f"learner.fp8.recipe = {fp8.recipe} needs multiples of {tile}, and the {what} on a rank is {divided}; "
                f"remove learner.fp8{', or lower learner.tensor_parallel' if parts > 1 else ''}"
            )
    if fp8.recipe == "blockwise" and learner.sequence_parallel and arch.hidden_size % 128:
        raise ConfigError(
            "learner.fp8.recipe = blockwise with learner.sequence_parallel gathers whole blocks of 128, and the hidden size "
            f"is {arch.hidden_size}; set learner.sequence_parallel = false, or learner.fp8.recipe = tensorwise"
        )
