"""A language model that judges answers, behind an OpenAI-compatible chat endpoint."""

import re
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from megatron_async_rlhf.config.reward_keys import FallibleKeys
from megatron_async_rlhf.config.section import LocalPath, Section
from megatron_async_rlhf.config.written_key import Key

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be the address of an API, such as http://localhost:8000/v1")
    return url.rstrip("/").removesuffix("/chat/completions")


def _check_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"must have one group, (...), around what is read; it has {groups}")
    return pattern


def _check_range(value: Any) -> Any:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(isinstance(each, int | float) for each in value)
    ):
        raise ValueError("must be the lowest and the highest number, as [1, 10]")
    if value[0] >= value[1]:
        raise ValueError("is empty: the first number must be below the second")
    return value


class JudgeBudget(Section):
    """What the cache has ever paid for, over restarts and over all runs that share it."""

    max_calls: PositiveInt | None = None  # requests that the endpoint has, or may have, worked on
    max_tokens: PositiveInt | None = None  # of requests and answers; requests under way may go beyond it


class JudgeKeys(Section):
    """Whom to ask, what to ask, and how to read the answer."""

    url: Annotated[str, AfterValidator(_check_url)]  # as https://api.openai.com/v1
    model: str = Field(min_length=1)  # its name at the endpoint
    api_key_env: str | None = None  # variable with the key; never the key itself
    form: Literal["pairwise", "pointwise"] = "pairwise"  # which of two answers is better | how good one is
    template: LocalPath | None = None  # Jinja file of the question; default: the package's own of that form
    pattern: Annotated[str, AfterValidator(_check_pattern)] | None = (
        None  # group 1 is the number, or A, B, C; last match
    )
    json_key: str | None = None  # the number, or A, B, C, is this key of a JSON object in the answer
    range: Annotated[tuple[float, float], BeforeValidator(_check_range)] = (1.0, 10.0)  # of the numbers (`pointwise`)
    swap: bool = True  # ask each pair in both orders; only what both say counts (`pairwise`)
    temperature: float = Field(0.0, ge=0)  # 0 is greedy
    max_tokens: PositiveInt = 1024  # of one answer
    seed: int = 0  # sent with each request
    extra: dict[str, Any] = Field(default_factory=dict)  # further keys of each request; null takes one away
    concurrency: PositiveInt = 16  # requests under way at once
    timeout_s: PositiveFloat = 120.0  # of one request
    give_up_s: PositiveFloat = 600.0  # a request is tried again for so long
    cache: LocalPath | None = (
        None  # answers, so that nothing is asked twice; default: judge.sqlite in the run directory
    )
    budget: JudgeBudget = Field(default_factory=JudgeBudget)

    @model_validator(mode="before")
    @classmethod
    def check_no_secrets(cls, tree: Any) -> Any:
        """Before anything else, as other messages show the value that is wrong."""
        if not isinstance(tree, dict):
            return tree
        if "api_key" in tree:
            raise ValueError("api_key does not belong here: put it into a variable, and set api_key_env to its name")
        if "@" in urlsplit(str(tree.get("url"))).netloc:
            raise ValueError("url must not have a name or password in it: api_key_env names the variable with the key")
        if tree.get("api_key_env") is not None and not _VARIABLE.fullmatch(str(tree["api_key_env"])):
            raise ValueError(
                "api_key_env must be the name of a variable, such as OPENAI_API_KEY, and never the key itself"
            )
        return tree

    @model_validator(mode="after")
    def check_values(self) -> "JudgeKeys":
        if self.give_up_s < self.timeout_s:
            raise ValueError(f"give_up_s = {self.give_up_s:g} is below timeout_s = {self.timeout_s:g}, of one request")
        if self.pattern is not None and self.json_key is not None:
            raise ValueError("pattern and json_key are two ways to read the same answer; remove one")
        return self


class JudgeRewardSection(JudgeKeys, FallibleKeys):
    """What a language model thinks of a completion."""

    own_metrics: ClassVar[tuple[Key, ...]] = (
        Key(
            "judge_score", "-", "mean number that the judge gave, in its own range (`judge`, `pointwise`)",
            "reward", lambda keys: keys.form == "pointwise",
        ),
        Key(
            "judge_undecided", "share", "of a completion's comparisons that ended in a tie, or differently in either order (`judge`, `pairwise`)",
            "reward", lambda keys: keys.form == "pairwise",
        ),
    )  # fmt: skip

    may_change: ClassVar[tuple[str, ...]] = (
        "on_error",
        "url",
        "api_key_env",
        "concurrency",
        "timeout_s",
        "give_up_s",
        "cache",
        "budget",
    )

    type: Literal["judge"] = "judge"
    against: Literal["group", "solution"] = "group"  # what a completion is compared with (`pairwise`)

    @property
    def reads_solution(self) -> bool:
        return self.form == "pairwise" and self.against == "solution"
