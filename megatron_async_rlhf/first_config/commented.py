"""A configuration as YAML that says of every key what it means or why it has its value."""

from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from megatron_async_rlhf.config.described import about, meanings
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.schema import TYPED, alternatives, is_section
from megatron_async_rlhf.config.section import Section, written

_WIDTH = 120
# What is often set next, with its default, as a comment.
_FURTHER = {
    "learner": ("ranks", "tensor_parallel", "pipeline_parallel", "recompute"),
    "generator": ("replicas", "tensor_parallel", "eval_temperature"),
    "schedule": ("generation", "eval_every"),
    "data": ("prompt_field", "solution_field", "system_prompt", "instruction"),
    "checkpoint": ("keep_best", "max_run_seconds"),
}


def commented(tree: Mapping[str, Mapping[str, Any]], why: Mapping[str, str]) -> str:
    """
    Args:
        why: by `section.key`, in place of the meaning that the section's class tells.
    """
    lines: list[str] = []
    for name, keys in tree.items():
        section = _class_of(name, keys)
        told = meanings(section)
        lines += ["", *wrap(about(section), _WIDTH, initial_indent="# ", subsequent_indent="# "), f"{name}:"]
        for key, value in keys.items():
            comment = why.get(f"{name}.{key}") or told.get(key, "")
            lines += _line(f"  {key}: {written(value)}", comment)
        for key in _FURTHER.get(name, ()):
            if key not in keys:
                default = section.model_fields[key].get_default(call_default_factory=True)
                lines += _line(f"  # {key}: {written(default)}", told.get(key, ""))
    return "\n".join(lines[1:]) + "\n"


def _class_of(name: str, keys: Mapping[str, Any]) -> type[Section]:
    if name in TYPED:
        return TYPED[name][keys["type"]]
    return next(kind for kind in alternatives(RunConfig.model_fields[name].annotation) if is_section(kind))


def _line(code: str, comment: str) -> list[str]:
    if not comment:
        return [code]
    line = f"{code}  # {comment}"
    if len(line) <= _WIDTH:
        return [line]
    return [*wrap(comment, _WIDTH, initial_indent="  # ", subsequent_indent="  # "), code]
