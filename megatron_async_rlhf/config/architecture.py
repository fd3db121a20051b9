"""The shape of the policy in plain numbers, read from the config section or from a Hugging Face `config.json`."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.sections import ModelSection
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.weights.families import FAMILIES, Family

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
# Keys of a `config.json` that add what neither the family tables nor the learner have, and what is supported instead.
_MUST_BE_OFF = {
    "attention_bias": "only Qwen2's biases of query, key and value are",
    "mlp_bias": "only an MLP without biases is",
    "use_sliding_window": "only full attention is",
    "dual_chunk_attention_config": "only full attention is",
    "quantization_config": "only plain weights are",
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's slowing down of the low rotary frequencies; the names are those of `config.json`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


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
    rope_scaling: RopeScaling | None = None
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
        scaling = self.rope_scaling and {"rope_type": "llama3"} | asdict(self.rope_scaling)
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
            "rope_scaling": scaling,
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
    """Shape of a fresh Llama from its config section; `vocab_size` comes from its tokenizer.

    Raises:
        ConfigError: heads that do not divide the hidden size.
    """
    heads = model.heads
    if model.hidden_size % heads:
        raise ConfigError(f"model.hidden_size = {model.hidden_size} must be a multiple of model.heads = {heads}")
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


def policy_architecture(model: ModelSection, template: Path) -> Architecture:
    """Shape of a run's policy, from the Hugging Face files in `template`; a shorter context is the config's.

    Raises:
        ConfigError: see `architecture_of_hf`; or a context beyond what the model was made for.
    """
    arch = architecture_of_hf(template)
    asked = model.context_length or arch.context_length
    if asked > arch.context_length:
        raise ConfigError(
            f"model.context_length = {asked} is above the {arch.context_length} positions of {model.hf}; lower it"
        )
    return replace(arch, context_length=asked)


def check_value_architecture(source: Path, directory: Path, policy: Architecture) -> None:
    """Refuse a model to start the value model from that is not of the policy's shape.

    Args:
        source: `algorithm.value_hf`.
        directory: where its `config.json` is.

    Raises:
        ConfigError: one line naming the first number that differs; or see `architecture_of_hf`.
    """
    where = f"algorithm.value_hf = {source}"
    try:
        found = asdict(architecture_of_hf(directory))
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"model.hf = {directory}", where, 1)) from None
    for name, needed in asdict(policy).items():
        if name in ("tie_embeddings", "init_std"):
            continue  # it has no output matrix, and nothing is drawn
        if found[name] != needed and not (name == "context_length" and found[name] > needed):
            raise ConfigError(
                f"{where}: its {name} = {found[name]} is not the policy's {needed}; give a model of the policy's shape, "
                "or remove algorithm.value_hf to start from the policy"
            )


def read_hf_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face directory.

    Raises:
        ConfigError: it is missing or is not JSON.
    """
    path = directory / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"model.hf = {directory}: no config.json there; give a Hugging Face model directory"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.hf = {directory}: config.json cannot be read ({error})") from None


def architecture_of_hf(directory: Path) -> Architecture:
    """Shape of a Hugging Face directory of a supported dense family.

    Raises:
        ConfigError: another family, or a feature this version does not map (named in the message).
    """
    hf = read_hf_config(directory)
    where = f"model.hf = {directory}"
    family = _family_of(hf, where)
    hf = family.config_defaults | hf
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # the older name goes first in Transformers too
    _refuse_unsupported(family, hf, rope, where)
    try:
        heads, hidden_size = hf["num_attention_heads"], hf["hidden_size"]
        head_dim = hf.get("head_dim") or hidden_size // heads
        if head_dim != hidden_size // heads and not family.free_head_size:
            raise ConfigError(
                f"{where}: head_dim = {head_dim} must be hidden_size / num_attention_heads = {hidden_size // heads} "
                f"in the {family.model_type} family"
            )
        return Architecture(
            family=family.model_type,
            vocab_size=hf["vocab_size"],
            layers=hf["num_hidden_layers"],
            hidden_size=hidden_size,
            ffn_size=hf["intermediate_size"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            context_length=hf["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            init_std=hf.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ConfigError(f"{where}: config.json has no {error.args[0]}") from None


def _family_of(hf: dict[str, Any], where: str) -> Family:
    model_type, supported = hf.get("model_type"), ", ".join(FAMILIES)
    if any(hf.get(key) for key in _EXPERT_KEYS) or "moe" in str(model_type):
        raise ConfigError(
            f"{where}: model_type {model_type!r} is a mixture of experts; only dense models are supported: {supported}"
        )
    if model_type not in FAMILIES:
        raise ConfigError(f"{where}: model_type {model_type!r} is not supported, only {supported} are")
    return FAMILIES[model_type]


def _refuse_unsupported(family: Family, hf: dict[str, Any], rope: dict[str, Any], where: str) -> None:
    """Refuse what changes the model's arithmetic in a way the learner does not follow."""
    for key, supported in _MUST_BE_OFF.items():
        if hf.get(key):
            raise ConfigError(f"{where}: {key} is not supported, {supported}")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act {hf['hidden_act']!r} is not supported, only silu is")
    if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
        raise ConfigError(f"{where}: layer_types other than full_attention are not supported")
    window, context = hf.get("sliding_window"), hf.get("max_position_embeddings", 0)
    has_switch = "use_sliding_window" in family.config_defaults  # off, or it was refused above
    if not has_switch and window is not None and window < context:
        raise ConfigError(
            f"{where}: sliding_window = {window} is below max_position_embeddings = {context}, and only full attention "
            f"is supported; set max_position_embeddings = {window} to stay inside the window, or sliding_window = null"
        )
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{where}: rope parameters that differ between layers are not supported")
    if _rope_type(rope) not in ("default", "llama3"):
        raise ConfigError(f"{where}: rope scaling {_rope_type(rope)!r} is not supported, only default and llama3 are")
    rotary = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if rotary != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor = {rotary} is not supported, only 1.0 is")


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    return RopeScaling(**{field.name: rope[field.name] for field in fields(RopeScaling)})
