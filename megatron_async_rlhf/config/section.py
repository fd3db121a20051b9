"""What all sections of a configuration have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidatorFunctionWrapHandler, field_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def check_no_boolean_counts(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Python takes `true` for 1, and so does pydantic."""
        checked = check(value)
        if isinstance(value, bool) and isinstance(checked, int | float) and not isinstance(checked, bool):
            raise ValueError("input should be a number, not true or false")
        return checked
