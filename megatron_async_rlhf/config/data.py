"""The `data` section: where prompts, solutions and preference pairs come from, and what becomes of those that do not fit."""

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_async_rlhf.config.section import LocalSource, Section


class DataSection(Section):
    """What is trained and evaluated on: the built-in task, a file, a directory, or a Hugging Face dataset.

    Columns that are not named are recognised by the names that public datasets use, which is said (docs/data.md).
    """

    train: LocalSource = "builtin"  # `builtin`, a path, or `hf:<dataset>[:<config>]:<split>`
    eval: LocalSource | None = (
        None  # same forms; a relative path is tried beside data.train first. Default: split off train
    )
    train_prompts: PositiveInt | None = None  # use the first N; the built-in task makes as many as this (default 4096)
    eval_prompts: PositiveInt = 256  # held out, at most
    prompt_field: str | None = None  # column with a text, or with a list of messages, whose last answer is the solution
    solution_field: str | None = None  # column with a good answer: warm start and verifier read it
    chosen_field: str | None = None  # of preference pairs: column with the better answer, or the whole conversation
    rejected_field: str | None = None  # the same of the worse one
    margin_field: str | None = None  # of preference pairs: column with a number, how much better it is
    system_prompt: str | None = None  # system message of conversations that have none
    instruction: str | None = None  # follows the last user message, after an empty line
    reference_fields: list[str] = Field(default_factory=list)  # other columns that a reward of one's own is given
    max_prompt_tokens: PositiveInt | None = None  # default: what the context leaves after max_new_tokens
    long_prompts: Literal["refuse", "drop"] = "refuse"  # what happens to prompts longer than that
    bad_records: Literal["refuse", "drop"] = "refuse"  # and to records that are empty or malformed

    @model_validator(mode="before")
    @classmethod
    def pass_over_former_default(cls, keys: Any) -> Any:
        """`prompt_field: prompt` stands in the resolved configurations of older runs, also where nothing has columns."""
        if isinstance(keys, dict) and keys.get("prompt_field") == "prompt":
            if {keys.get("train", "builtin"), keys.get("eval") or "builtin"} == {"builtin"}:
                return {key: value for key, value in keys.items() if key != "prompt_field"}
        return keys

    @model_validator(mode="after")
    def check_sides(self) -> "DataSection":
        for given, missing in (("chosen_field", "rejected_field"), ("rejected_field", "chosen_field")):
            if getattr(self, given) is not None and getattr(self, missing) is None:
                raise ValueError(f"data.{given} = {getattr(self, given)} needs data.{missing}, the other answer")
        return self
