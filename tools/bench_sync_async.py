"""Trains one configuration with the synchronous and the asynchronous schedule, seed by seed, and compares them.

    .venv/bin/python tools/bench_sync_async.py examples/quickstart.yaml --seeds 0 1 2

Both schedules run on the same split: one core learns, the other generates; when synchronous, one of them idles.
Start-up and evaluations are not in the wall clock. Runs are kept in runs/compare/, finished ones are not repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

MODES = ("sync", "async")


def train(config: Path, mode: str, seed: int, overrides: list[str]) -> dict:
    """Summary of one run; an earlier completed one is taken as it is."""
    directory = Path("runs/compare") / f"{config.stem}-{mode}-{seed}"
    summary = directory / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "completed":
        settings = [f"run.dir={directory}", f"run.seed={seed}", f"schedule.mode={mode}", *overrides]
        flags = [part for setting in settings for part in ("-s", setting)]
        done = subprocess.run([sys.executable, "-m", "megatron_async_rlhf", "train", str(config), *flags])
        if done.returncode:
            raise SystemExit(done.returncode)  # it has said why
    return json.loads(summary.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", "-s", action="append", default=[], help="override for both, section.key=value")
    arguments = parser.parse_args()
    # Seed by seed and not mode by mode, so that a machine that gets slower slows both alike.
    runs = {
        (seed, mode): train(arguments.config, mode, seed, arguments.set) for seed in arguments.seeds for mode in MODES
    }
    print(f"{'seed':>4} {'mode':>6} {'before':>8} {'after':>8} {'wall s':>8} {'overlap':>8} {'staleness':>10}")
    for (seed, mode), run in runs.items():
        before, after = (run["eval"][when]["reward"] for when in ("before", "after"))
        staleness = f"{run['staleness']['mean']:.2f}/{run['staleness']['max']}"
        print(
            f"{seed:>4} {mode:>6} {before:>8.4f} {after:>8.4f} {run['wall_seconds']:>8.1f} "
            f"{run['overlap_efficiency']:>8.2f} {staleness:>10}"
        )
    after = {mode: fmean(runs[seed, mode]["eval"]["after"]["reward"] for seed in arguments.seeds) for mode in MODES}
    ratio = median(runs[seed, "sync"]["wall_seconds"] / runs[seed, "async"]["wall_seconds"] for seed in arguments.seeds)
    print(f"mean held-out reward: sync {after['sync']:.4f}, async {after['async']:.4f}")
    print(f"wall clock sync / async, same split, median over seeds: {ratio:.2f}")


if __name__ == "__main__":
    main()
