"""The shape of the policy in plain numbers, read from the config section or from a Hugging Face `config.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.sections import ModelSection
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.weights.families import FAMILIES


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense decoder. `vocab_size` is the tokenizer's; any padding is a layout's own affair."""

    family: str = "llama"  # a key of `FAMILIES`
    vocab_size: int
    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    init_std: float = 0.02

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.family].qkv_bias

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.family].qk_norm

    @property
    def num_parameters(self) -> int:
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.heads + 2 * self.kv_heads)
        if self.qk_norm:
            attention += 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.layers * layer + embeddings + self.hidden_size

    def to_hf(self, *, eos_token_id: int, bos_token_id: int | None = None, pad_token_id: int | None = None) -> dict:
        """The `config.json` that Transformers and vLLM read, weights in float32."""
        return {
            "architectures": [FAMILIES[self.family].hf_class],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context_length,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "sliding_window": None,
            "initializer_range": self.init_std,
            "eos_token_id": eos_token_id,
            "bos_token_id": bos_token_id,
            "pad_token_id": pad_token_id,
            "dtype": "float32",
        }


def architecture_of(model: ModelSection, vocab_size: int) -> Architecture:
    """Shape of a fresh model from its config section; `vocab_size` comes from its tokenizer."""
    heads = model.heads
    return Architecture(
        vocab_size=vocab_size,
        layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_size=model.ffn_size,
        heads=heads,
        kv_heads=model.kv_heads or heads,
        head_dim=model.hidden_size // heads,
        context_length=model.context_length,
        rope_theta=model.rope_theta or 10000.0,
        norm_eps=model.norm_eps or 1e-5,
        tie_embeddings=bool(model.tie_embeddings),
        init_std=model.init_std or 0.02,
    )


def read_hf_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face directory.

    Raises:
        ConfigError: it is missing or is not JSON.
    """
    path = directory / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"model.hf = {directory}: no config.json there; give a Hugging Face model directory"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.hf = {directory}: config.json cannot be read ({error})") from None


def architecture_of_hf(directory: Path) -> Architecture:
    """Shape of a Hugging Face Llama directory.

    Raises:
        ConfigError: another family, or a feature this version does not map (named in the message).
    """
    hf = read_hf_config(directory)
    where = f"model.hf = {directory}"
    if hf.get("model_type") != "llama":
        raise ConfigError(f"{where}: model_type {hf.get('model_type')!r} is not supported, only llama is")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(f"{where}: rope scaling {rope_type!r} is not supported, only default is")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ConfigError(f"{where}: {key} = true is not supported, only models without biases are")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act {hf['hidden_act']!r} is not supported, only silu is")
    try:
        heads = hf["num_attention_heads"]
        return Architecture(
            vocab_size=hf["vocab_size"],
            layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_size=hf["intermediate_size"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            context_length=hf["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            init_std=hf.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ConfigError(f"{where}: config.json has no {error.args[0]}") from None
