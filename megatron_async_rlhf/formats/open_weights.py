"""Opens the weights in a directory, whoever wrote it: Hugging Face, this project, or Megatron by itself."""

from contextlib import suppress
from pathlib import Path

from megatron_async_rlhf.errors import CheckpointError, ConfigError
from megatron_async_rlhf.formats.checkpoint_weights import CheckpointWeights
from megatron_async_rlhf.formats.directory import HF_DIR, hf_files_of, is_checkpoint
from megatron_async_rlhf.formats.file_digests import check_digests
from megatron_async_rlhf.formats.hf_files import SafetensorsDirectory
from megatron_async_rlhf.formats.safetensors_files import refuse_adapter
from megatron_async_rlhf.formats.stored import WeightReader
from megatron_async_rlhf.models.architecture import Architecture, architecture_of_hf, check_causal_model
from megatron_async_rlhf.models.hf_mapping import hf_shapes


def open_checked_weights(directory: Path, config: Path | None = None) -> WeightReader:
    """As `open_weights`, once all files of a checkpoint were compared with their digests.

    Raises:
        CheckpointError: as `open_weights`; or a file is not what was written.
    """
    if is_checkpoint(directory):
        check_digests(directory)
    return open_weights(directory, config)


def open_weights(directory: Path, config: Path | None = None) -> WeightReader:
    """
    Args:
        directory: as `resolve` gives it.
        config: Hugging Face directory that describes the model, for a checkpoint that Megatron saved by itself.

    Raises:
        CheckpointError: nothing that weights can be read from.
    """
    if is_checkpoint(directory):
        return CheckpointWeights(directory, read_architecture(description_of(directory, config)))
    weights = SafetensorsDirectory(directory)
    with suppress(CheckpointError):  # without a description that we know, the order of the files has to do
        order = [name for name in hf_shapes(read_architecture(directory)) if name in weights.tensors]
        weights.tensors = {name: weights.tensors[name] for name in (*order, *weights.tensors)}
    return weights


def description_of(directory: Path, config: Path | None = None, wanted: str = "a Hugging Face model directory") -> Path:
    """Where the model's config and tokenizer are.

    Args:
        wanted: what a message asks for where there is nothing of a model.

    Raises:
        CheckpointError: a checkpoint brings none and none are given.
    """
    refuse_adapter(directory)
    found = config or hf_files_of(directory)
    if not (found / "config.json").is_file():
        if is_checkpoint(directory) and config is None:
            raise CheckpointError(
                f"{directory} has no {HF_DIR}/config.json; name the model's Hugging Face directory with --config"
            )
        raise CheckpointError(f"{found} has no config.json; give {wanted}")
    return found


def read_architecture(directory: Path, *, check_class: bool = False) -> Architecture:
    """
    Args:
        check_class: the model has to be a language model itself, or a reward model.

    Raises:
        CheckpointError: a model that is not supported.
    """
    try:
        if check_class:
            check_causal_model(directory, or_classifier=True)
        return architecture_of_hf(directory)
    except ConfigError as error:
        raise CheckpointError(str(error).removeprefix("model.hf = ")) from None
