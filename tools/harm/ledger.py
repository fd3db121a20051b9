"""What a run has left, read by itself (JSON, MessagePack), not with the code that wrote it."""

import json
from collections import Counter
from typing import Any

import msgspec

from harm.run import BOUNDS, PROMPTS, ChaosRun, Violation

_MEASURED = ("time", "tokens_per_s", "model_flops_utilisation")


def check(run: ChaosRun, undisturbed: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Its metrics without times.

    Args:
        undisturbed: the same of such a run that was left alone.

    Raises:
        Violation: a promise was broken.
    """
    if left := run.kill_left():
        raise Violation(f"still there after the end: {left}")
    summary = json.loads((run.run / "summary.json").read_text())
    if summary["status"] != "completed":
        raise Violation(f"status {summary['status']}: {summary['error']}")
    lines = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    if [line["step"] for line in lines] != list(range(1, run.setting.steps + 1)):
        raise Violation(f"steps {[line['step'] for line in lines]}")
    trained = _trained(run)
    groups = range(run.setting.steps * PROMPTS)
    if trained != Counter(groups):
        twice = [index for index, times in trained.items() if times > 1]
        raise Violation(f"trained twice: {twice}, never: {sorted(set(groups) - set(trained))}")
    metrics = [{key: value for key, value in line.items() if not key.startswith(_MEASURED)} for line in lines]
    if undisturbed is not None and run.setting.schedule == "sync" and metrics != undisturbed:
        pairs = enumerate(zip(metrics, undisturbed, strict=True), 1)
        raise Violation(
            f"step {next(n for n, (ours, theirs) in pairs if ours != theirs)} is not that of an undisturbed run"
        )
    return metrics


def _trained(run: ChaosRun) -> Counter[int]:
    """How many times each group of samples was."""
    trained: Counter[int] = Counter()
    for path in sorted((run.run / "rollouts").glob("step_*.msgpack")):
        record = msgspec.msgpack.decode(path.read_bytes())
        for group in record["groups"]:
            trained[group["index"]] += 1
            oldest = min((version for versions in group["versions"] for version in versions), default=None)
            if oldest is not None and record["command"]["version"] - oldest > BOUNDS[run.setting.schedule]:
                raise Violation(f"group {group['index']} has tokens of version {oldest} in {path.name}")
    return trained
