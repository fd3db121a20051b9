"""The `reward` section: what scores completions. One entry, or a list of entries whose weighted scores are summed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.config.section import FunctionName
from megatron_async_rlhf.config.written_key import Key, ReportingSection
from megatron_async_rlhf.user_functions import split_name

_EXACT = Key("exact", "share", "of completions with the right answer (`builtin`, `gsm8k`)", "reward")


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


class BuiltinRewardSection(RewardKeys):
    """Graded answers to the prompts of `data.train: builtin`."""

    own_metrics: ClassVar[tuple[Key, ...]] = (_EXACT,)

    type: Literal["builtin"] = "builtin"


class Gsm8kRewardSection(RewardKeys):
    """1 for the right number behind `####`, less for a well-formed answer that is wrong, 0 otherwise."""

    own_metrics: ClassVar[tuple[Key, ...]] = (
        _EXACT,
        Key("well_formed", "share", "of completions with an answer in the expected form (`gsm8k`)", "reward"),
    )

    type: Literal["gsm8k"] = "gsm8k"
    format_reward: float = Field(0.1, ge=0, le=1)  # for a well-formed `#### <number>` that is wrong


class FunctionRewardSection(RewardKeys):
    """A Python function of one's own, called in worker processes with a prompt and all its completions."""

    own_metrics: ClassVar[tuple[Key, ...]] = (
        Key(
            "reward_failed", "share",
            "of completions for which the function failed (`function` with `on_error: zero`)",
            "reward", lambda keys: keys.on_error == "zero",
        ),
    )  # fmt: skip

    type: Literal["function"] = "function"
    function: FunctionName  # FILE.py:NAME, or package.module.NAME
    kwargs: dict[str, Any] = Field(default_factory=dict)  # further keyword arguments of every call
    workers: PositiveInt = 2  # processes that call it, on the controller's machine
    timeout_s: PositiveFloat = 60.0  # of one call; a process's first call also imports the function
    on_error: Literal["fail", "zero"] = "fail"  # a call that fails ends the run, or earns its completions 0

    @property
    def title(self) -> str:
        return self.name or split_name(self.function)[1]


REWARDS: dict[str, type[RewardKeys]] = {
    "builtin": BuiltinRewardSection,
    "gsm8k": Gsm8kRewardSection,
    "function": FunctionRewardSection,
}


def _type_of(value: Any) -> str | None:
    """The tag of a tree from YAML or of a section; the built-in reward where nothing is said."""
    return value.get("type", "builtin") if isinstance(value, dict) else getattr(value, "type", None)


def _form_of(value: Any) -> str | None:
    return "list" if isinstance(value, list | tuple) else _type_of(value)


_Builtin = Annotated[BuiltinRewardSection, Tag("builtin")]
_Gsm8k = Annotated[Gsm8kRewardSection, Tag("gsm8k")]
_Function = Annotated[FunctionRewardSection, Tag("function")]
RewardEntry = Annotated[
    _Builtin | _Gsm8k | _Function,
    Discriminator(_type_of, custom_error_type="type_of_section", custom_error_message="unknown"),
]
RewardSection = Annotated[
    _Builtin | _Gsm8k | _Function | Annotated[list[RewardEntry], Tag("list"), Field(min_length=1)],
    Discriminator(_form_of, custom_error_type="type_of_section", custom_error_message="unknown"),
]


def check_reward_fits_data(reward: RewardKeys, data: DataSection) -> None:
    """
    Raises:
        ValueError: the reward needs other data, or is given something twice.
    """
    if isinstance(reward, BuiltinRewardSection) and data.train != "builtin":
        train = data.train
        nowhere = "" if train.startswith("hf:") or Path(train).exists() else " (and there is no such file here)"
        raise ValueError(
            f"reward.type = builtin scores the built-in prompts alone, not those of data.train = {train}{nowhere}: set "
            "reward.type = gsm8k if the solutions in data.solution_field end in a line `#### <number>`, or reward.type = "
            "function with a function of your own"
        )
    if isinstance(reward, Gsm8kRewardSection) and (data.train == "builtin" or data.solution_field is None):
        raise ValueError(
            "reward.type = gsm8k needs data.train and data.solution_field, the field with solutions that end in a line "
            "`#### <number>`"
        )
    if isinstance(reward, FunctionRewardSection):
        columns = [*data.reference_fields, *(["solution"] if data.solution_field else [])]
        for name in reward.kwargs:
            if name in ("prompt", "completions", *columns):
                raise ValueError(
                    f"reward.kwargs.{name}: {reward.function} is given its {name} by that name; rename one"
                )
