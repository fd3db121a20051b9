"""Prints all that can be said of a run without starting anything: configuration, estimate, and which process goes where."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import typer

from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.fitting import generator_budget
from megatron_async_rlhf.estimate.learner_memory import Work
from megatron_async_rlhf.estimate.report import describe, describe_learner
from megatron_async_rlhf.jobs.inputs import check_description, check_inputs, make_model_template, missing_inputs
from megatron_async_rlhf.jobs.supervised_inputs import SupervisedInputs, check_supervised_inputs, describe_supervised
from megatron_async_rlhf.launch.nodes import planned_nodes
from megatron_async_rlhf.launch.plan import ProcessPlan, plan_learner_alone, plan_processes
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.simulate import prediction


def print_plan(config: RunConfig) -> None:
    """Of a model that is not here, what follows from its shape; of machines, what the configuration says of them."""
    missing = missing_inputs(config)
    if missing:
        architecture, transfer = check_description(config)
        prompts = ["prompts: not checked"]
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            make_model_template(config, Path(scratch))
            run_inputs = check_inputs(config, Path(scratch))
        architecture, transfer = run_inputs.architecture, run_inputs.transfer
        counts = f"prompts: {len(run_inputs.train)} to train on, {len(run_inputs.eval)} held out"
        prompts = [counts, *run_inputs.data.notes]
    typer.echo(dump_config(config))
    typer.echo(f"# policy: {architecture.num_parameters / 1e6:.2f} M parameters")
    for line in prompts:
        typer.echo(f"# {line}")
    slices = sum(len(message) for messages in transfer.streams.values() for message in messages)
    rounds = max(len(messages) for messages in transfer.streams.values())
    megabytes = transfer.num_bytes * config.generator.replicas / 1e6
    typer.echo(f"# weights: {megabytes:.2f} MB a push: {slices} slices in {rounds} rounds to each generator")
    for line in (*describe(config, architecture), *prediction.describe(config, architecture)):
        typer.echo(f"# {line}")
    nodes = planned_nodes(config)
    run_dir, budget = config.run.path.absolute(), generator_budget(config, architecture)
    for process in plan_processes(config, run_dir, architecture.context_length, nodes, budget=budget).processes:
        cores = f"cores {process.cores}" if process.cores else "any core"
        where = f"GPUs {process.gpus}" if process.gpus else cores
        machine = f"{nodes[process.node].name}, " if len(nodes) > 1 else ""
        typer.echo(f"# {process.name}: {machine}{where}: {' '.join(process.arguments)}")
    for line in missing:
        typer.echo(f"# not checked, and needed for a start: {line}")


def print_sft_plan(config: RunConfig) -> None:
    """Of supervised fine-tuning: what it learns from, and its processes. Of a model that is not here, what its shape says."""
    missing = missing_inputs(config)
    if missing:
        architecture, sequences = describe_supervised(config), config.supervised.sequences_per_step
        said = ["answered conversations: not checked"]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            make_model_template(config, Path(scratch))
            inputs = check_supervised_inputs(config, Path(scratch))
        architecture, sequences = inputs.architecture, max(map(len, inputs.batches))
        said = [*_said_of(inputs), *inputs.data.notes]
    plan = plan_learner_alone(config, config.run.path.absolute(), planned_nodes(config), "sft")
    print_learner_plan(config, "policy", architecture, said, Work(sequences=sequences), plan, missing)


def print_learner_plan(
    config: RunConfig,
    what: str,
    architecture: Architecture,
    said: Sequence[str],
    work: Work,
    plan: ProcessPlan,
    missing: Sequence[str],
) -> None:
    """Of a stage without generators.

    Args:
        what: is trained.
        said: of the data.
        missing: what a start would lack, see `missing_inputs`.
    """
    typer.echo(dump_config(config))
    typer.echo(f"# {what}: {architecture.num_parameters / 1e6:.2f} M parameters")
    for line in (*said, *describe_learner(config, architecture, work)):
        typer.echo(f"# {line}")
    nodes = planned_nodes(config)
    for process in plan.processes:
        typer.echo(f"# {process.name}: {nodes[process.node].name}: {' '.join(process.arguments)}")
    for line in missing:
        typer.echo(f"# not checked, and needed for a start: {line}")


def _said_of(inputs: SupervisedInputs) -> list[str]:
    train, batches = inputs.train, inputs.batches
    sequences = sum(map(len, batches))
    return [
        f"answered conversations: {len(train.rows)} to train on, {len(inputs.held_out)} held out; left out: "
        f"{train.unanswered} without an answer, {train.too_long} too long",
        f"{len(batches)} steps of {sequences / len(batches):.4g} sequences: {sequences / len(train.rows):.1f} epochs",
    ]
