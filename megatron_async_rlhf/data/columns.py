"""Which columns of a source are the conversation, the solution, the two sides of a pair: as set, or by the names in use.

The names are those of public datasets: No Robots (`messages`), ShareGPT (`conversations`), GSM8K (`question`, `answer`),
Alpaca (`instruction`, `input`, `output`), Dolly (`instruction`, `context`, `response`), TL;DR in its several forms
(`prompt` and `completion` or `label`, `post` and `summary`, `query` and `reference_response`), Anthropic HH and
UltraFeedback (`chosen`, `rejected`).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

from msgspec import Struct

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.data.rows import Table
from megatron_async_rlhf.data.transcript import is_transcript
from megatron_async_rlhf.errors import DataError

CONVERSATIONS = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "question", "query", "instruction", "problem", "post", "input")
_FURTHER = ("input", "context")  # what an instruction is about
_SOLUTIONS = (
    *("completion", "response", "answer", "output", "solution"),
    *("reference_response", "label", "summary", "target"),
)
_SYSTEMS = ("system", "system_prompt")
_MARGINS = (
    ("margin",),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
)
CHOSEN, REJECTED = "chosen", "rejected"
# Two answers, and the column with the number, 0 or 1, of the better one.
_CHOICES = (
    ("response0", "response1", "choice"),
    ("response_0", "response_1", "better_response_id"),
)
BLANK = "blank"
# Columns of `vwxyzjn/..._oai_preprocessing_...`, in which answers end with their tokenizer's end of sequence, spelled out.
_SPELLS_END = {"reference_response", "response0", "response1"}
_SPELLED_END = "<|endoftext|>"
_NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LOOKED_AT = 100  # rows: the first ones may be empty

_Layout = TypeVar("_Layout")


class PromptColumns(Struct, frozen=True, kw_only=True):
    """Where the prompt of a record is.

    Attributes:
        prompt: column with a text, with a list of messages, or, in a pair, with a transcript of turns.
        further: column with a text that follows the prompt's after an empty line, if it has any.
        system: column with the system message of a conversation that has none.
        recognised: nobody has named them.
    """

    prompt: str
    further: str | None = None
    system: str | None = None
    recognised: bool = False

    @property
    def names(self) -> list[str]:
        return [name for name in (self.prompt, self.further, self.system) if name is not None]


class ExampleColumns(Struct, frozen=True, kw_only=True):
    """Where prompt and solution are; a conversation may end with its solution."""

    prompt: PromptColumns
    solution: str | None = None

    def said(self, data: DataSection) -> str | None:
        """One line on what was recognised; None if that is no more than a column called `prompt`."""
        is_plain = not self.prompt.recognised or self.prompt.names == ["prompt"]
        found = [] if is_plain and self.solution == data.solution_field else [_said_of_prompt(self.prompt)]
        if self.solution is not None and self.solution != data.solution_field:
            end = f" without a final {_SPELLED_END}" if self.solution in _SPELLS_END else ""
            found.append(f"solutions in {self.solution!r}{end}")
        if not found:
            return None
        return f"{', '.join(found)} (data.prompt_field and data.solution_field name other columns)"


class PairColumns(Struct, frozen=True, kw_only=True):
    """Where the parts of a preference pair are.

    Attributes:
        prompt: None if the sides have it themselves.
        system: column with the system message of sides that have none.
        choice: column with 1 where the sides have changed places, 0 where not; None if they never have.
        margin: one column, or two whose difference it is; empty without a margin.
    """

    prompt: PromptColumns | None
    system: str | None = None
    chosen: str
    rejected: str
    choice: str | None = None
    margin: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        prompt = [] if self.prompt is None else self.prompt.names
        system = [] if self.system is None else [self.system]
        choice = [] if self.choice is None else [self.choice]
        return list(dict.fromkeys([*prompt, *system, self.chosen, self.rejected, *choice, *self.margin]))

    def said(self, data: DataSection) -> str | None:
        """One line on where everything is; None if the configuration has named all of it."""
        sides_are_named = (data.chosen_field, data.rejected_field) == (self.chosen, self.rejected)
        if data.prompt_field is not None and sides_are_named and (not self.margin or data.margin_field is not None):
            return None
        system = f" with system messages in {self.system!r}" if self.system else ""
        prompt = f"prompts in both sides{system}" if self.prompt is None else _said_of_prompt(self.prompt)
        choice = f" by the choice in {self.choice!r}" if self.choice else ""
        end = f" without a final {_SPELLED_END}" if self.chosen in _SPELLS_END else ""
        margin = f", margins in {' minus '.join(map(repr, self.margin))}" if self.margin else ""
        return (
            f"{prompt}, pairs in {self.chosen!r} and {self.rejected!r}{end}{choice}{margin} (data.prompt_field, data.chosen_field, "
            "data.rejected_field and data.margin_field name other columns)"
        )


def example_columns(table: Table, data: DataSection) -> ExampleColumns:
    """Of prompts and solutions.

    Raises:
        DataError: several columns may be meant.
    """
    if data.prompt_field is not None:
        return ExampleColumns(prompt=PromptColumns(prompt=data.prompt_field), solution=data.solution_field)

    def of(kinds: Mapping[str, str]) -> ExampleColumns | None:
        prompt = _conversation_column(kinds, table.source) or _prompt_columns(kinds, table.source)
        if prompt is None and kinds.get(CHOSEN) in ("messages", "transcript"):
            prompt = PromptColumns(prompt=CHOSEN, system=_one_of(_SYSTEMS, kinds), recognised=True)
        if prompt is None and "text" in kinds:
            prompt = PromptColumns(prompt="text", recognised=True)
        if prompt is None:
            return None
        return ExampleColumns(prompt=prompt, solution=_solution_column(kinds, prompt, data, table.source))

    fallback = ExampleColumns(prompt=PromptColumns(prompt="prompt"), solution=data.solution_field)
    return _recognised(table, of) or fallback


def pair_columns(table: Table, data: DataSection) -> PairColumns:
    """Of preference pairs.

    Raises:
        DataError: several columns may be meant.
    """
    named = None if data.prompt_field is None else PromptColumns(prompt=data.prompt_field)
    sides: list[tuple[str, str, str | None]] = [(data.chosen_field or CHOSEN, data.rejected_field or REJECTED, None)]
    sides += _CHOICES if data.chosen_field is None else ()

    def of(kinds: Mapping[str, str]) -> PairColumns | None:
        for chosen, rejected, choice in sides:
            if {chosen, rejected, choice or chosen} <= kinds.keys():
                break
        else:
            return None
        others = {name: kind for name, kind in kinds.items() if name not in (chosen, rejected)}
        prompt, system = named, None
        if prompt is None and kinds[chosen] in ("messages", "transcript"):  # which have their prompt with them
            system = _one_of(_SYSTEMS, others)
        elif prompt is None:
            prompt = _prompt_columns(others, table.source)
        margin = (data.margin_field,) if data.margin_field is not None else _margin_columns(kinds)
        return PairColumns(prompt=prompt, system=system, chosen=chosen, rejected=rejected, choice=choice, margin=margin)

    chosen, rejected, _ = sides[0]
    return _recognised(table, of) or PairColumns(prompt=named, chosen=chosen, rejected=rejected)


def without_spelled_end(answer: str, column: str) -> str:
    """The answer that a column has, without the end of sequence that some columns spell out."""
    return answer.removesuffix(_SPELLED_END) if column in _SPELLS_END else answer


def _recognised(table: Table, of: Callable[[Mapping[str, str]], _Layout | None]) -> _Layout | None:
    """What `of` makes of the columns of the first row of which it can make anything.

    A column that is empty there counts as what it is in the first row in which it is not.
    """
    records = [row.record for row in islice(table.rows(None), _LOOKED_AT) if isinstance(row.record, Mapping)]
    filled: dict[str, str] = {}
    for record in records:
        for name, value in record.items():
            if (kind := _kind_of(value)) is not None and kind != BLANK:
                filled.setdefault(name, kind)
    for record in records:
        kinds: dict[str, str] = {}
        for name, value in record.items():
            kind = _kind_of(value)
            kind = filled.get(name, kind) if kind in (None, BLANK) else kind
            if kind is not None:
                kinds[name] = kind
        if (layout := of(kinds)) is not None:
            return layout
    return None


def _kind_of(value: Any) -> str | None:
    """What a value is; None if it is nothing that is looked for.

    `messages`, `answer` (messages of the assistant alone), `transcript`, `text`, `numeral` (a text too), `blank`, `number`.
    """
    if isinstance(value, str):
        if not value.strip():
            return BLANK
        if is_transcript(value):
            return "transcript"
        return "numeral" if _NUMERAL.fullmatch(value.strip()) else "text"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        first = value[0]
        if {"role", "content"} <= first.keys() or {"from", "value"} <= first.keys():
            return "answer" if (first.get("role") or first.get("from")) in ("assistant", "gpt") else "messages"
    return None


def _is_text(kinds: Mapping[str, str], name: str) -> bool:
    return kinds.get(name) in ("text", "transcript", "numeral")


def _conversation_column(kinds: Mapping[str, str], source: str) -> PromptColumns | None:
    found = [name for name in CONVERSATIONS if kinds.get(name) == "messages"]
    if not found:
        return None
    return PromptColumns(
        prompt=_only(found, "the conversation", "data.prompt_field", source),
        system=_one_of(_SYSTEMS, kinds),
        recognised=True,
    )


def _prompt_columns(kinds: Mapping[str, str], source: str) -> PromptColumns | None:
    found = [name for name in _PROMPTS if _is_text(kinds, name) or (name == "prompt" and name in kinds)]
    found = ["prompt"] if "prompt" in found else found
    if "query" in found and ("reference_response" in kinds or "query_token" in kinds):
        found = ["query"]  # beside the parts that it was made of
    further = next((name for name in _FURTHER if name in kinds), None) if "instruction" in found else None
    found = [name for name in found if name != further]
    if not found:
        return None
    prompt = _only(found, "the prompt", "data.prompt_field", source)
    return PromptColumns(prompt=prompt, further=further, system=_one_of(_SYSTEMS, kinds), recognised=True)


def _solution_column(kinds: Mapping[str, str], prompt: PromptColumns, data: DataSection, source: str) -> str | None:
    if data.solution_field is not None:
        return data.solution_field
    if prompt.prompt in (*CONVERSATIONS, CHOSEN, "text"):
        return None
    if prompt.prompt == "query" and "reference_response" in kinds:
        return "reference_response"
    # What a reward is to be given is no solution, unless it is said to be one.
    usable = [name for name in kinds if name not in (*prompt.names, *data.reference_fields)]
    found = [name for name in _SOLUTIONS if name in usable and (_is_text(kinds, name) or kinds[name] == "answer")]
    if not found and CHOSEN in usable and kinds[CHOSEN] != "number":
        found = [CHOSEN]
    return _only(found, "the solution", "data.solution_field", source) if found else None


def _margin_columns(kinds: Mapping[str, str]) -> tuple[str, ...]:
    # In a CSV file numbers are texts.
    are_numbers = {name for name, kind in kinds.items() if kind in ("number", "numeral")}
    return next((names for names in _MARGINS if are_numbers.issuperset(names)), ())


def _only(found: Iterable[str], what: str, key: str, source: str) -> str:
    first, *others = found
    if others:
        raise DataError(
            f"{source}: {what} may be in {', '.join(map(repr, [first, *others[:-1]]))} or {others[-1]!r}; set {key} to one of "
            "them"
        )
    return first


def _one_of(names: Iterable[str], kinds: Mapping[str, str]) -> str | None:
    return next((name for name in names if _is_text(kinds, name) or kinds.get(name) == BLANK), None)


def _said_of_prompt(columns: PromptColumns) -> str:
    further = f" and {columns.further!r}" if columns.further else ""
    system = f" with system messages in {columns.system!r}" if columns.system else ""
    return f"prompts in {columns.prompt!r}{further}{system}"
