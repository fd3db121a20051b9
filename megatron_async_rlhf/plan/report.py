"""Plans in words, as JSON, and as a page."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.generator_memory import GIB
from megatron_async_rlhf.pages.rendering import render
from megatron_async_rlhf.plan.search import Plan, devices_of, fastest, step_seconds
from megatron_async_rlhf.telemetry.summary import staleness_figures

_HOUR = 3600.0
# What a plan decides; the rest of a configuration is the task.
_DECIDED = {
    "learner": (
        "ranks", "tensor_parallel", "pipeline_parallel", "context_parallel", "virtual_stages", "sequence_parallel",
        "distributed_optimizer", "overlap_grad_reduce", "recompute", "micro_batch_tokens", "reference", "optimizer_offload", "threads",
    ),
    "generator": ("replicas", "tensor_parallel", "max_concurrent"),
    "schedule": ("mode", "max_staleness", "generation", "in_flight_updates"),
}  # fmt: skip

_COLUMNS = ("schedule", "learner", "generators", "step, s", "hours", "idle", "staleness")
_WORDS = 3  # of them, then numbers


def to_json(plan: Plan) -> dict[str, Any]:
    """Documented in docs/plan.md. Simulates the synchronous schedule, too."""
    return _facts(plan) | {"speedup_over_sync": plan.prediction.speedup}


def _facts(plan: Plan) -> dict[str, Any]:
    totals, step = plan.prediction.schedule.totals, step_seconds(plan)
    wall = totals.wall_s or 1.0
    return {
        "schedule": plan.kind,
        "step_seconds": step,
        "hours": step * plan.config.schedule.steps / _HOUR,
        "idle": {
            "learner": max(0.0, 1 - totals.train_busy_s / wall),
            "generators": max(0.0, 1 - totals.generate_busy_s / wall),
        },
        "staleness": staleness_figures(totals.staleness) | {"bound": plan.config.schedule.staleness_bound},
        "train_seconds": plan.times.train,
        "generate_seconds": generate_seconds(plan),
        "push_seconds": plan.times.push,
        "limited_by": limited_by(plan),
        "devices": {
            "learner": plan.config.learner.world_size,
            "generators": plan.config.generator.workers,
            "reward_models": plan.config.reward_workers,
            "unused": devices_of(plan.config)
            - plan.config.learner.world_size
            - plan.config.generator.workers
            - plan.config.reward_workers,
        },
        "memory_gib": {"learner": plan.learner_memory / GIB, "generator": plan.generator_memory / GIB},
        "settings": settings_of(plan.config),
    }


def settings_of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What the plan decides, by section."""
    tree = config.model_dump(mode="json")
    decided = {section: {key: tree[section][key] for key in keys} for section, keys in _DECIDED.items()}
    return decided | {key: {"replicas": model.replicas} for key, model in config.served_reward_models.items()}


def generate_seconds(plan: Plan) -> float:
    """Of a step, by formula and alone."""
    return plan.times.full if plan.kind == "bounded" else plan.times.generate + plan.times.tail


def limited_by(plan: Plan) -> str:
    """The side that a step waits for, and the largest part of its time."""
    generate = generate_seconds(plan)
    if plan.scoring > max(plan.times.train, generate):
        return "scoring: reward models"
    if plan.times.train >= generate + plan.times.push:
        step = plan.speed.learner
        parts = {
            "matrix products": step.compute,
            "sums over tensor-parallel ranks": step.tensor,
            "keys and values between context-parallel ranks": step.context,
            "pipeline bubbles": step.bubble,
            "gradients between copies": step.reduction,
            "Adam": step.optimizer,
        }
        return f"training: {_largest(parts)}"
    speed = plan.speed
    parts = {
        "reading weights": speed.token_s,
        f"{speed.at_once:.0f} sequences' caches, prompts and sampling": speed.at_once * speed.sequence_s,
    }
    return f"generation: {_largest(parts)}"


def _largest(parts: dict[str, float]) -> str:
    name = max(parts, key=lambda part: parts[part])
    return f"{name} {parts[name] / (sum(parts.values()) or 1.0):.0%}"


def show(console: Console, plans: Sequence[Plan], assumed: str) -> None:
    """A table of both kinds of schedule, what the best plan sets, and what all of it rests on."""
    table = Table(
        title=f"predicted for {devices_of(plans[0].config)} devices", title_justify="left", box=None, pad_edge=False
    )
    for place, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if place < _WORDS else "right", no_wrap=True)
    for plan in plans:
        table.add_row(*_cells(plan))
    console.print(table)
    console.print("idle: learner / generators; staleness: mean over tokens, in optimizer steps", markup=False)
    best = fastest(plans)
    console.print(f"the fastest, {best.kind.replace('_', ' ')}, waits for {limited_by(best)}; it sets", markup=False)
    for section, keys in settings_of(best.config).items():
        console.print(f"  {section}: {', '.join(f'{key} {value}' for key, value in keys.items())}", markup=False)
    console.print(f"assumed, not measured: {assumed}", markup=False)


def _cells(plan: Plan) -> list[str]:
    facts = _facts(plan)
    idle = facts["idle"]
    return [
        plan.kind.replace("_", " "),
        _learner(plan.config),
        f"{plan.config.generator.replicas} x TP{plan.config.generator.tensor_parallel}",
        f"{facts['step_seconds']:.2f}",
        f"{facts['hours']:.1f}",
        f"{idle['learner']:.0%} / {idle['generators']:.0%}",
        f"{facts['staleness']['mean']:.1f}",
    ]


def page(plans: Sequence[Plan], assumed: str) -> str:
    """The same as HTML, with what each plan waits for and sets."""
    best = fastest(plans)
    return render(
        "plan/page.html.jinja",
        title=f"{best.config.run.name}: plans for {devices_of(best.config)} devices",
        columns=_COLUMNS,
        rows=[_cells(plan) for plan in plans],
        best=best.kind.replace("_", " "),
        limit=limited_by(best),
        limits=[[*_cells(plan)[:3], limited_by(plan), *_memory(plan)] for plan in plans],
        settings=[
            [f"{section}.{key}", value]
            for section, keys in settings_of(best.config).items()
            for key, value in keys.items()
        ],
        assumed=assumed,
    )


def _memory(plan: Plan) -> list[str]:
    return [f"{size / GIB:.1f}" for size in (plan.learner_memory, plan.generator_memory)]


def _learner(config: RunConfig) -> str:
    learner = config.learner
    sizes = {
        "TP": learner.tensor_parallel,
        "PP": learner.pipeline_parallel,
        "CP": learner.context_parallel,
        "DP": learner.data_parallel,
    }
    return f"{learner.world_size}: " + (
        " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"
    )
