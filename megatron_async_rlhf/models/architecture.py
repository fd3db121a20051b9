"""The shape of the policy in plain numbers, read from the config section or from a Hugging Face `config.json`."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.sections import ModelSection
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.models.families import FAMILIES, Family

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
# Keys of a `config.json` that add what neither the family tables nor the learner have, and what is supported instead.
_MUST_BE_FALSE = {
    "attention_bias": "only Qwen2's biases of query, key and value are",
    "mlp_bias": "only an MLP without biases is",
    "use_sliding_window": "only full attention is",
}
_MUST_BE_NULL = {
    "dual_chunk_attention_config": "only full attention is",
    "quantization_config": "only plain weights are",
    "compression_config": "only plain weights are",
    "transformers_weights": "only weights in model.safetensors or in the shards of its index are",
    "text_config": "only a language model by itself is",
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
    has_score_head: bool = False  # one number for each token in place of logits; then no embeddings are tied

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
        embedding = self.vocab_size * self.hidden_size
        output = 0 if self.tie_embeddings else embedding
        if self.has_score_head:
            output = self.hidden_size
        return self.layers * layer + embedding + output + self.hidden_size

    def with_score_head(self) -> "Architecture":
        """The same body with a score head."""
        return replace(self, tie_embeddings=False, has_score_head=True)

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
        ConfigError: heads that do not divide the hidden size, or cannot be grouped or rotated.
    """
    # Without `hf` the section has them all.
    assert model.layers and model.hidden_size and model.ffn_size and model.heads and model.context_length
    heads, kv_heads = model.heads, model.kv_heads or model.heads
    if model.hidden_size % heads:
        raise ConfigError(f"model.hidden_size = {model.hidden_size} must be a multiple of model.heads = {heads}")
    if (head_dim := model.hidden_size // heads) % 2:
        raise ConfigError(f"the head size {head_dim} must be even for rotary embeddings; change model.heads")
    if heads % kv_heads:
        raise ConfigError(f"model.kv_heads = {kv_heads} must divide model.heads = {heads}")
    return Architecture(
        vocab_size=vocab_size,
        layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_size=model.ffn_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
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
        if name in ("tie_embeddings", "init_std", "has_score_head"):
            continue  # it has a score head in either case, and nothing is drawn
        if found[name] != needed and not (name == "context_length" and found[name] > needed):
            raise ConfigError(
                f"{where}: its {name} = {found[name]} is not the policy's {needed}; give a model of the policy's shape, "
                "or remove algorithm.value_hf to start from the policy"
            )


def read_hf_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face directory.

    Raises:
        ConfigError: it is missing or is not a JSON object.
    """
    path = directory / "config.json"
    where = f"model.hf = {directory}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: no config.json there; give a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: config.json cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: config.json is not a JSON object")
    return found


def check_causal_model(directory: Path, *, or_classifier: bool = False) -> None:
    """Refuse a directory whose `config.json` names another class than the family's language model.

    Transformers goes by `model_type` alone, but vLLM by the class.

    Args:
        or_classifier: the family's class for sequence classification will do as well.

    Raises:
        ConfigError: it does; or see `architecture_of_hf`.
    """
    hf, where = read_hf_config(directory), f"model.hf = {directory}"
    family, named = _family_of(hf, where), hf.get("architectures")
    expected = [family.hf_class, *([family.classifier_class] if or_classifier else [])]
    if named is not None and named not in ([each] for each in expected):
        only = " and ".join(f"[{each!r}]" for each in expected)
        raise ConfigError(
            f"{where}: architectures = {named} is not supported, only {only} {'are' if or_classifier else 'is'}; save it as "
            "that"
        )


def architecture_of_hf(directory: Path) -> Architecture:
    """Shape of a Hugging Face directory of a supported dense family, as Transformers understands its `config.json`.

    Raises:
        ConfigError: another family, a feature this version does not map, or a number that is none (named in the message).
    """
    hf = read_hf_config(directory)
    where = f"model.hf = {directory}"
    family = _family_of(hf, where)
    hf = family.config_defaults | hf
    rope = _rope_parameters(hf, where)
    _refuse_unsupported(family, hf, rope, where)
    values = _Values(hf, where, family.never_null)
    hidden_size, heads = values.count("hidden_size"), values.count("num_attention_heads")
    base = next((table for table in (rope, hf) if "rope_theta" in table), {"rope_theta": 10000.0})
    arch = Architecture(
        family=family.model_type,
        vocab_size=values.count("vocab_size"),
        layers=values.count("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_size=values.count("intermediate_size"),
        heads=heads,
        kv_heads=values.count("num_key_value_heads", default=heads),
        head_dim=values.count("head_dim", default=hidden_size // heads),
        context_length=values.count("max_position_embeddings"),
        rope_theta=_Values(base, where).positive("rope_theta"),
        rope_scaling=_rope_scaling(hf, rope, where),
        norm_eps=_Values({"rms_norm_eps": 1e-6} | hf, where).fraction("rms_norm_eps"),
        tie_embeddings=_Values({"tie_word_embeddings": False} | hf, where).flag("tie_word_embeddings"),
        init_std=_Values({"initializer_range": 0.02} | hf, where).positive("initializer_range"),
    )
    _check_heads(family, arch, where)
    return arch.with_score_head() if hf.get("architectures") == [family.classifier_class] else arch


class _Values:
    """The values of a `config.json`, each refused by name if it is not what it should be."""

    def __init__(self, hf: dict[str, Any], where: str, never_null: tuple[str, ...] = ()) -> None:
        self._hf, self._where, self._never_null = hf, where, never_null

    def count(self, key: str, default: int | None = None) -> int:
        """
        Args:
            default: what stands for a key that is missing or null, where it may be.
        """
        may_be_null = key not in self._hf or key not in self._never_null
        if self._hf.get(key) is None and default is not None and may_be_null:
            return default
        return self._checked(key, int, "a positive whole number")

    def positive(self, key: str) -> float:
        return float(self._checked(key, (int, float), "a positive number"))

    def fraction(self, key: str) -> float:
        """Written with a point or an exponent, on which Transformers insists."""
        return self._checked(key, float, "a positive number with a point")

    def flag(self, key: str) -> bool:
        value = self._hf[key]
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}: {key} = {value!r} in config.json must be true or false")
        return value

    def _checked(self, key: str, kind: type[float] | tuple[type[float], ...], rule: str) -> Any:
        if key not in self._hf:
            raise ConfigError(f"{self._where}: config.json has no {key}")
        value = self._hf[key]
        if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
            raise ConfigError(f"{self._where}: {key} = {value!r} in config.json must be {rule}")
        return value


def _family_of(hf: dict[str, Any], where: str) -> Family:
    model_type, supported = hf.get("model_type"), ", ".join(FAMILIES)
    if any(hf.get(key) for key in _EXPERT_KEYS) or "moe" in str(model_type):
        raise ConfigError(
            f"{where}: model_type {model_type!r} is a mixture of experts; only dense models are supported: {supported}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"{where}: model_type {model_type!r} is not supported, only {supported} are")
    return FAMILIES[model_type]


def _rope_parameters(hf: dict[str, Any], where: str) -> dict[str, Any]:
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # the older name goes first in Transformers too
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: the rope parameters {rope!r} in config.json are not an object")
    return rope


def _check_heads(family: Family, arch: Architecture, where: str) -> None:
    """
    Raises:
        ConfigError: heads that cannot be grouped or rotated, or that vLLM or Transformers refuse.
    """
    whole = arch.hidden_size // arch.heads
    if arch.head_dim != whole and not family.free_head_size:
        raise ConfigError(
            f"{where}: head_dim = {arch.head_dim} must be hidden_size / num_attention_heads = {whole} "
            f"in the {family.model_type} family"
        )
    if arch.hidden_size % arch.heads and family.whole_heads:
        raise ConfigError(
            f"{where}: hidden_size = {arch.hidden_size} must be a multiple of num_attention_heads = {arch.heads} in the "
            f"{family.model_type} family"
        )
    if arch.head_dim % 2:
        raise ConfigError(f"{where}: the head size {arch.head_dim} (head_dim) must be even for rotary embeddings")
    if arch.heads % arch.kv_heads:
        raise ConfigError(
            f"{where}: num_key_value_heads = {arch.kv_heads} must divide num_attention_heads = {arch.heads}"
        )


def _refuse_unsupported(family: Family, hf: dict[str, Any], rope: dict[str, Any], where: str) -> None:
    """Refuse what changes the model's arithmetic in a way the learner does not follow."""
    for off, table in ((False, _MUST_BE_FALSE), (None, _MUST_BE_NULL)):
        for key, supported in table.items():
            if hf.get(key, off) is not off:
                raise ConfigError(f"{where}: {key} is not supported, {supported}")
    if forbidden := [key for key in family.forbidden if key in hf]:
        raise ConfigError(f"{where}: {forbidden[0]} is not supported in the {family.model_type} family; remove it")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act {hf['hidden_act']!r} is not supported, only silu is")
    if (types := hf.get("layer_types")) is not None and types != ["full_attention"] * _Values(hf, where).count(
        "num_hidden_layers"
    ):
        raise ConfigError(f"{where}: layer_types other than full_attention for every layer are not supported")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{where}: rope parameters that differ between layers are not supported")
    if _rope_type(rope) not in ("default", "llama3"):
        raise ConfigError(f"{where}: rope scaling {_rope_type(rope)!r} is not supported, only default and llama3 are")
    for table in (rope, hf):
        if table.get("partial_rotary_factor", 1.0) not in (1.0, None):
            rotary = table["partial_rotary_factor"]
            raise ConfigError(f"{where}: partial_rotary_factor = {rotary} is not supported, only 1.0 is")
    _refuse_sliding_window(family, hf, where)


def _refuse_sliding_window(family: Family, hf: dict[str, Any], where: str) -> None:
    window, has_switch = hf.get("sliding_window"), "use_sliding_window" in family.config_defaults
    if has_switch or window is None:  # a switch is off here, or it was refused
        return
    context = _Values(hf, where).count("max_position_embeddings")
    if not isinstance(window, int) or window < context:
        raise ConfigError(
            f"{where}: sliding_window = {window} is below max_position_embeddings = {context}, and only full attention "
            f"is supported; set max_position_embeddings = {window} to stay inside the window, or sliding_window = null"
        )


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope["rope_type"] if "rope_type" in rope else rope.get("type", "default")


def _rope_scaling(hf: dict[str, Any], rope: dict[str, Any], where: str) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    values, original = _Values(rope, f"{where}: rope parameters"), "original_max_position_embeddings"
    if original in hf:  # Transformers prefers it there
        raise ConfigError(f"{where}: {original} is only supported inside the rope parameters, not beside them")
    return RopeScaling(
        **{field.name: values.positive(field.name) for field in fields(RopeScaling) if field.name != original},
        original_max_position_embeddings=values.count(original),
    )
