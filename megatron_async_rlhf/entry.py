"""The console script. It loads nothing but Python's own modules until it knows that the package's requirements are installed."""

import shlex
import sys

from megatron_async_rlhf.installed import missing_requirements


def main() -> None:
    """`cli.main`, unless something that it or a process of a run will need is not there: then one line, exit code 2."""
    if missing := missing_requirements():
        print(
            f"error: {', '.join(missing)}: not installed here, in {sys.prefix}, and megatron_async_rlhf needs it: "
            f"pip install {shlex.join(missing)}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from megatron_async_rlhf.cli import main as run

    run()
