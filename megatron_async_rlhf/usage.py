"""Runs a command line; what is wrong with it, or with what it names, is one line on stderr for each problem.

Exit codes: 2 for bad input, before anything was started; 1 for a run that failed; else the command's own.
"""

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer

from megatron_async_rlhf.config.load import override_of
from megatron_async_rlhf.config.schema import places_of
from megatron_async_rlhf.errors import AsyncRLHFError, CheckpointError, ConfigError, DataError, MappingError
from megatron_async_rlhf.suggestions import closest

_NAME = "async-rlhf"
EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
_ALMOST = 0.9  # difflib's ratio: `--seed` and `--seeds` have 0.92
_UsageError: Any = typer.BadParameter.__base__  # click's, of which Typer may have a copy of its own
_ClickException = _UsageError.__base__


def run_command_line(app: typer.Typer, arguments: Sequence[str]) -> int:
    """The exit code."""
    try:
        code = app(list(arguments), prog_name=_NAME, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Abort:
        return _fail(["interrupted"], EXIT_FAILED)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return EXIT_BAD_INPUT
        return _fail([_usage(error, arguments)], EXIT_BAD_INPUT)
    except _ClickException as error:
        return _fail([error.format_message()], EXIT_BAD_INPUT)
    except (ConfigError, DataError, CheckpointError, MappingError) as error:
        return _fail(str(error).split("\n"), EXIT_BAD_INPUT)
    except AsyncRLHFError as error:
        print(f"error: {error}", file=sys.stderr)  # as it is: it may quote a log
        return EXIT_FAILED


def _fail(lines: Sequence[str], code: int) -> int:
    for line in lines:
        print(f"error: {' '.join(line.splitlines())}", file=sys.stderr)  # U+2028 and its like end no line of ours
    return code


def _usage(error: Any, arguments: Sequence[str]) -> str:
    context = error.ctx
    command = context.command_path if context is not None else _NAME
    help_of = f"see {command} --help"
    if (option := getattr(error, "option_name", None)) and type(error).__name__ == "NoSuchOption":
        return f"there is no option {option}; {_instead_of_option(option, arguments, context.command) or help_of}"
    message = " ".join(error.format_message().split()).rstrip(".")
    if found := re.search(r"No such command '(.*?)'", message):
        names = list(getattr(context.command, "commands", {}))
        meant = closest(found[1], names)
        return f"there is no command {found[1]}; " + (
            f"did you mean {meant}?" if meant else f"there are {', '.join(names)}"
        )
    if found := re.search(r"unexpected extra argument\S* \((.*)\)", message):
        return (
            f"unexpected argument {found[1]}; {_instead_of_argument(found[1], arguments, context.command) or help_of}"
        )
    if found := re.search(r"Invalid value for (.*?): (.*)", message):
        return f"{found[1].replace(chr(39), '')}: {_bad_value(found[2])}; {help_of}"
    return f"{message[:1].lower()}{message[1:]}; {help_of}"


def _bad_value(message: str) -> str:
    """In Typer's message pydantic speaks."""
    if found := re.search(r"'(.*)' is not one of (.*)", message):
        meant = closest(found[1], re.findall("'(.*?)'", found[2]))
        return f"{found[1]} is not one of {found[2]}" + (f", did you mean {meant}?" if meant else "")
    rule = re.sub(r"Input should be (a )?(valid )?", "must be ", message).partition(", unable")[0]
    return rule.replace("must be integer", "must be a whole number").replace("must be number", "must be a number")


def _instead_of_option(option: str, arguments: Sequence[str], command: Any) -> str | None:
    """An option that differs by a letter; `--learner.ranks=2` and `--steps 5`: a key of the configuration; else an option of a
    similar name."""
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
    if almost := get_close_matches(option, options, n=1, cutoff=_ALMOST):
        return f"did you mean {almost[0]}?"
    name = option.lstrip("-").replace("-", "_")
    places = [option.lstrip("-")] if "." in option else places_of(name)
    if places and "--set" in options:
        value = _value_of(option, arguments)
        return "a key of the configuration is set with " + " or ".join(f"-s {place}={value}" for place in places[:3])
    meant = closest(option, options)
    return None if meant is None else f"did you mean {meant}?"


def _value_of(option: str, arguments: Sequence[str]) -> str:
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option and place + 1 < len(arguments) and not arguments[place + 1].startswith("-"):
            return arguments[place + 1]
    return "VALUE"


def _instead_of_argument(given: str, arguments: Sequence[str], command: Any) -> str | None:
    if not any("--set" in parameter.opts for parameter in command.params):
        return None
    parts = given.split()
    place = arguments.index(parts[0]) if parts[0] in arguments else 0
    before = [argument for argument in arguments[:place] if argument not in ("-s", "--set")]
    if parts[0] == "=" or (before and before[-1].endswith("=")):
        return "an override has no spaces around its =: -s section.key=value"
    if before and before[-1].count("{") > before[-1].count("}"):
        return f"the shell divides at spaces: put the override in quotes, -s '{before[-1]} {given}'"
    if parts[0].startswith("~"):
        return f"to set a key back to nothing: -s {parts[0][1:].partition('=')[0]}=null"
    meant = [override_of(part) for part in parts]
    if all(meant):
        return "a key of the configuration is set with " + " ".join(f"-s {override}" for override in meant)
    if len(parts) == 1 and "." in given and not given.endswith((".yaml", ".yml")):
        return f"a key of the configuration is set with -s {given}=VALUE"
    return None
