"""All that can be said of a run without starting anything: configuration, data, estimate, and which process goes where.

Models may be here as a description alone, and data not at all: then a plan says what follows from the shape, and what a start
would lack.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import typer
from msgspec import Struct
from msgspec.structs import replace

from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.config.reward_modelling import RewardModellingSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sft import SFTSection
from megatron_async_rlhf.errors import ConfigError, UnreachableError
from megatron_async_rlhf.estimate.fitting import generator_budget
from megatron_async_rlhf.estimate.learner_memory import Work
from megatron_async_rlhf.estimate.report import describe, describe_learner, refuse_too_large
from megatron_async_rlhf.jobs.described import NOT_CHECKED, Missing, missing_inputs
from megatron_async_rlhf.jobs.inputs import check_description, check_inputs, make_model_template
from megatron_async_rlhf.jobs.pair_inputs import (
    PairInputs,
    check_pair_inputs,
    make_reward_model_template,
    pair_architecture,
)
from megatron_async_rlhf.jobs.supervised_inputs import (
    SupervisedInputs,
    check_supervised_inputs,
    supervised_architecture,
)
from megatron_async_rlhf.launch.nodes import Node, planned_nodes
from megatron_async_rlhf.launch.plan import (
    ProcessPlan,
    ProcessSpec,
    plan_learner_alone,
    plan_processes,
    plan_reward_model,
)
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.simulate import prediction

Checked = TypeVar("Checked")
Coming = Mapping[Path, str] | None  # as for `missing_inputs`


class Plan(Struct, frozen=True, kw_only=True):
    """What is said of one command.

    Attributes:
        lines: that follow the configuration.
        refusal: why a start would be refused nevertheless, if that is known.
    """

    lines: list[str]
    refusal: str | None = None


def echo_plan(config: RunConfig, plan: Plan) -> None:
    """The whole is YAML, of which all but the configuration are comments.

    Raises:
        ConfigError: a start would be refused; after all has been printed.
    """
    typer.echo(dump_config(config))
    for line in plan.lines:
        typer.echo(f"# {line}")
    if plan.refusal is not None:
        raise ConfigError(plan.refusal)


def plan_of_run(config: RunConfig, coming: Coming = None) -> Plan:
    """Of `train`. Of machines it says what the configuration says of them.

    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    missing = missing_inputs(config, coming=coming)
    with scratch_directory() as scratch:
        make_model_template(config, scratch, or_described=True)
        check = partial(check_inputs, config, scratch, or_described=True)
        run_inputs, missing = checked_with_data(check, missing, coming)
        if run_inputs is None:
            architecture, transfer = check_description(config, scratch)
            said = ["prompts: not checked"]
        else:
            architecture, transfer = run_inputs.architecture, run_inputs.transfer
            counts = f"prompts: {len(run_inputs.train)} to train on, {len(run_inputs.eval)} held out"
            said = [counts, *run_inputs.data.notes]
    slices = sum(len(message) for messages in transfer.streams.values() for message in messages)
    rounds = max(len(messages) for messages in transfer.streams.values())
    megabytes, nodes = transfer.num_bytes * config.generator.replicas / 1e6, planned_nodes(config)
    lines = [  # the answers last, where a terminal shows them
        *where_processes_go(_processes_of_run(config, architecture, nodes), nodes),
        f"policy: {architecture.num_parameters / 1e6:.2f} M parameters",
        *said,
        f"weights: {megabytes:.2f} MB a push: {slices} slices in {rounds} rounds to each generator",
        *describe(config, architecture),
        *prediction.describe(config, architecture),
        *not_checked(missing.lines),
    ]
    return Plan(lines=lines, refusal=_refusal(config, architecture))


def plan_of_sft(config: RunConfig, coming: Coming = None) -> Plan:
    """Of supervised fine-tuning.

    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    missing = missing_inputs(config, rewards=config.sft is None, coming=coming)
    with scratch_directory() as scratch:
        make_model_template(config, scratch, or_described=True)
        check = partial(check_supervised_inputs, config, scratch, or_described=True)
        inputs, missing = checked_with_data(check, missing, coming)
        if inputs is None:
            architecture, sequences = supervised_architecture(config, scratch), config.supervised.sequences_per_step
            said = ["answered conversations: not checked", _steps_of_unknown(config.supervised, "conversations")]
        else:
            architecture, sequences = inputs.architecture, max(map(len, inputs.batches))
            said = [*_said_of_conversations(inputs), *inputs.data.notes]
    plan = plan_learner_alone(config, config.run.path.absolute(), planned_nodes(config), "sft")
    return _plan_of_learner(config, "policy", architecture, said, Work(sequences=sequences), plan, missing.lines)


def plan_of_reward_model(config: RunConfig, coming: Coming = None) -> Plan:
    """Of the training of a reward model.

    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    missing = missing_inputs(config, rewards=False, coming=coming)
    with scratch_directory() as scratch:
        make_reward_model_template(config, scratch, or_described=True)
        check = partial(check_pair_inputs, config, scratch, or_described=True)
        inputs, missing = checked_with_data(check, missing, coming)
        if inputs is None:
            architecture, pairs = pair_architecture(config, scratch), config.reward_modelling.batch_size
            said = ["preference pairs: not checked", _steps_of_unknown(config.reward_modelling, "pairs")]
        else:
            architecture, pairs = inputs.architecture, max(map(len, inputs.batches))
            said = [*_said_of_pairs(inputs), *inputs.data.notes]
    plan, work = plan_reward_model(config, planned_nodes(config)), Work(sequences=2 * pairs)
    return _plan_of_learner(config, "reward model", architecture, said, work, plan, missing.lines)


