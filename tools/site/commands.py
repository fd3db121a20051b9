"""Prints docs/commands.md: what `--help` says of every command.

python tools/site/commands.py > docs/commands.md
"""

import inspect

import typer

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.reference import in_cell, in_markdown

HEAD = """\
# Commands

What `async-rlhf COMMAND --help` says. `-s section.key=value` overrides a key of the [configuration](configuration.md), as often as
needed; `async-rlhf --install-completion` completes commands and options in the shell.
"""


def main() -> None:
    print(HEAD)
    for name, command in typer.main.get_command(app).commands.items():
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
        words = [each.name.upper() if each.required else f"[{each.name.upper()}]" for each in arguments]
        print(f"## `{' '.join([name, *words])}`\n\n{about(command)}\n")
        for each in arguments:
            print(f"- `{each.name.upper()}`: {cell(each.help)}")
        if arguments:
            print()
        if options:
            print("| option | default | |\n| --- | --- | --- |")
            for each in options:
                print(f"| `{', '.join(each.opts)}` | {default(each)} | {cell(each.help)} |")
            print()


def about(command) -> str:
    """The help; the example as code."""
    text, _, example = inspect.cleandoc(command.help or "").partition("Example: ")
    lines = (f"`{line}`" if line.startswith("# ") else line for line in text.strip().splitlines())
    text = in_markdown("\n".join(lines))
    return "\n\n".join([text, *([f"`{' '.join(example.split())}`"] if example else [])])


def default(option) -> str:
    if option.required:
        return "must be given"
    if option.is_flag or option.default in (None, [], ()) or callable(option.default):
        return ""
    return f"`{getattr(option.default, 'value', option.default)}`"


def cell(text: str | None) -> str:
    return in_cell(" ".join((text or "").split()))


if __name__ == "__main__":
    main()
