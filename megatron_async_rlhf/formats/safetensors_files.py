"""Which safetensors files a Hugging Face directory consists of, and what lies where in them. No torch.

The files are those that Transformers loads: `model.safetensors`, or else the shards that the index names. Everything
comes from the headers of the files; values are only read to compare the two embeddings of a tied model.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.tensor_spec import TensorSpec

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"
# What other programs call the weights of a model, or a part of them.
_WEIGHT_FILES = (
    "*.safetensors*",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
)
_LONGEST_HEADER = 100 * 10**6  # the limit of the safetensors library
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor and where its values begin: byte `offset` of `path`."""

    spec: TensorSpec
    path: Path
    offset: int


def find_weights(directory: Path) -> dict[str, TensorPlace]:
    """Every weight of a directory by name, file by file, each in the order of its bytes.

    Two kinds of tensors that Transformers ignores are left out: rotary tables of old files, and the output matrix of a
    tied model if it has the same bytes as the embedding. If it has others, it stays, and so has no place in the model.

    Raises:
        CheckpointError: no safetensors files, or one that is broken, truncated or of a dtype that is no weight's.
    """
    found: dict[str, TensorPlace] = {}
    for path, announced in find_files(directory).items():
        here = _tensors_of(path)
        for name in here:
            if name in found:
                raise CheckpointError(f"{path} has tensor {name}, and so has {found[name].path.name}")
        if missing := [name for name in announced if name not in here]:
            raise CheckpointError(f"{path} has no tensor {missing[0]}, which {INDEX} says it has")
        found |= {name: place for name, place in here.items() if not _is_rotary_table(name)}
    if {EMBEDDING, OUTPUT} <= found.keys() and is_tied(directory) and _same_bytes(found[EMBEDDING], found[OUTPUT]):
        del found[OUTPUT]
    return found


def weight_files(directory: Path) -> list[str]:
    """Names of all files that look like weights, of whatever format; of an adapter too."""
    names = {path.name for pattern in (*_WEIGHT_FILES, ADAPTER) for path in directory.glob(pattern)}
    return sorted(names - {"training_args.bin", "optimizer.pt", "scheduler.pt"})  # what the Trainer leaves there


def is_tied(directory: Path) -> bool:
    """Whether the `config.json` there ties the output matrix to the embedding."""
    try:
        return bool(json.loads((directory / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"))
    except (OSError, ValueError, AttributeError):
        return False


def refuse_adapter(directory: Path) -> None:
    """
    Raises:
        CheckpointError: what is there is not a whole model.
    """
    if (directory / ADAPTER).exists():
        raise CheckpointError(
            f"{directory} holds an adapter ({ADAPTER}), such as LoRA's, which is not a whole model: merge it into its "
            "base model (PEFT: merge_and_unload().save_pretrained) and name the directory of the result"
        )


def find_files(directory: Path) -> dict[Path, list[str]]:
    """The safetensors files, each with the names that the index, where it is what counts, announces.

    Raises:
        CheckpointError: none that Transformers would load.
    """
    refuse_adapter(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file() or single.is_symlink():
        return {single: []}
    if not index.exists():
        others = [name for name in weight_files(directory) if name != INDEX]
        only = f", only {', '.join(others[:3])}" if others else ""
        raise CheckpointError(
            f"{directory} holds no {SINGLE} and no {INDEX}{only}; save the whole model there with Transformers' "
            "save_pretrained"
        )
    try:
        files: dict[Path, list[str]] = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(directory / file, []).append(name)
        return dict(sorted(files.items()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({type(error).__name__}: {error})") from None


def _tensors_of(path: Path) -> dict[str, TensorPlace]:
    header, start, size = _read_header(path)
    found: dict[str, TensorPlace] = {}
    end = 0
    for name, (code, shape, first, last) in sorted(header.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise CheckpointError(f"{path}: {name} begins at byte {first} of the values, not behind the one before it")
        end = last
        if code not in CODES and not _is_rotary_table(name):
            raise CheckpointError(
                f"{path}: {name} is {code}; only weights in {', '.join(CODES)} can be read: save the model in one of these"
            )
        spec = TensorSpec(name, shape, CODES.get(code, code))
        found[name] = TensorPlace(spec, path, start + first)
        if code in CODES and last - first != spec.num_bytes:
            raise CheckpointError(f"{path}: {name} of shape {shape} cannot lie in {last - first} bytes")
    if size != start + end:
        raise CheckpointError(f"{path} is {size} bytes long, but its header describes {start + end}: copy it again")
    return found


def _read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], int, int]:
    """Dtype code, shape, first and end byte of every tensor of a file; where they are counted from; the file's size.

    Raises:
        CheckpointError: it is missing, or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            text = file.read(min(length, _LONGEST_HEADER))
    except FileNotFoundError:
        named = "is a link to a file that is not there" if path.is_symlink() else f"is missing, but {INDEX} names it"
        raise CheckpointError(f"{path} {named}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    if prefix == b"version ":
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` there")
    if size < 8 or len(text) < length:
        raise CheckpointError(f"{path} is not a safetensors file, or only the beginning of one")
    try:
        header = json.loads(text)
        about = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in about.values()):
            raise ValueError("what it says about the file must be strings")
        return {name: _entry(entry) for name, entry in header.items()}, 8 + length, size
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header cannot be read ({type(error).__name__}: {error})") from None


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    first, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    if not 0 <= first <= end or min(shape, default=0) < 0:
        raise ValueError(f"offsets {first} to {end} of shape {shape}")
    return str(entry["dtype"]), shape, first, end


def _is_rotary_table(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")


def _same_bytes(one: TensorPlace, other: TensorPlace) -> bool:
    if (one.spec.shape, one.spec.dtype) != (other.spec.shape, other.spec.dtype):
        return False
    try:
        with one.path.open("rb") as first, other.path.open("rb") as second:
            first.seek(one.offset)
            second.seek(other.offset)
            left = one.spec.num_bytes
            while left > 0:
                size = min(left, _BLOCK_BYTES)
                if first.read(size) != second.read(size):
                    return False
                left -= size
    except OSError as error:
        raise CheckpointError(f"{one.path} cannot be read ({error.strerror or error})") from None
    return True
