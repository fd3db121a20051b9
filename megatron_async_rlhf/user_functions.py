"""Functions of the user's that a configuration names: `FILE.py:NAME`, or `package.module.NAME`."""

import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.errors import UserFunctionError

_FORM = re.compile(r"(?P<source>.+\.py(?=:)|[A-Za-z_][\w.]*)[.:](?P<name>[A-Za-z_]\w*)")


class Parameters(Struct, frozen=True, kw_only=True):
    """What a function can be given by name.

    Attributes:
        required: what it must be given.
        any_name: it has `**kwargs`.
    """

    names: list[str]
    required: list[str]
    any_name: bool

    def takes(self, name: str) -> bool:
        return self.any_name or name in self.names


def split_name(function: str) -> tuple[str, str]:
    """The file `*.py` or the module, and the name in it.

    Raises:
        ValueError: `function` has not the form.
    """
    form = _FORM.fullmatch(function)
    if form is None:
        raise ValueError("must be FILE.py:NAME, such as own.py:score, or package.module.NAME")
    return form["source"], form["name"]


def file_of(function: str) -> Path | None:
    """The file that has the function, if it is one of the user's; what is installed is known by its version."""
    source, _ = split_name(function)
    path = Path(source) if source.endswith(".py") else Path(*source.split(".")).with_suffix(".py")
    return path if path.is_file() else None


@cache
def find_function(function: str) -> Callable[..., Any]:
    """Import it. A file may import its neighbours, as a script may; a module may lie below the working directory.

    Raises:
        UserFunctionError: the rest of a sentence that begins with the function's name.
    """
    source, name = split_name(function)
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise UserFunctionError(f"cannot be loaded: there is no file {Path(source).absolute()}")
    try:
        module = _load_file(Path(source)) if is_file else _import(source)
    except BaseException as error:  # also SystemExit
        raise UserFunctionError(f"{raised(error)} while it was imported") from None
    found = getattr(module, name, None)
    if found is None:
        raise UserFunctionError(f"cannot be loaded: {source} has no {name}")
    if not callable(found):
        raise UserFunctionError(f"is no function, but {type(found).__name__}")
    return found


@cache  # a worker asks for every call
def parameters_of(function: str) -> Parameters:
    """
    Raises:
        UserFunctionError: as `find_function`, and if the function has parameters that cannot be given by name.
    """
    kinds = inspect.Parameter
    parameters = inspect.signature(find_function(function)).parameters.values()
    named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    if unnamed := [p.name for p in parameters if p.kind is kinds.POSITIONAL_ONLY and p.default is p.empty]:
        raise UserFunctionError(f"cannot be given {', '.join(unnamed)} by name: it must not be positional-only")
    return Parameters(
        names=[p.name for p in named],
        required=[p.name for p in named if p.default is p.empty],
        any_name=any(p.kind is kinds.VAR_KEYWORD for p in parameters),
    )


def raised(error: BaseException) -> str:
    """What a user's code raised and where, on one line; all of it goes into the log."""
    traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"raised {' '.join(f'{type(error).__name__}: {error}'.split()).removesuffix(':')}{where}"


def _load_file(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.parent.absolute()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)
