"""`async-rlhf schema`: the configuration for editors."""

import json
from pathlib import Path
from typing import Annotated

import typer


def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to this file; default: print it.")] = None,
) -> None:
    """Print the JSON schema of the configuration: editors complete keys with it, and say what they mean.

    With the YAML extension of VS Code, the first line of a configuration names it:
    # yaml-language-server: $schema=async-rlhf.json

    Example: async-rlhf schema --out async-rlhf.json
    """
    from megatron_async_rlhf.config.reference import json_schema

    text = json.dumps(json_schema(), indent=1) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    out.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {out}")
