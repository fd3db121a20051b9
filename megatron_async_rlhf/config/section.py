"""What all sections of a configuration have in common."""

import os
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from megatron_async_rlhf.user_functions import split_name


def _expand_user(path: str) -> str:
    """No shell expands the `~` of `-s run.dir=~/x`."""
    return os.path.expanduser(path)


LocalPath = Annotated[Path, AfterValidator(lambda path: Path(_expand_user(str(path))))]


def _check_function_name(function: str) -> str:
    split_name(function)
    return function


FunctionName = Annotated[str, AfterValidator(_expand_user), AfterValidator(_check_function_name)]
LocalSource = Annotated[str, AfterValidator(_expand_user)]  # a path, or what is none


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def check_no_boolean_counts(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Python takes `true` for 1, and so does pydantic."""
        checked = check(value)
        if isinstance(value, bool) and isinstance(checked, int | float) and not isinstance(checked, bool):
            raise ValueError("must be a number, not true or false")
        return checked


def synonyms(**names: tuple[str, ...]) -> BeforeValidator:
    """For a field of text: each name with what else people write for it, in any case."""
    known = {other: name for name, others in names.items() for other in others}

    def resolve(value: Any) -> Any:
        return known.get(value.strip().lower().removeprefix("torch."), value) if isinstance(value, str) else value

    return BeforeValidator(resolve)


def shown(value: Any) -> str:
    """As `written`, cut short."""
    text = written(value)
    return text if len(text) <= 80 else text[:77] + "..."


def written(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    if value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    elif isinstance(value, dict | list | tuple):
        value = list(value) if isinstance(value, tuple) else value
        try:
            text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True, sort_keys=False)
        except yaml.YAMLError:
            text = str(value)
    else:
        text = str(value)
    return " ".join(text.split())
