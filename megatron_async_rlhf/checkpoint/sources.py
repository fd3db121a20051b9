"""Finds the weights behind a name: a Hugging Face directory, a checkpoint, a run, or a running generator."""

from contextlib import suppress
from pathlib import Path

from megatron_async_rlhf.checkpoint.directory import HF_DIR, hf_files_of, is_checkpoint
from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.checkpoint.weights import CheckpointWeights
from megatron_async_rlhf.config.architecture import Architecture, architecture_of_hf, check_causal_model
from megatron_async_rlhf.errors import CheckpointError, ConfigError
from megatron_async_rlhf.generator.vllm.live_weights import LiveWeights
from megatron_async_rlhf.telemetry.files import EXPORT_DIR, RESOLVED_CONFIG
from megatron_async_rlhf.telemetry.summary import read_summary
from megatron_async_rlhf.weights.hf_files import SafetensorsDirectory
from megatron_async_rlhf.weights.hf_mapping import hf_shapes
from megatron_async_rlhf.weights.safetensors_files import refuse_adapter
from megatron_async_rlhf.weights.stored import WeightReader
from megatron_async_rlhf.weights.verify import StoredWeights, WeightHolder


def resolve(path: Path) -> Path:
    """The directory with the weights: `path`, or the last policy of the run that `path` is.

    That is what a completed run exported; of any other run the newest checkpoint, or its export if it has none.

    Raises:
        CheckpointError: it is no directory, or a run that has saved nothing.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    if not (path / RESOLVED_CONFIG).is_file():
        return path
    places = RunCheckpoints(path)
    versions = places.versions()
    if versions and read_summary(path).get("status") != "completed":
        return places.path(versions[-1])
    if not (path / EXPORT_DIR).is_dir():
        raise CheckpointError(f"{path} is a run without {EXPORT_DIR} and without a checkpoint: it has not got that far")
    return path / EXPORT_DIR


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


def open_holders(a: str, b: str, config: Path | None = None) -> tuple[WeightHolder, WeightHolder]:
    """Two holders to compare: directories, or URLs of running generators.

    Either describes the model for a checkpoint on the other side that has no description.

    Raises:
        CheckpointError: one of them has nothing that weights can be read from.
    """
    paths = {source: resolve(Path(source)) for source in (a, b) if not is_url(source)}
    described = [path for path in paths.values() if (hf_files_of(path) / "config.json").is_file()]
    borrowed = hf_files_of(described[0]) if described else None

    def open_holder(source: str) -> WeightHolder:
        if is_url(source):
            return LiveWeights(source)
        path = paths[source]
        return StoredWeights(open_weights(path, config or (None if path in described else borrowed)))

    return open_holder(a), open_holder(b)


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


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


def read_architecture(directory: Path, *, causal: bool = False) -> Architecture:
    """
    Args:
        causal: the model has to be a language model itself.

    Raises:
        CheckpointError: a model that is not supported.
    """
    try:
        if causal:
            check_causal_model(directory)
        return architecture_of_hf(directory)
    except ConfigError as error:
        raise CheckpointError(str(error).removeprefix("model.hf = ")) from None
