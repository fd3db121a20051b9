"""Keys that another key's choice leaves without effect. Whoever set one expects something that will not happen.

Only values other than the default are refused: a resolved configuration, which has every key, always loads again. What
turns a feature off (0 steps, a coefficient of 0, null, `schedule.mode = sync`) leaves the feature's other keys alone, so
that it can be turned on again; so does whatever describes a machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_async_rlhf.config.algorithm_keys import AlgorithmKeys, PolicyGradientKeys
from megatron_async_rlhf.config.algorithms import SECTIONS, OnlineDPOSection
from megatron_async_rlhf.config.section import shown

if TYPE_CHECKING:
    from megatron_async_rlhf.config.root import RunConfig


class _Needs(NamedTuple):
    """`keys` act only if the key `chooser` has one of `values`."""

    keys: tuple[str, ...]
    chooser: str
    values: tuple[Any, ...]


def _algorithms(*kinds: type[AlgorithmKeys]) -> tuple[str, ...]:
    return tuple(name for name, section in SECTIONS.items() if issubclass(section, kinds))


_NEEDS = (
    _Needs(("learner.min_learning_rate",), "learner.lr_decay", ("linear", "cosine")),
    _Needs(("warm_start.min_learning_rate",), "warm_start.lr_decay", ("cosine", "linear")),
    _Needs(("sft.min_learning_rate",), "sft.lr_decay", ("linear", "cosine")),
    _Needs(("reward_model.min_learning_rate",), "reward_model.lr_decay", ("linear", "cosine")),
    _Needs(("generator.kv_cache_gib", "launch.cores"), "run.device", ("cpu",)),
    _Needs(("generator.gpu_memory_share", "generator.cuda_graphs"), "run.device", ("cuda",)),
    _Needs(("learner.reference",), "algorithm.type", _algorithms(OnlineDPOSection, PolicyGradientKeys)),
    _Needs(("algorithm.reward_scale",), "algorithm.type", _algorithms(PolicyGradientKeys)),
    _Needs(("algorithm.cispo_high",), "algorithm.loss", ("cispo",)),
    _Needs(("launch.slurm.user", "launch.slurm.port", "launch.slurm.identity"), "launch.slurm.tunnel", ("ssh",)),
)
_COLUMNS = tuple(
    f"data.{name}"
    for name in (
        *("prompt_field", "solution_field", "chosen_field", "rejected_field", "margin_field"),
        *("reference_fields", "bad_records"),
    )
)


def check_effects(config: RunConfig) -> None:
    """
    Raises:
        ValueError: one line naming a key that was set in vain, and the key that makes it so.
    """
    for keys, chooser, values in _NEEDS:
        chosen, _ = _value_of(config, chooser)
        for key in keys:
            value, default = _value_of(config, key)
            if value != default and chosen not in values:
                raise ValueError(
                    f"{key} = {shown(value)} has no effect with {chooser} = {shown(chosen)}: remove it, or set {chooser} = "
                    f"{' or '.join(map(shown, values))}"
                )
    other, name = ("cuda", "gpu_memory_share") if config.run.device == "cpu" else ("cpu", "kv_cache_gib")
    for key, section in config.reward_models.items():
        if (value := getattr(section, name)) != type(section).model_fields[name].default:
            raise ValueError(
                f"{key}.{name} = {shown(value)} has no effect with run.device = {config.run.device}: remove it, or set "
                f"run.device = {other}"
            )
    for key in _COLUMNS:
        value, default = _value_of(config, key)
        if value != default and config.data.train == "builtin" and config.data.eval in (None, "builtin"):
            raise ValueError(
                f"{key} = {shown(value)} has no effect with data.train = builtin, which has no columns: remove it, or set data.train"
            )


def _value_of(config: RunConfig, key: str) -> tuple[Any, Any]:
    """What a key is set to, and its default; None for both where there is no such key, as in another algorithm's section."""
    section: Any = config
    *sections, name = key.split(".")
    for part in sections:
        section = getattr(section, part, None)
    if section is None or name not in type(section).model_fields:
        return None, None
    return getattr(section, name), type(section).model_fields[name].get_default(call_default_factory=True)
