"""What a judge's answer means: a number in a range, or which of two is better."""

import json
import math
import re
from typing import Any

from megatron_async_rlhf.config.judge import JudgeKeys

_NUMBER = r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"
_LETTER = r"\[\[\s*([ABCabc])\s*\]\]"
_POINTS = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the answer that was shown as A


def read_number(keys: JudgeKeys, text: str) -> float | None:
    """None if there is none, or none in the range."""
    found = _found(keys, text, _NUMBER)
    try:
        number = float(found)
    except (TypeError, ValueError):
        return None
    low, high = keys.range
    return number if math.isfinite(number) and low <= number <= high else None


def read_preference(keys: JudgeKeys, text: str) -> float | None:
    """1 if the answer shown as A is better, 0 if B is, 0.5 for a tie; None if the judge does not say."""
    return _POINTS.get(str(_found(keys, text, _LETTER)).strip().upper())


def _found(keys: JudgeKeys, text: str, default: str) -> Any:
    """The last of what is looked for: a judge that thinks aloud may name others before."""
    if keys.json_key is None:
        matches = re.findall(keys.pattern or default, text)
        return matches[-1] if matches else None
    objects = (_object_at(text, match.start()) for match in re.finditer(r"\{", text))
    values = [each[keys.json_key] for each in objects if each is not None and keys.json_key in each]
    return values[-1] if values else None


def _object_at(text: str, start: int) -> dict[str, Any] | None:
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None
