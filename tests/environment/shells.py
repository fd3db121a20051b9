"""A run in a shell of one's own: directory, variables, limits, locale; and what of it can be compared to the last digit."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

TINY = Path(__file__).parents[1] / "e2e/tiny.yaml"
TIMEOUT_S = 170
# Ends of keys that have to do with the clock.
_TIMED = ("_s", "_s_mean", "seconds", "utilisation", "overlap")


def start(
    command: list[str],
    directory: Path,
    variables: dict[str, str] | None = None,
    *,
    without: tuple[str, ...] = (),
    prepare: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess:
    """Run `async-rlhf` with these arguments, with `variables` on top of the tests' own."""
    environment = {name: value for name, value in os.environ.items() if name not in without} | (variables or {})
    return subprocess.run(
        [sys.executable, "-m", "megatron_async_rlhf", *command],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
        preexec_fn=prepare,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def settings(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("-s", override)]


def limited(name: int, soft: int, hard: int | None = None) -> Callable[[], None]:
    """Sets a limit of the process that is about to start."""
    return lambda: resource.setrlimit(name, (soft, soft if hard is None else hard))


def results(run_dir: Path) -> dict[str, object]:
    """Weights, rewards, losses, completions."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "completed", summary["error"]
    digits = {file: _lines(run_dir / file) for file in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")}
    weights = sorted((run_dir / "checkpoints/final").glob("*.safetensors"))
    assert weights and all(digits.values())
    return {**digits, "eval": summary["eval"], "weights": [sha256(path.read_bytes()).hexdigest() for path in weights]}


def _lines(path: Path) -> list[object]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [
        {key: value for key, value in line.items() if not key.endswith(_TIMED) and not key.startswith("time")}
        for line in lines
    ]
