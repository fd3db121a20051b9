"""Harms real runs in every way, and proves from what they leave that nothing was lost, trained twice, or late.

    python tools/chaos.py /tmp/chaos --runs 40 --faults 5 --json docs/results/chaos.json

Every run is of a small fresh model on CPU cores: a learner of one or two ranks, two generators, a reward in worker processes,
a checkpoint every second step; some runs are on two machines (network namespaces) with a wire between them. The faults of a
run are drawn from `--seed` and its number, so each can be made again (`--only`). A run that ends before it is completed is
resumed, as an operator would.

The ledger (`harm.ledger`) is written for this alone:

- every optimizer step is there once; every group of prompts is trained once; no token is older than the bound;
- a run that is still running makes a step, or ends, within `--bound` seconds of a fault;
- a run that ends says why: by the name of the process, machine or file that was harmed;
- a synchronous run has the metrics of an undisturbed one, bit for bit.

Needs root, strace and a C compiler for some faults; says which it leaves out.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harm.faults import FAULTS, WIRE, impossible_here
from harm.ledger import check
from harm.run import SCHEDULES, STEPS, ChaosRun, Setting, Violation, adopt_orphans

_LAST = 4  # steps, whose mean reward is a run's final one


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the runs; those that went well are deleted")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--faults", type=int, default=5, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the run with this number")
    parser.add_argument(
        "--kind", action="append", choices=sorted(FAULTS), help="draw from these alone; repeat for more"
    )
    parser.add_argument("--bound", type=float, default=150.0, help="most seconds without a step or an end")
    parser.add_argument(
        "--json", type=Path, help="write the results to this file; runs that it has already are not made again"
    )
    options = parser.parse_args()
    adopt_orphans()
    missing = impossible_here()
    for kind, need in missing.items():
        print(f"left out: {kind}, which needs {need}")
    kinds = [kind for kind in sorted(options.kind or FAULTS) if kind not in missing]
    left_alone: dict[tuple[str, int], list[dict[str, Any]]] = {}
    results = earlier(options)
    done = {result["number"] for result in results}
    for number in range(options.runs) if options.only is None else [options.only]:
        if number in done:
            continue
        dice = random.Random(f"{options.seed}/{number}")
        faults = dice.sample(kinds, min(options.faults, len(kinds)))
        setting = draw_setting(dice, faults)
        alike = setting.schedule, setting.ranks
        if alike not in left_alone:
            left_alone[alike] = undisturbed(Setting(*alike), options.bound)
        results.append(one(options, number, setting, faults, dice, left_alone[alike]))
        if options.json is not None:
            options.json.write_text(json.dumps(summary(options.seed, results), indent=1) + "\n")
    bad = sum(result["violation"] is not None for result in results)
    print(f"{sum(len(result['faults']) for result in results)} faults in {len(results)} runs, {bad} violations")
    for line in summary(options.seed, results)["rewards"]:
        print(line)
    return 1 if bad else 0


def earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of the same seed that are in the file; tried again is what broke a promise."""
    if options.json is None or not options.json.exists():
        return []
    found = json.loads(options.json.read_text())
    return [run for run in found["runs"] if found["seed"] == options.seed and run["violation"] is None]


def draw_setting(dice: random.Random, faults: list[str]) -> Setting:
    """What these faults need, and otherwise anything."""
    return Setting(
        dice.choice(sorted(SCHEDULES)),
        ranks=dice.choice([1, 2]),
        machines=2 if WIRE & set(faults) else 1,
        disk="disk full" in faults,
        clock="clock set" in faults,
    )


def undisturbed(setting: Setting, bound_s: float) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        run = ChaosRun(Path(directory) / "whole", setting, bound_s=bound_s)
        try:
            run.wait(lambda: run.process.poll() == 0)
            return check(run, None)
        finally:
            run.close()


def one(
    options: argparse.Namespace,
    number: int,
    setting: Setting,
    faults: list[str],
    dice: random.Random,
    left_alone: list[dict[str, Any]],
) -> dict[str, Any]:
    began, violation, reward = time.monotonic(), None, None
    run = ChaosRun(options.out / f"run_{number}", setting, bound_s=options.bound)
    try:
        disturb(run, faults, dice)
        run.close()
        reward = final_reward(check(run, left_alone))
    except Violation as error:
        violation = str(error)
    finally:
        run.close()
    seconds = time.monotonic() - began
    print(
        f"run {number}, {setting}: {'; '.join(run.done)}; {seconds:.0f} s; {violation or 'all promises kept'}",
        flush=True,
    )
    if violation is None:
        shutil.rmtree(run.directory)
    return {
        "number": number, "setting": str(setting), "alike": f"{setting.schedule}, {setting.ranks} rank(s)", "faults": run.done, "ends": run.ends, "seconds": round(seconds, 1),
        "slowest": round(run.slowest, 1), "reward": reward, "reward_left_alone": final_reward(left_alone),
        "violation": violation,
    }  # fmt: skip


def disturb(run: ChaosRun, faults: list[str], dice: random.Random) -> None:
    """Each after another step, as far as there are any."""
    for place, fault in enumerate(faults):
        step = 1 + place * (STEPS - 3) // len(faults)
        run.wait(lambda step=step: run.steps() >= step)
        if run.process.poll() == 0:
            break
        time.sleep(dice.random() * 1.5)
        run.harm(FAULTS[fault], dice)
    run.wait(lambda: run.process.poll() == 0)


def final_reward(metrics: list[dict[str, Any]]) -> float:
    return mean(line["reward"] for line in metrics[-_LAST:])


def summary(seed: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """With the final rewards of recovered runs beside that of one that was left alone."""
    rewards, left_alone = defaultdict(list), {}
    for result in results:
        if result["reward"] is not None:
            rewards[result["alike"]].append(result["reward"])
            left_alone[result["alike"]] = result["reward_left_alone"]
    lines = [
        f"{alike}: {len(found)} recovered runs {mean(found):.4f}"
        f"{f' (deviation {stdev(found):.4f})' if len(found) > 1 else ''}, left alone {left_alone[alike]:.4f}"
        for alike, found in sorted(rewards.items())
    ]
    faults = sum(len(result["faults"]) for result in results)
    bad = sum(result["violation"] is not None for result in results)
    return {"seed": seed, "faults": faults, "violations": bad, "rewards": lines, "runs": results}


if __name__ == "__main__":
    raise SystemExit(main())
