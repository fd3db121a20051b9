"""The classes of Transformers 5.19 that build a tokenizer of their own from the vocabulary in `tokenizer.json`.

All others take the file as it is. Which class a directory gets depends on its `model_type` and `tokenizer_class`.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_async_rlhf.errors import DataError

# Read alike by both, a class and a file go by the same rules; Transformers' class wins where both read it otherwise.
PROBE = "It's 1234567 words, isn't it?\n\n  Größe: x_1 += 2.5; 日本語 🦆\tend"
_TAKES_THE_FILE = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
_REBUILT = ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")
_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def class_of(directory: Path, named: Any) -> str | None:
    """The class that Transformers chooses, or None if it takes `tokenizer.json` as it is.

    Args:
        named: `tokenizer_class` of `tokenizer_config.json`.

    Raises:
        DataError: a class that is not supported.
    """
    config = _model_config(directory)
    model_type = config.get("model_type")
    named = named or config.get("tokenizer_class")
    named = named.removesuffix("Fast") if isinstance(named, str) else None
    if model_type == "qwen2":
        return "Qwen2Tokenizer"  # Transformers holds what these directories name for wrong
    if model_type == "qwen3" and named is None:
        return "Qwen2Tokenizer"
    if model_type == "mistral" and ((directory / "tekken.json").exists() or named == "MistralCommonBackend"):
        raise DataError(
            f"{directory}: Transformers would read the tokenizer from tekken.json, which is not supported; to go by "
            "tokenizer.json, remove tekken.json and any tokenizer_class from tokenizer_config.json"
        )
    if model_type == "mistral" or named is None or named in _TAKES_THE_FILE:
        return None
    if named not in _REBUILT:
        raise DataError(
            f"{directory}: tokenizer_class {named!r} is not supported, only {', '.join(_REBUILT)} and "
            "PreTrainedTokenizerFast, which takes tokenizer.json as it is, are; set it to that in tokenizer_config.json"
        )
    return named


def rebuild(name: str, model: Any, settings: dict[str, Any]) -> tuple[Tokenizer, dict[str, str | None]]:
    """The tokenizer that a class builds, without added tokens, and the special tokens that it has by default.

    Args:
        model: that of `tokenizer.json`: vocabulary and merges.
        settings: those of `tokenizer_config.json`.

    Raises:
        Exception: no vocabulary for this class.
    """
    vocab, merges = model["vocab"], [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    space = settings.get("add_prefix_space")
    if name == "LlamaTokenizer":
        return _llama(vocab, merges, space is None or bool(space), bool(settings.get("legacy"))), {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
        }
    end = "<|endoftext|>"
    empty = {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, **empty))
    backend.decoder = decoders.ByteLevel()
    if name == "GPT2Tokenizer":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(space))
        return backend, {"unk_token": end, "bos_token": end, "eos_token": end, "pad_token": None}
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_PIECES), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=bool(space), use_regex=False),
        ]
    )
    return backend, {"unk_token": end, "bos_token": None, "eos_token": end, "pad_token": end}


def _llama(vocab: dict[str, int], merges: list[tuple[str, str]], space: bool, legacy: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    scheme = ("always" if legacy else "first") if space else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(content=" ", left=1)] if space else [])])
    return backend


def _model_config(directory: Path) -> dict[str, Any]:
    """`config.json`; empty if there is none, as beside a tokenizer alone. Whether it is a model's is checked elsewhere."""
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
