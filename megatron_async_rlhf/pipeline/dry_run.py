"""Says what a pipeline would do, stage by stage, and starts nothing: each stage's own plan, by a dry run of its command."""

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.warnings import config_warnings
from megatron_async_rlhf.errors import AsyncRLHFError, ConfigError
from megatron_async_rlhf.launch.command import check_sft_section, plan_of_training
from megatron_async_rlhf.launch.dry_run import Plan, plan_of_reward_model, plan_of_sft, scratch_directory
from megatron_async_rlhf.launch.evaluation import evaluation_warnings
from megatron_async_rlhf.launch.planned_evaluation import plan_of_evaluation
from megatron_async_rlhf.launch.recipe import RESUMABLE, Recipe, Stage
from megatron_async_rlhf.launch.reward_model_command import check_reward_model_section
from megatron_async_rlhf.launch.run_directory import check_inputs_apart, check_writable
from megatron_async_rlhf.options import warn
from megatron_async_rlhf.pipeline.described_stages import DescribedStages
from megatron_async_rlhf.pipeline.models_here import with_models_here
from megatron_async_rlhf.pipeline.records import Records
from megatron_async_rlhf.telemetry.files import RESOLVED_CONFIG


def plan_pipeline(recipe: Recipe, show: Callable[[str], None]) -> None:
    """Show the plan of each stage, as a YAML document of its own: its configuration, all else as comments.

    Args:
        show: takes a line.

    Raises:
        ConfigError: a stage will not do; one line, which names it.
    """
    records = Records(recipe)
    with scratch_directory() as scratch:
        described = DescribedStages(recipe, scratch)
        for number, stage in enumerate(recipe.stages, start=1):
            show("---")
            head = f"# [{number}/{len(recipe.stages)}] {stage.name}"
            goes_on = False
            if described.are_made(stage.needs) and (stage.config.run.path / RESOLVED_CONFIG).is_file():
                made = with_models_here(stage, weights=False)
                if records.is_done(made):
                    show(f"{head}: is done")
                    continue
                goes_on = records.was_cut_off(made) and stage.command in RESUMABLE
            show(f"{head}: async-rlhf {stage.command}{' --resume' if goes_on else ''}")
            for line in _plan(stage, described, goes_on):
                show(line)


def _plan(stage: Stage, described: DescribedStages, goes_on: bool) -> Iterator[str]:
    """The lines of one stage; adds it to what is described."""
    try:
        config = described.config_of(stage)
        if not goes_on:
            check_inputs_apart(stage.config)
        check_writable(stage.config)
        plan = _plan_of(stage, config, goes_on, described.coming)
        described.add(stage, config)
    except AsyncRLHFError as error:
        problems = described.with_names(str(error)).splitlines()
        raise ConfigError("\n".join(f"{stage.name}: {line}" for line in problems)) from None
    yield from dump_config(stage.config).splitlines()
    if plan is None:
        return
    for line in plan.lines:
        yield f"# {described.with_names(line)}"
    if plan.refusal is not None:
        raise ConfigError(f"{stage.name}: {plan.refusal}")


def _plan_of(stage: Stage, config: RunConfig, goes_on: bool, coming: dict[Path, str]) -> Plan | None:
    """What the stage's command says of the configuration."""
    if stage.command == "sft":
        check_sft_section(config)
        return plan_of_sft(config, coming)
    if stage.command == "reward-model":
        check_reward_model_section(config)
        return plan_of_reward_model(config, coming)
    if stage.command == "train":
        warn(f"{stage.name}: {line}" for line in config_warnings(config))
        return plan_of_training(config, goes_on, coming)
    plan = plan_of_evaluation(config, goes_on, coming)
    warn(f"{stage.name}: {line}" for line in evaluation_warnings(config))
    return plan