def checked_with_data(check: Callable[[], Checked], missing: Missing, coming: Coming) -> tuple[Checked | None, Missing]:
    """What a check of a stage with its data has found, and what is missing; None where the data is not known.

    Data at a hub that cannot be asked is not known either, if a start is planned for another machine or a later time.
    """
    if missing.hides_data:
        return None, missing
    try:
        return check(), missing
    except UnreachableError as error:
        if not missing.weights and coming is None:
            raise
        return None, replace(missing, prompts=[f"prompts: {error}"])


def where_processes_go(processes: Iterable[ProcessSpec], nodes: Sequence[Node]) -> Iterator[str]:
    for process in processes:
        cores = f"cores {process.cores}" if process.cores else "any core"
        where = f"GPUs {process.gpus}" if process.gpus else cores
        machine = f"{nodes[process.node].name}, " if len(nodes) > 1 else ""
        yield f"{process.name}: {machine}{where}: {' '.join(process.arguments)}"


def not_checked(lines: Iterable[str]) -> list[str]:
    return [f"{NOT_CHECKED}{line}" for line in lines]


@contextmanager
def scratch_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def _plan_of_learner(
    config: RunConfig,
    what: str,
    architecture: Architecture,
    said: Sequence[str],
    work: Work,
    plan: ProcessPlan,
    missing: Sequence[str],
) -> Plan:
    """Of a stage without generators.

    Args:
        what: is trained.
        said: of the data.
        missing: what a start would lack.
    """
    lines = [
        *where_processes_go(plan.processes, planned_nodes(config)),
        f"{what}: {architecture.num_parameters / 1e6:.2f} M parameters",
        *said,
        *describe_learner(config, architecture, work),
    ]
    return Plan(lines=[*lines, *not_checked(missing)])


def _processes_of_run(config: RunConfig, architecture: Architecture, nodes: Sequence[Node]) -> list[ProcessSpec]:
    run_dir, budget = config.run.path.absolute(), generator_budget(config, architecture)
    return plan_processes(config, run_dir, architecture.context_length, nodes, budget=budget).processes


def _refusal(config: RunConfig, architecture: Architecture) -> str | None:
    try:
        refuse_too_large(config, architecture)
    except ConfigError as error:
        return str(error)
    return None


def _steps_of_unknown(keys: SFTSection | RewardModellingSection, what: str) -> str:
    """How many steps there will be, of data that is not known."""
    if keys.steps is not None:
        return f"{keys.steps} steps"
    size = f"{keys.batch_size} {what}"
    if isinstance(keys, SFTSection):
        size = f"{keys.batch_tokens} tokens" if keys.batch_tokens else f"{keys.sequences_per_step} {what}"
    epochs = keys.epochs or 1
    return f"steps of {size}: as many as {epochs} epoch{'s' * (epochs > 1)} of the data make"


def _said_of_conversations(inputs: SupervisedInputs) -> list[str]:
    train, batches = inputs.train, inputs.batches
    sequences = sum(map(len, batches))
    unclear = f", {train.unclear} of which the chat template makes no row" if train.unclear else ""
    return [
        f"answered conversations: {len(train.rows)} to train on, {len(inputs.held_out)} held out; left out: "
        f"{train.unanswered} without an answer, {train.too_long} too long{unclear}",
        f"{len(batches)} steps of {sequences / len(batches):.4g} sequences: {sequences / len(train.rows):.1f} epochs",
    ]


def _said_of_pairs(inputs: PairInputs) -> list[str]:
    train, batches = inputs.train, inputs.batches
    pairs = sum(map(len, batches))
    return [
        f"preference pairs: {len(train.rows)} to train on, {len(inputs.held_out)} held out; left out of the former: "
        f"{train.too_long} too long",
        f"{len(batches)} steps of {pairs / len(batches):.4g} pairs: {pairs / len(train.rows):.1f} epochs",
    ]
