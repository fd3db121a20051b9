"""The worker's side of a reward function: it calls the function and looks at what comes back.

Nothing is raised: what is wrong is told in a line that follows the function's name. An exception of the user's own may
not survive the way to another process.
"""

import asyncio
import inspect
import math
from numbers import Real
from typing import Any

from megatron_async_rlhf.errors import UserFunctionError
from megatron_async_rlhf.user_functions import Parameters, find_function, parameters_of, raised


def describe(function: str) -> Parameters | str:
    """The parameters of a function, or why there is none."""
    try:
        return parameters_of(function)
    except UserFunctionError as error:
        return str(error)


def call(function: str, given: dict[str, Any]) -> list[float] | str:
    """Its scores, one for each of `given["completions"]`, or what it did instead."""
    try:
        parameters = parameters_of(function)
        scores = find_function(function)(**{name: value for name, value in given.items() if parameters.takes(name)})
        if inspect.iscoroutine(scores):
            scores = asyncio.run(scores)
        return _checked(scores, len(given["completions"]))
    except UserFunctionError as error:
        return str(error)
    except BaseException as error:  # also SystemExit
        return raised(error)


def _checked(scores: Any, count: int) -> list[float] | str:
    if isinstance(scores, str | bytes | dict) or not hasattr(scores, "__iter__"):
        return f"returned {_shown(scores)} and not a list with a number for each completion"
    scores = list(scores)
    if len(scores) != count:
        return f"returned {len(scores)} scores for {count} completions"
    numbers = []
    for place, score in enumerate(scores, start=1):
        if not isinstance(score, Real) and hasattr(score, "item"):  # of an array
            score = score.item()
        if not isinstance(score, Real) or not math.isfinite(score):
            return f"returned {_shown(score)} and not a finite number for completion {place} of {count}"
        numbers.append(float(score))
    return numbers


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
