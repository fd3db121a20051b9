"""`async-rlhf reward-model`: from the command line to what is started; `launch.start` does that."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.installed import check_installed
from megatron_async_rlhf.options import ConfigArgument, DryRunOption, NodeRankOption, SetOption, note

if TYPE_CHECKING:
    from megatron_async_rlhf.jobs.pair_inputs import PairInputs
    from megatron_async_rlhf.launch.fleet import Fleet
    from megatron_async_rlhf.launch.nodes import Node
    from megatron_async_rlhf.launch.plan import ProcessPlan
    from megatron_async_rlhf.launch.start import Start


def reward_model(
    config: ConfigArgument,
    set: SetOption = [],
    dry_run: DryRunOption = False,
    node_rank: NodeRankOption = 0,
) -> None:
    """Train a reward model on the preference pairs in `data`, as the section `reward_model` says, and export it.

    Transformers loads <run>/checkpoints/final for sequence classification, vLLM with --runner pooling.

    Example: async-rlhf reward-model reward.yaml -s model.hf=runs/sft/checkpoints/final
    """
    from megatron_async_rlhf.launch.resume import load_for_run
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart, check_writable
    from megatron_async_rlhf.launch.start import prepare_machine, run

    resolved = load_for_run(config, set, resume=False, weights=not dry_run)
    if resolved.reward_model is None:
        raise ConfigError(
            "reward_model: the configuration has no section of that name; add `reward_model: {epochs: 1}`"
        )
    if dry_run:
        check_writable(resolved)
        check_inputs_apart(resolved)
        return _print_plan(resolved)
    check_installed("torch", "megatron")
    prepare_machine(resolved, node_rank)
    raise typer.Exit(run(resolved, lambda fleet, scratch: _decide(resolved, fleet, scratch)))


def _decide(config: RunConfig, fleet: "Fleet", scratch: Path) -> "Start":
    from megatron_async_rlhf.jobs.pair_inputs import check_pair_inputs, make_reward_model_template
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart
    from megatron_async_rlhf.launch.start import Start

    check_inputs_apart(config)
    template = scratch / "model"
    make_reward_model_template(config, template)
    note(check_pair_inputs(config, template).data.notes)
    return Start(plan=_plan(config, fleet.nodes), template=template)


def _plan(config: RunConfig, nodes: "list[Node]") -> "ProcessPlan":
    from megatron_async_rlhf.launch.plan import plan_learner_alone

    run_dir = config.run.path.absolute()
    return plan_learner_alone(config, run_dir, nodes, "reward_model", learner_arguments=["--reward-model"])


def _print_plan(config: RunConfig) -> None:
    """What it learns from, and its processes. Of a model that is not here, what its shape says."""
    from megatron_async_rlhf.estimate.learner_memory import Work
    from megatron_async_rlhf.jobs.inputs import missing_inputs
    from megatron_async_rlhf.jobs.pair_inputs import check_pair_inputs, describe_pairs, make_reward_model_template
    from megatron_async_rlhf.launch.dry_run import print_learner_plan
    from megatron_async_rlhf.launch.nodes import planned_nodes

    if missing := missing_inputs(config):
        architecture, pairs = describe_pairs(config), config.reward_modelling.batch_size
        said = ["preference pairs: not checked"]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            make_reward_model_template(config, Path(scratch))
            inputs = check_pair_inputs(config, Path(scratch))
        architecture, pairs = inputs.architecture, max(map(len, inputs.batches))
        said = [*_said_of(inputs), *inputs.data.notes]
    plan, work = _plan(config, planned_nodes(config)), Work(sequences=2 * pairs)
    print_learner_plan(config, "reward model", architecture, said, work, plan, missing)


def _said_of(inputs: "PairInputs") -> list[str]:
    train, batches = inputs.train, inputs.batches
    pairs = sum(map(len, batches))
    return [
        f"preference pairs: {len(train.rows)} to train on, {len(inputs.held_out)} held out; left out of the former: "
        f"{train.too_long} too long",
        f"{len(batches)} steps of {pairs / len(batches):.4g} pairs: {pairs / len(train.rows):.1f} epochs",
    ]
