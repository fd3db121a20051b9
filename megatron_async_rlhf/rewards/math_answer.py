"""Mathematical answers, compared as mathematics by the package `math-verify`: 1/2, 0.5 and \\frac{1}{2} are equal."""

import re
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.rewards.verifier import Task

_MARKER = re.compile(
    r"^[ \t]*####(?!#)[ \t]*(?:(?:the )?(?:final )?answer(?: is)?[ :]+(?=\S))?(.*)$", re.MULTILINE | re.IGNORECASE
)
# Of a part of the text, as Markdown has it: a word, in any script, perhaps behind a number or a letter of its own.
_HEADING = re.compile(r"(?:\(?(?:\d+|[A-Za-z])[.):]\)?\s+)?(?:[^\W\d_]{3}|[^\W\d_A-Za-z]{2})")
_MATHS = re.compile(r"\\boxed|\\\(|\\\[|\$")  # what is mathematics is marked as such
_MARKS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_BOX = r"\boxed"
_ONE_MORE = re.compile(r"\}[\s$]*(?:,|(?:,\s*)?(?:and|or)|\\text\{\s*(?:and|or)\s*\})[\s$]*$")  # between two boxes
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


class MathAnswer(Struct, frozen=True):
    """Whether the last answer of a completion equals that of the solution.

    An answer is what stands behind the last `####` that begins a line and is no heading of Markdown; if there is none, or a
    `\\boxed{}` on a later line, what is in the last `\\boxed{}` (and those joined to it by a comma, `and` or `or`); else the
    last formula or number.
    """

    def check(self, task: Task) -> str | None:
        solution = task.reference["solution"]
        return None if _parsed(solution) else f"no answer can be read from its solution {solution[-60:]!r}"

    def judge(self, task: Task, text: str) -> tuple[float, dict[str, float]]:
        from math_verify import verify

        answer = _parsed(text)
        exact = float(bool(answer) and verify(_parsed(task.reference["solution"]), answer))
        return exact, {"exact": exact, "parsed": float(bool(answer))}


def _parsed(text: str) -> list[Any]:
    """The answer in a text: an expression and its source; empty if there is none.

    math-verify looks for formulas between dollars and the like, and for numbers. A bare formula, which is what many data
    sets have as solution, it would take for the last number in it.
    """
    from math_verify import parse

    marked = [mark for mark in _MARKER.finditer(text) if not _HEADING.match(mark[1])]
    if marked and _BOX not in text[marked[-1].end() :]:
        text = marked[-1][1].strip()
    text = _from_last_box(text)
    if _MATHS.search(text) or _WORD.search(text) or "\n" in text.strip():
        return parse(text)
    return parse(rf"\boxed{{{text}}}") if text.strip() else []


def _from_last_box(text: str) -> str:
    """math-verify takes all boxes in a text for one answer, a set, and prefers what follows `the final answer is`; here what stands
    before the last box is thoughts."""
    before, *boxes = text.split(_BOX)
    if not boxes:
        return text
    first = len(boxes) - 1
    while first and _ONE_MORE.search(boxes[first - 1]):
        first -= 1
    return _MARKS.sub("", "".join(_BOX + box for box in boxes[first:]))
