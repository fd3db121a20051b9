"""Finds the weights behind a name: a Hugging Face directory, a checkpoint, a run, or a running generator."""

from pathlib import Path

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.directory import hf_files_of
from megatron_async_rlhf.formats.holder import StoredWeights, WeightHolder
from megatron_async_rlhf.formats.open_weights import open_weights
from megatron_async_rlhf.generator.vllm.live_weights import LiveWeights
from megatron_async_rlhf.telemetry.files import EXPORT_DIR, RESOLVED_CONFIG
from megatron_async_rlhf.telemetry.summary import read_summary


def resolve(path: Path) -> Path:
    """The directory with the weights: `path`, or the last policy of the run that `path` is.

    That is what a completed run exported; of any other run the newest checkpoint, or its export if it has none.

    Raises:
        CheckpointError: it is no directory, or a run that has saved nothing.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such directory; give a run, a checkpoint or a Hugging Face model")
    if not (path / RESOLVED_CONFIG).is_file():
        return path
    checkpoints = RunCheckpoints(path)
    versions = checkpoints.versions()
    if versions and read_summary(path).get("status") != "completed":
        return checkpoints.path(versions[-1])
    if not (path / EXPORT_DIR).is_dir():
        raise CheckpointError(f"{path} is a run without {EXPORT_DIR} and without a checkpoint: it has not got that far")
    return path / EXPORT_DIR


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
