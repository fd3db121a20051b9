"""Verifier for GSM8K: the number after `####` must be that of the reference solution."""

import re
from decimal import Decimal

from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.rewards.base import Score, Verifier, solution_of
from megatron_async_rlhf.types import Completion, Prompt

# One amount: sign (also a typographic minus) and dollar in either order, thousands separators, decimals, a per cent sign,
# a full stop behind it.
_MINUS = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
_SIGN = rf"[-+{_MINUS}]"
_SPACE = "[ \u00a0\u2009\u202f]"
_NUMBER = (
    rf"(?:(?:{_SIGN}{_SPACE}?)?(?:\${_SPACE}?)?|\${_SPACE}?{_SIGN}{_SPACE}?)"
    rf"(?:[0-9]{{1,3}}(?:{_SPACE}[0-9]{{3}})+(?:\.[0-9]+)?|[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
    rf"(?:{_SPACE}?[%$])?\.?"
)
_ANSWER_LINE = re.compile(rf"^[^\S\n]*####[^\S\n]*({_NUMBER})[^\S\n]*$", re.MULTILINE)
_WELL_FORMED = re.compile(rf"#### {_NUMBER}")


class Gsm8kReward(Verifier):
    """1 for the right number, `format_reward` for a well-formed answer that is wrong, 0 otherwise.

    The answer is the last line `#### <number>`; well-formed means that nothing follows it.
    """

    def __init__(self, format_reward: float) -> None:
        self._format_reward = format_reward

    def check(self, prompt: Prompt) -> None:
        """Raises DataError if the prompt has no solution, or one without a line `#### <number>`."""
        if find_answer(solution_of(prompt, "reward.type = gsm8k")) is None:
            raise DataError(f"{prompt.name}: its solution has no line `#### <number>`; check data.solution_field")

    def judge(self, prompt: Prompt, completion: Completion) -> Score:
        """Metrics: `exact`, 1 if the number is right; `well_formed`, 1 if the last line is an answer line.

        Raises:
            DataError: the prompt would not pass `check`.
        """
        self.check(prompt)
        answer = find_answer(completion.text)
        exact = answer is not None and answer == find_answer(prompt.reference["solution"])
        well_formed = is_well_formed(completion.text)
        reward = 1.0 if exact else self._format_reward if well_formed else 0.0
        return Score(reward=reward, metrics={"exact": float(exact), "well_formed": float(well_formed)})


def find_answer(text: str) -> Decimal | None:
    """The number on the last line of the form `#### <number>`; None if there is no such line."""
    lines = _ANSWER_LINE.findall(text)
    return _value(lines[-1]) if lines else None


def _value(amount: str) -> Decimal:
    """Of a text of the form `_NUMBER`."""
    plain = re.sub(rf"[$%,]|{_SPACE}", "", re.sub(f"[{_MINUS}]", "-", amount))
    return Decimal(plain.removesuffix("."))


def is_well_formed(text: str) -> bool:
    """Whether the last line that is not blank is exactly `#### <number>`."""
    lines = text.rstrip().split("\n")
    return _WELL_FORMED.fullmatch(lines[-1].rstrip()) is not None
