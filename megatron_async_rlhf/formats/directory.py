"""What lies in a checkpoint directory and in the Hugging Face files beside its weights. No torch."""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_async_rlhf.errors import CheckpointError

FORMAT = "metadata.json"  # says which of Megatron's formats this is
COMMON = "common.pt"  # Megatron's own state that is not sharded
TENSORS = ".metadata"  # which tensor lies where
HF_DIR = "hf"  # ours: config, tokenizer and generation config, so that a checkpoint needs nothing else
_TORCH_DIST = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
HF_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates",
    "chat_template.json",
    "tekken.json",
)


def is_checkpoint(directory: Path) -> bool:
    """Whether this is a Megatron checkpoint, of whatever format."""
    if not (directory / FORMAT).is_file():
        return False
    # Other programs write files of that name too; Megatron never beside safetensors.
    return (directory / TENSORS).is_file() or not any(directory.glob("*.safetensors"))


def check_format(directory: Path) -> None:
    """
    Raises:
        CheckpointError: not a complete checkpoint in the format `torch_dist`.
    """
    path = directory / FORMAT
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    if backend != "torch_dist":
        raise CheckpointError(f"{directory} is a checkpoint in the format {backend}, only torch_dist can be read")
    if not (directory / TENSORS).is_file():
        raise CheckpointError(f"{directory} has no {TENSORS}: saving it was interrupted, or not all of it was copied")


def write_format(directory: Path) -> None:
    (directory / FORMAT).write_text(json.dumps(_TORCH_DIST), encoding="utf-8")


def hf_files_of(directory: Path) -> Path:
    """Where the config and tokenizer of a Hugging Face directory or of an imported checkpoint are."""
    return directory / HF_DIR if is_checkpoint(directory) else directory


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and generation config, as far as there are any."""
    target.mkdir(parents=True, exist_ok=True)
    for name in HF_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        elif (source / name).exists():
            shutil.copyfile(source / name, target / name)


def describe_weights(source: Path, target: Path, dtype: str) -> None:
    """Copy config and tokenizer to where the weights are; the config names the dtype they have there."""
    copy_hf_files(source, target)
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if any(config.get(key) != dtype for key in keys):
        path.write_text(json.dumps(config | dict.fromkeys(keys, dtype), indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write into that takes the name `path` only once everything is in it.

    Raises:
        CheckpointError: `path` is there and not empty, or cannot be written. Nothing is left then.
    """
    path = path.absolute()
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path} exists and is not empty; choose another name")
        # Not by the process: in containers each has the same number, and one that was killed has left its directory.
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error})") from None
