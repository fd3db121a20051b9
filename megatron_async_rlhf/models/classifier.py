"""What a sequence classifier that gives one score is, in plain numbers, read from its `config.json`."""

import json
from pathlib import Path
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.errors import ConfigError

_SUFFIX = "ForSequenceClassification"
_LABELS = 2  # of a config.json that says nothing of them, by Transformers


class Classifier(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        context_length: tokens that it reads at most.
        vocab_size: rows of its embedding.
        pad_token_id: a sequence is scored at its last token that is another one; None: at its last.
        cache_numbers: key and value of one token and one of `kv_heads`, in all layers.
    """

    context_length: int
    vocab_size: int
    hidden_size: int
    ffn_size: int
    heads: int
    pad_token_id: int | None
    kv_heads: int
    cache_numbers: int


def read_classifier(key: str, directory: Path) -> Classifier:
    """
    Args:
        key: of the directory in the configuration.

    Raises:
        ConfigError: nothing is there, or no classifier with one label; one line.
    """
    where, path = f"{key} = {directory}", directory / "config.json"
    if not path.is_file():
        what = "no config.json there" if directory.is_dir() else "no such directory"
        raise ConfigError(f"{where}: {what}; name the Hugging Face directory of a reward model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        classes = config.get("architectures") or ["nothing"]
        labels = config.get("num_labels") or len(config.get("id2label") or range(_LABELS))
        config |= config.get("text_config") or {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{where}: config.json cannot be read ({error}); restore the file") from None
    if not str(classes[0]).endswith(_SUFFIX):
        raise ConfigError(
            f"{where}: its config.json names {classes[0]}, which gives no score; a reward model is a ...{_SUFFIX}, such as "
            "LlamaForSequenceClassification"
        )
    if labels != 1:
        raise ConfigError(
            f"{where}: it has {labels} labels (num_labels), a reward model has one; give a model that was trained with "
            "num_labels = 1"
        )
    try:
        return _numbers(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: config.json has no usable {error}; complete it") from None


def _numbers(config: dict[str, Any]) -> Classifier:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_size = int(config.get("head_dim") or hidden // heads)
    layers, kv_heads = int(config["num_hidden_layers"]), int(config.get("num_key_value_heads") or heads)
    return Classifier(
        context_length=int(config["max_position_embeddings"]),
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        ffn_size=int(config.get("intermediate_size") or 4 * hidden),
        heads=heads,
        pad_token_id=config.get("pad_token_id"),
        kv_heads=kv_heads,
        cache_numbers=2 * layers * head_size,
    )
