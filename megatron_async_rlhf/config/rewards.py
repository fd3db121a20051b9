"""The `reward` section: what scores completions. One entry, or a list of entries whose weighted scores are summed."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.config.judge import JudgeRewardSection
from megatron_async_rlhf.config.reward_keys import RewardKeys, VerifierKeys, WorkerKeys
from megatron_async_rlhf.config.reward_model_section import RewardModelSection
from megatron_async_rlhf.config.section import FunctionName
from megatron_async_rlhf.config.written_key import Key
from megatron_async_rlhf.user_functions import split_name

_EXACT = Key("exact", "share", "of completions with the right answer (`builtin`, `gsm8k`, `math`)", "reward")


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

    @property
    def reads_solution(self) -> bool:
        return True


class FunctionRewardSection(WorkerKeys):
    """A Python function of one's own, called in worker processes with a prompt and all its completions."""

    type: Literal["function"] = "function"
    function: FunctionName  # FILE.py:NAME, or package.module.NAME
    kwargs: dict[str, Any] = Field(default_factory=dict)  # further keyword arguments of every call

    @property
    def title(self) -> str:
        return self.name or split_name(self.function)[1]


class IfevalRewardSection(VerifierKeys):
    """Whether a completion follows the prompt's instructions, as Google's IFEval checks them."""

    own_metrics: ClassVar[tuple[Key, ...]] = (
        Key("prompt_strict", "share", "of completions that follow all their instructions (`ifeval`)", "reward"),
        Key("instruction_strict", "share", "of its instructions that a completion follows (`ifeval`)", "reward"),
        Key("prompt_loose", "share", "the first with all that `mode: loose` forgives (`ifeval`)", "reward"),
        Key("instruction_loose", "share", "the second with all that `mode: loose` forgives (`ifeval`)", "reward"),
    )
    columns = ("instruction_id_list", "kwargs")
    packages = ("if_verifiable", "langdetect", "nltk")

    type: Literal["ifeval"] = "ifeval"
    mode: Literal["strict", "loose"] = "strict"  # loose: also without first line, last line, or asterisks
    aggregate: Literal["all", "fraction"] = "all"  # 1 if all instructions are followed, or the share of them that are


class MathRewardSection(VerifierKeys):
    """1 for an answer that is mathematically equal to the solution's."""

    own_metrics: ClassVar[tuple[Key, ...]] = (
        _EXACT,
        Key("parsed", "share", "of completions in which an answer was found (`math`)", "reward"),
    )
    packages = ("math_verify",)

    type: Literal["math"] = "math"

    @property
    def reads_solution(self) -> bool:
        return True


class LengthRewardSection(RewardKeys):
    """A penalty on tokens, to be added to a reward that grows with them."""

    type: Literal["length"] = "length"
    per_token: PositiveFloat  # what each token too many costs
    free_tokens: int = Field(0, ge=0)  # that cost nothing: the first ones, or around the target
    target: PositiveInt | None = None  # penalise the distance from it, on both sides, and not the length
    max_penalty: PositiveFloat = 1.0  # a completion never costs more


REWARDS: dict[str, type[RewardKeys]] = {
    "builtin": BuiltinRewardSection,
    "gsm8k": Gsm8kRewardSection,
    "function": FunctionRewardSection,
    "reward_model": RewardModelSection,
    "ifeval": IfevalRewardSection,
    "math": MathRewardSection,
    "length": LengthRewardSection,
    "judge": JudgeRewardSection,
}


def _type_of(value: Any) -> str | None:
    """The tag of a tree from YAML or of a section; the built-in reward where nothing is said."""
    return value.get("type", "builtin") if isinstance(value, dict) else getattr(value, "type", None)


def _form_of(value: Any) -> str | None:
    return "list" if isinstance(value, list | tuple) else _type_of(value)


# One line for each type. A list of entries is a section too.
_Entry = (
    Annotated[BuiltinRewardSection, Tag("builtin")]
    | Annotated[Gsm8kRewardSection, Tag("gsm8k")]
    | Annotated[FunctionRewardSection, Tag("function")]
    | Annotated[RewardModelSection, Tag("reward_model")]
    | Annotated[IfevalRewardSection, Tag("ifeval")]
    | Annotated[MathRewardSection, Tag("math")]
    | Annotated[LengthRewardSection, Tag("length")]
    | Annotated[JudgeRewardSection, Tag("judge")]
)
RewardEntry = Annotated[
    _Entry, Discriminator(_type_of, custom_error_type="type_of_section", custom_error_message="unknown")
]
RewardSection = Annotated[
    _Entry | Annotated[list[RewardEntry], Tag("list"), Field(min_length=1)],
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
    if reward.columns and data.train == "builtin":
        raise ValueError(
            f"reward.type = {reward.type} needs data.train, with the columns {' and '.join(reward.columns)}, which the "
            "built-in prompts do not have"
        )
    if reward.reads_solution and data.train == "builtin":  # of other data each prompt is asked for its solution
        which = " that end in a line `#### <number>`" if isinstance(reward, Gsm8kRewardSection) else ""
        raise ValueError(
            f"reward.type = {reward.type} needs data.train with solutions{which}, which the built-in prompts do not have"
        )
    if isinstance(reward, FunctionRewardSection):
        columns = [*data.reference_fields, *(["solution"] if data.solution_field else [])]
        for name in reward.kwargs:
            if name in ("prompt", "completions", *columns):
                raise ValueError(
                    f"reward.kwargs.{name}: {reward.function} is given its {name} by that name; rename one"
                )
