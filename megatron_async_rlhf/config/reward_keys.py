"""What all types of rewards have in common in a configuration."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from megatron_async_rlhf.config.written_key import ReportingSection


class RewardKeys(ReportingSection):
    """What all types of rewards have; metrics are of each completion."""

    if TYPE_CHECKING:
        type: str  # each class below has its own as a field

    name: str | None = Field(None, pattern=r"^[A-Za-z_][\w.-]*$")  # of its metrics in a list; default: its type
    weight: float = 1.0  # of its scores, in the sum that is trained on

    @property
    def title(self) -> str:
        return self.name or self.type

    @model_validator(mode="before")
    @classmethod
    def drop_key_of_another_type(cls, tree: Any) -> Any:
        """The resolved configurations of version 0.1.0 have `format_reward` whatever the type is."""
        if isinstance(tree, dict) and "format_reward" not in cls.model_fields and tree.get("format_reward") == 0.1:
            return {key: value for key, value in tree.items() if key != "format_reward"}
        return tree
