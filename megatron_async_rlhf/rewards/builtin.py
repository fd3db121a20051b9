"""Graded reward for the built-in task: a fresh model earns something long before it is right."""

import re

from megatron_async_rlhf.data.builtin_task import KINDS
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.rewards.base import Score, Verifier
from megatron_async_rlhf.types import Completion, Prompt

# The gap to 1.0 keeps "nearly right" from ever competing with "right".
MAX_PARTIAL = 0.6

# What the reference of a kind with many right answers must hold; the other kinds name their one answer.
_OPEN_KINDS = {
    "end_with": ("word",),
    "start_with": ("word",),
    "ending_in": ("word",),
    "some_words": ("count", "word"),
}
_MAX_LETTERS = 24  # of a word the model makes up, in characters


class BuiltinReward(Verifier):
    """1 for a right answer, up to 0.6 for how much a wrong one resembles it, 0 for an empty one.

    An answer is right as a whole: a second line after a right first line makes it wrong.
    """

    def check(self, prompt: Prompt) -> None:
        """Raises DataError if the prompt is not one of the built-in task's."""
        kind = prompt.reference.get("kind", "")
        needed = _OPEN_KINDS.get(kind, ("answer",))
        if kind not in KINDS or any(name not in prompt.reference for name in needed):
            raise DataError(
                f"{prompt.name} is not of the built-in task; set data.train = builtin or another reward.type"
            )

    def judge(self, prompt: Prompt, completion: Completion) -> Score:
        """Metrics: `exact`, 1 if the answer is right."""
        reference = prompt.reference
        answer = completion.text.strip()
        first_line = answer.partition("\n")[0].strip()
        match reference["kind"]:
            case "end_with":
                exact, partial = _judge_end(answer, first_line, reference["word"])
            case "start_with":
                exact, partial = _judge_start(answer, first_line, reference["word"])
            case "ending_in":
                exact, partial = _judge_ending(answer, first_line, reference["word"])
            case "some_words":
                exact, partial = _judge_words(answer, first_line, reference["count"], reference["word"])
            case _:
                exact, partial = answer == reference["answer"], resemblance(first_line, reference["answer"])
        return Score(reward=1.0 if exact else MAX_PARTIAL * partial, metrics={"exact": float(exact)})


def _judge_end(answer: str, first_line: str, word: str) -> tuple[bool, float]:
    """Three words of letters, the last one given; a closing full stop is fine."""
    exact = re.fullmatch(rf"([A-Za-z]{{1,{_MAX_LETTERS}}} ){{2}}{word}\.?", answer) is not None
    words = first_line.removesuffix(".").split()
    if not words:
        return exact, 0.0
    right_number = min(len(words), 3) / max(len(words), 3)
    return exact, (resemblance(words[-1], word) + right_number) / 2


def _judge_start(answer: str, first_line: str, start: str) -> tuple[bool, float]:
    """One word of letters that begins as given and continues; a closing full stop is fine."""
    exact = re.fullmatch(rf"{start}[a-z]{{1,{_MAX_LETTERS - len(start)}}}\.?", answer) is not None
    return exact, resemblance(first_line[: len(start)], start)


def _judge_ending(answer: str, first_line: str, end: str) -> tuple[bool, float]:
    """One word of letters that ends as given, with something before; a closing full stop is fine."""
    exact = re.fullmatch(rf"[a-z]{{1,{_MAX_LETTERS - len(end)}}}{end}\.?", answer) is not None
    return exact, resemblance(first_line.removesuffix(".")[-len(end) :], end)


def _judge_words(answer: str, first_line: str, count: int, first: str) -> tuple[bool, float]:
    """As many words as asked, the first one given; a closing full stop is fine."""
    exact = re.fullmatch(rf"{first}( [A-Za-z]{{1,{_MAX_LETTERS}}}){{{count - 1}}}\.?", answer) is not None
    words = first_line.removesuffix(".").split()
    if not words:
        return exact, 0.0
    right_number = min(len(words), count) / max(len(words), count)
    return exact, (resemblance(words[0], first) + right_number) / 2


def resemblance(text: str, answer: str) -> float:
    """In [0, 1]; 1 for equal texts, 0 for nothing in common.

    Mean of the share of places with the right character and of the share of characters in the longest common
    subsequence: the first tells an anagram from the answer, the second forgives a character too many or too few.
    """
    if not text or not answer:
        return float(text == answer)
    in_place = sum(a == b for a, b in zip(text, answer, strict=False)) / max(len(text), len(answer))
    in_order = 2 * _common_subsequence(text, answer) / (len(text) + len(answer))
    return (in_place + in_order) / 2


def _common_subsequence(left: str, right: str) -> int:
    """Length of the longest common subsequence, in characters.

    A row of the table at a time, as the bits of one integer (Hyyrö 2004): a completion that rambles on for a thousand
    characters must not hold up the controller.
    """
    places: dict[str, int] = {}
    for column, b in enumerate(right):
        places[b] = places.get(b, 0) | 1 << column
    whole = row = (1 << len(right)) - 1  # a zero bit: the subsequence gets longer in this column
    for a in left:
        common = row & places.get(a, 0)
        row = (row + common | row - common) & whole
    return len(right) - row.bit_count()
