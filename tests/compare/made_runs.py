"""Directories as completed runs leave them, with made-up figures."""

import json
from pathlib import Path
from typing import Any

from small_config import small_config

from megatron_async_rlhf.config.load import dump_config

SCHEDULES: dict[str, dict[str, dict[str, Any]]] = {
    "async": {"schedule": {"mode": "async"}},
    "same_split": {"schedule": {"mode": "sync"}},
    "alternating": {"schedule": {"mode": "sync"}, "launch": {"cores": "shared"}},
}


def leave_run(
    directory: Path,
    schedule: str,
    seed: int = 0,
    *,
    steps: int = 20,
    generate_s: float = 40.0,
    train_s: float = 50.0,
    wall_s: float = 100.0,
    after: float = 0.5,
    status: str = "completed",
    times: list[float] | None = None,
    **sections: dict[str, Any],
) -> Path:
    """Step n earns n / steps, at equal distances in time unless `times` says otherwise; KL of step n is n."""
    config = small_config(directory, seed, SCHEDULES[schedule], sections, {"schedule": {"steps": steps}})
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))
    times = times or [wall_s * n / steps for n in range(1, steps + 1)]
    lines = [
        {"step": n, "time": 1e9 + at, "time/elapsed_s": at, "reward": n / steps, "kl_to_reference": float(n)}
        for n, at in enumerate(times, 1)
    ]
    _write_lines(directory / "metrics.jsonl", lines)
    rewards = {"before": [0.0, 0.5, 0.5, 1.0], "after": [1.0, 0.5, 0.0, 1.0]}
    _write_lines(
        directory / "evaluations.jsonl", [{"when": when, "reward": r} for when in rewards for r in rewards[when]]
    )
    summary = {
        "status": status, "steps": steps, "startup_seconds": 9.0, "wall_seconds": wall_s,
        "generate_busy_seconds": generate_s, "train_busy_seconds": train_s, "samples_generated": 8 * steps,
        "samples_cancelled": 0, "tokens_generated": 80 * steps, "max_staleness": 1,
        "weight_sync": {"count": steps, "seconds_mean": 0.1, "generator_stall_seconds_mean": 0.1},
        "eval": {"before": {"reward": 0.25}, "after": {"reward": after}},
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
