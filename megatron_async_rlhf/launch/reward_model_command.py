"""`async-rlhf reward-model`: from the command line to what is started; `launch.start` does that."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.installed import check_installed
from megatron_async_rlhf.options import DryRunOption, NodeRankOption, SetOption, note

if TYPE_CHECKING:
    from megatron_async_rlhf.launch.fleet import Fleet
    from megatron_async_rlhf.launch.start import Start


def reward_model(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    set: SetOption = [],
    dry_run: DryRunOption = False,
    node_rank: NodeRankOption = 0,
) -> None:
    """Train a reward model on the preference pairs in `data`, as the section `reward_model` says, and export it.

    Transformers loads <run>/checkpoints/final for sequence classification, vLLM with --runner pooling.

    Example: async-rlhf reward-model reward.yaml -s model.hf=runs/sft/checkpoints/final
    """
    from megatron_async_rlhf.launch.dry_run import echo_plan, plan_of_reward_model
    from megatron_async_rlhf.launch.resume import load_for_run
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart, check_writable
    from megatron_async_rlhf.launch.start import prepare_machine, run

    resolved = load_for_run(config, set, resume=False, weights=not dry_run)
    check_reward_model_section(resolved)
    if dry_run:
        check_writable(resolved)
        check_inputs_apart(resolved)
        return echo_plan(resolved, plan_of_reward_model(resolved))
    check_installed("torch", "megatron")
    prepare_machine(resolved, node_rank)
    raise typer.Exit(run(resolved, lambda fleet, scratch: _decide(resolved, fleet, scratch)))


def check_reward_model_section(config: RunConfig) -> None:
    """
    Raises:
        ConfigError: there is none.
    """
    if config.reward_model is None:
        raise ConfigError(
            "reward_model: the configuration has no section of that name; add `reward_model: {epochs: 1}`"
        )


def _decide(config: RunConfig, fleet: "Fleet", scratch: Path) -> "Start":
    from megatron_async_rlhf.jobs.pair_inputs import check_pair_inputs, make_reward_model_template
    from megatron_async_rlhf.launch.plan import plan_reward_model
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart
    from megatron_async_rlhf.launch.start import Start

    check_inputs_apart(config)
    template = scratch / "model"
    make_reward_model_template(config, template)
    note(check_pair_inputs(config, template).data.notes)
    return Start(plan=plan_reward_model(config, fleet.nodes), template=template)
