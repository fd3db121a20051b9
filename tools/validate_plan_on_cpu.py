"""Compares predicted step times with measured ones of runs on this machine's cores.

    .venv/bin/python tools/validate_plan_on_cpu.py                       # all models, on two cores or more
    .venv/bin/python tools/validate_plan_on_cpu.py --only 0.9M --only 6M

A synchronous run of a model calibrates the planner, as `async-rlhf plan --from-run` does. The other runs differ from it in
schedule, samples of a prompt, lengths or learner ranks, and nothing is calibrated on them. A machine's speed changes from minute to
minute, so each of them has such a synchronous run before it and one after it: what is predicted is the mean of both predictions.
Models are fresh ones on the prompts of the built-in task, so that nothing else is needed; the reward is a hash of the text, so that
no pair is a tie and every step trains on all of its samples.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from megatron_async_rlhf.config.load import check_tree
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.launch.child_command import EXIT_COMPLETED, Commands
from megatron_async_rlhf.plan.calibration import Calibration, calibrate
from megatron_async_rlhf.simulate.prediction import estimated_scenario, predict, shape_of, sized
from megatron_async_rlhf.telemetry.files import METRICS, read_steps

WARM_UP = 2  # steps at the start that are not measured
ONE_STEP = {"schedule": {"mode": "async", "max_staleness": 1}}
STREAMING = {
    "schedule": {"mode": "async", "generation": "streaming", "in_flight_updates": "recompute", "max_staleness": 2}
}


@dataclass(frozen=True)
class Model:
    """
    Attributes:
        shape: section `model` of its runs.
        prompts, steps: of a run.
        tokens: of its longest completions.
        cases: by what they are called; sections that differ from the synchronous run with two samples of a prompt.
    """

    shape: dict[str, Any]
    prompts: int
    steps: int
    tokens: int
    cases: dict[str, dict[str, Any]]


def _shape(layers: int, hidden: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    return {
        "layers": layers, "hidden_size": hidden, "ffn_size": 3 * hidden, "heads": heads, "kv_heads": kv_heads,
        "context_length": 192, "tokenizer": "bytes", **others,
    }  # fmt: skip


MODELS = {
    "0.9M": Model(
        shape=_shape(4, 128, 4, 2),
        prompts=64,
        steps=16,
        tokens=32,
        cases={
            "one step, K = 2": ONE_STEP,
            "one step, K = 4": ONE_STEP | {"algorithm": {"samples_per_prompt": 4}},
            "streaming, K = 8": STREAMING | {"algorithm": {"samples_per_prompt": 8}},
        },
    ),
    "6M": Model(
        shape=_shape(8, 256, 8, 2),
        prompts=32,
        steps=12,
        tokens=64,
        cases={
            "one step, 16 tokens": ONE_STEP | {"generator": {"max_new_tokens": 16}},
            "two learner ranks, K = 4": ONE_STEP | {"algorithm": {"samples_per_prompt": 4}, "learner": {"ranks": 2}},
            "streaming, K = 4": STREAMING | {"algorithm": {"samples_per_prompt": 4}},
        },
    ),
    "135M": Model(
        shape=_shape(38, 576, 9, 3, ffn_size=1536),  # SmolLM2's layers, more of them as it lacks the vocabulary
        prompts=8,
        steps=7,
        tokens=64,
        cases={
            "one step, K = 4": ONE_STEP | {"algorithm": {"samples_per_prompt": 4}},
            "streaming, K = 4": STREAMING | {"algorithm": {"samples_per_prompt": 4}},
        },
    ),
}


def score(completions: Iterable[str]) -> list[float]:
    """From 0 to 1; of a text, always the same."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def config_of(model: Model, directory: Path, changes: dict[str, dict[str, Any]]) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(directory)},
        "model": model.shape,
        "data": {"train": "builtin", "eval_prompts": 1},
        "learner": {"learning_rate": 1e-12, "micro_batch_tokens": 2048},  # completions stay as long as they are
        "generator": {"max_new_tokens": model.tokens, "max_concurrent": 128},
        "algorithm": {"type": "online_dpo", "samples_per_prompt": 2, "missing_eos_reward": None},
        "reward": {"type": "function", "function": f"{__file__}:score"},
        "schedule": {"mode": "sync", "steps": model.steps, "prompts_per_step": model.prompts},
        "launch": {"gpus_per_node": len(os.sched_getaffinity(0))},
    }
    for section, keys in changes.items():
        tree[section] = tree[section] | keys
    return check_tree(tree)


def train(commands: Commands, config: RunConfig) -> float:
    """Make the run; seconds of a step once it is under way."""
    if commands.run("train", config.run.path.name, config) != EXIT_COMPLETED:
        raise SystemExit(1)
    times = [line["time/elapsed_s"] for line in read_steps(config.run.path / METRICS)]
    return (times[-1] - times[WARM_UP - 1]) / (len(times) - WARM_UP)


def predicted(config: RunConfig, calibration: Calibration) -> float:
    """Seconds of a step once the run is under way, as the planner predicts them."""
    arch = shape_of(config)
    prompt, completion = calibration.lengths
    limit = config.generator.max_new_tokens
    lengths = prompt, min(completion, limit)
    scenario, _ = estimated_scenario(config, arch, lengths, calibration.factors, calibration.completions)
    return predict(sized(config), scenario).schedule.step_s


def rows(name: str, model: Model, directory: Path, commands: Commands) -> list[dict[str, Any]]:
    """Predicted and measured seconds of each case."""

    def calibrated(number: int) -> Calibration:
        base = config_of(model, directory / f"{name}_sync_{number}", {})
        sync_s = train(commands, base)
        calibration = calibrate(base.run.path)
        typer.echo(f"{name}: synchronous {sync_s:.2f} s a step; {calibration.source}", err=True)
        return calibration

    found = []
    before = calibrated(0)
    for i, (case, changes) in enumerate(model.cases.items()):
        config = config_of(model, directory / f"{name}_{i}", changes)
        measured = train(commands, config)
        after = calibrated(i + 1)
        seconds = fmean(predicted(config, calibration) for calibration in (before, after))
        before = after
        typer.echo(f"{name}, {case}: predicted {seconds:.2f} s, measured {measured:.2f} s", err=True)
        found.append({"model": name, "case": case, "predicted_s": seconds, "measured_s": measured})
    return found


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(MODELS)}; again for more.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Directory for the runs; default: a temporary one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    if unknown := set(only or ()) - set(MODELS):
        raise typer.BadParameter(f"--only {unknown.pop()}: one of {', '.join(MODELS)}")
    with tempfile.TemporaryDirectory() as scratch:
        directory = (keep or Path(scratch)).resolve()
        with Commands(directory, note=lambda line: typer.echo(line, err=True)) as commands:
            found = [row for name in only or MODELS for row in rows(name, MODELS[name], directory, commands)]
    print("| model | configuration | measured | predicted | error |")
    print("| --- | --- | --- | --- | --- |")
    for row in found:
        off = row["predicted_s"] / row["measured_s"] - 1
        print(
            f"| {row['model']} | {row['case']} | {row['measured_s']:.2f} s | {row['predicted_s']:.2f} s | {off:+.0%} |"
        )
    if json_file:
        json_file.write_text(json.dumps({"cores": len(os.sched_getaffinity(0)), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
