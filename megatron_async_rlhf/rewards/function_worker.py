"""The worker's side of a reward function: it finds the function, calls it, and looks at what comes back.

Nothing is raised: what is wrong is told in a line that follows the function's name. An exception of the user's own may
not survive the way to another process.
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from msgspec import Struct


class Parameters(Struct, frozen=True, kw_only=True):
    """What a function can be given by name. `required`: what it must be given; `any_name`: it has `**kwargs`."""

    names: list[str]
    required: list[str]
    any_name: bool

    def takes(self, name: str) -> bool:
        return self.any_name or name in self.names


def begin() -> None:
    """What the function prints must not get between the lines of the controller's standard output."""
    os.dup2(2, 1)


def parameters_of(source: str, name: str) -> Parameters | str:
    """The parameters of the function of that name in a file `*.py` or a module; or why there is none."""
    found = _find(source, name)
    if isinstance(found, str):
        return found
    kinds = inspect.Parameter
    parameters = inspect.signature(found).parameters.values()
    named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    if unnamed := [p.name for p in parameters if p.kind is kinds.POSITIONAL_ONLY and p.default is p.empty]:
        return f"cannot be given {', '.join(unnamed)} by name: it must not be positional-only"
    return Parameters(
        names=[p.name for p in named],
        required=[p.name for p in named if p.default is p.empty],
        any_name=any(p.kind is kinds.VAR_KEYWORD for p in parameters),
    )


def call(source: str, name: str, given: dict[str, Any]) -> list[float] | str:
    """Its scores, one for each of `given["completions"]`, or what it did instead."""
    parameters = parameters_of(source, name)
    if isinstance(parameters, str):
        return parameters
    try:
        scores = _find(source, name)(**{key: value for key, value in given.items() if parameters.takes(key)})
        if inspect.iscoroutine(scores):
            scores = asyncio.run(scores)
        return _checked(scores, len(given["completions"]))
    except BaseException as error:  # also SystemExit
        return _raised(error)


@cache
def _find(source: str, name: str) -> Callable[..., Any] | str:
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        return f"cannot be loaded: there is no file {Path(source).absolute()}"
    try:
        module = _load_file(Path(source)) if is_file else _import(source)
    except BaseException as error:  # also SystemExit
        return _raised(error, "while it was imported")
    found = getattr(module, name, None)
    if found is None:
        return f"cannot be loaded: {source} has no {name}"
    return found if callable(found) else f"is no function, but {type(found).__name__}"


def _load_file(path: Path) -> Any:
    sys.path.insert(0, str(path.parent.absolute()))  # as for a script: it may import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


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


def _raised(error: BaseException, when: str = "") -> str:
    traceback.print_exception(error)  # into the log
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return f"raised {text}{where}{' ' if when else ''}{when}"
