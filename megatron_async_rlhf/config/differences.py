"""What of a configuration was chosen: the keys whose values are not their defaults."""

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_async_rlhf.config.root import RunConfig


def differences(config: RunConfig) -> dict[str, Any]:
    """Value by key, such as `schedule.max_staleness`, in the order of the configuration; keys without a default are included.

    An entry of a list of sections has a number for its name: `reward.0.weight`.
    """
    return dict(_chosen("", config))


def _chosen(prefix: str, section: BaseModel) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    dumped = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            within = _chosen(f"{key}.", value)
            is_there = not field.is_required() and _default_of(field) is None  # which alone makes a difference
            found += within or ([(key, dumped[name])] if is_there else [])
        elif isinstance(value, list) and value and all(isinstance(entry, BaseModel) for entry in value):
            for place, entry in enumerate(value):
                found += _chosen(f"{key}.{place}.", entry)
        elif (name == "type" and _says_which(field)) or field.is_required() or value != _default_of(field):
            found.append((key, dumped[name]))
    return found


def _says_which(field: FieldInfo) -> bool:
    """One value is all that its class allows."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def _default_of(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)
