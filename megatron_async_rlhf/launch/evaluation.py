"""`async-rlhf eval`: from the command line to the servers and the job that asks them."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.resume import FIXED_OF_EVALUATION, check_same_run
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.formats.hub_snapshot import local_model
from megatron_async_rlhf.generator.places import places_problem, threads_problem
from megatron_async_rlhf.installed import check_installed
from megatron_async_rlhf.options import DryRunOption, NodeRankOption, SetOption, warn
from megatron_async_rlhf.telemetry.files import ANSWERS_DIR, EVALUATION, RESOLVED_CONFIG, SERVED_DIR
from megatron_async_rlhf.telemetry.summary import is_completed

if TYPE_CHECKING:
    from megatron_async_rlhf.jobs.evaluated_models import EvaluationInputs
    from megatron_async_rlhf.launch.fleet import Fleet
    from megatron_async_rlhf.launch.start import Start

_SUFFIX = "-eval"  # of the directory, behind the name of the run


def evaluate(
    config: Annotated[Path, typer.Argument(help="YAML configuration, or a run's directory: its policy is asked.")],
    set: SetOption = [],
    dry_run: DryRunOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the answers that are in run.dir already, and ask for the others.")
    ] = False,
    node_rank: NodeRankOption = 0,
) -> None:
    """Ask a policy the held-out prompts, score its answers, and compare them with others.

    The policy is model.hf: a Hugging Face directory, a run or a checkpoint; for CONFIG a run's directory does, too. What
    is measured is the `eval` section's affair. Results: run.dir, default runs/NAME-eval.

    Example: async-rlhf eval runs/quickstart -s eval.against=references -s eval.kl_to=runs/sft
    """
    from megatron_async_rlhf.launch.dry_run import echo_plan
    from megatron_async_rlhf.launch.evaluation_table import print_table
    from megatron_async_rlhf.launch.planned_evaluation import plan_of_evaluation
    from megatron_async_rlhf.launch.run_directory import check_writable
    from megatron_async_rlhf.launch.start import prepare_machine, run

    resolved = load_for_evaluation(config, set, resume, weights=not dry_run)
    if dry_run:
        check_writable(resolved)
        plan = plan_of_evaluation(resolved, resume)
        warn(evaluation_warnings(resolved))
        return echo_plan(resolved, plan)
    check_installed("torch", "vllm")
    prepare_machine(resolved, node_rank, places_problem(resolved), threads_problem(resolved))
    if code := run(resolved, lambda fleet, scratch: _decide(resolved, resume, fleet, scratch)):
        raise typer.Exit(code)
    print_table(resolved.run.path / EVALUATION)


def load_for_evaluation(config: Path, overrides: Sequence[str], resume: bool, *, weights: bool = True) -> RunConfig:
    """The configuration with the policies that its paths stand for, and a directory of its own.

    Args:
        weights: as for `load_for_run`.

    Raises:
        ConfigError, CheckpointError: one line for each problem.
    """
    from megatron_async_rlhf.launch.resume import load_for_run

    if (config / RESOLVED_CONFIG).is_file() and not (config / ANSWERS_DIR).is_dir():  # a run, and not an evaluation
        own = {"model": f"{{hf: {_quoted(config)}}}", "run.dir": _quoted(config.with_name(config.name + _SUFFIX))}
        resolved = load_config(config, [*(f"{key}={value}" for key, value in own.items()), *overrides])
    else:
        resolved = load_for_run(config, overrides, resume, weights=weights)
    run_section = resolved.run
    if run_section.dir is None:
        run_section = run_section.model_copy(update={"dir": run_section.path.with_name(run_section.name + _SUFFIX)})
    return with_policies(resolved.model_copy(update={"run": run_section}), weights=weights)


def with_policies(config: RunConfig, *, weights: bool) -> RunConfig:
    """The configuration with directories of weights in place of runs and of names at the hub.

    Raises:
        ConfigError, CheckpointError: one line.
    """
    from megatron_async_rlhf.jobs.evaluated_models import KEYS, section_of, sources_of

    sources = {name: _policy_in(path, KEYS[name], weights) for name, path in sources_of(config).items()}
    changed: dict[str, Path] = {name: sources[name] for name in ("against", "kl_to") if name in sources}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"hf": sources["policy"]}),
            "eval": section_of(config).model_copy(update=changed),
        }
    )


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _policy_in(path: Path, key: str, weights: bool) -> Path:
    """The directory with the weights of what `key` names, which may be a model at the hub."""
    if not (path / RESOLVED_CONFIG).is_file():
        return local_model(path, key, weights=weights)
    from megatron_async_rlhf.converter.sources import resolve  # brings torch

    return resolve(path)


def evaluation_warnings(config: RunConfig) -> list[str]:
    from megatron_async_rlhf.jobs.evaluated_models import section_of

    section = section_of(config)
    if section.kl_to is None or section.temperature == 1:
        return []
    return [
        f"eval.temperature = {section.temperature:g}: kl_k1 and kl_k3 are means over answers that are sampled so, and "
        "no estimates of the KL divergence, which take eval.temperature = 1"
    ]


def check_evaluation(
    config: RunConfig, scratch: Path, *, goes_on: bool = False, or_described: bool = False
) -> "EvaluationInputs":
    """All that is read, from the tokenizers to the weights; makes a template of each model in `scratch`.

    Args:
        goes_on: with the answers that are there: the day that chat templates print is theirs.
        or_described: models may be without weights.

    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    from megatron_async_rlhf.data.tokenizer import keep_date
    from megatron_async_rlhf.jobs.evaluated_models import config_for, load_evaluation, sources_of
    from megatron_async_rlhf.jobs.inputs import check_policy_weights, check_rewards, make_model_template
    from megatron_async_rlhf.jobs.reward_models import check_reward_models

    templates = {name: scratch / name for name in sources_of(config)}
    for name, template in templates.items():
        make_model_template(config_for(config, name), template, or_described=or_described)
        if goes_on:
            keep_date(config.run.path / SERVED_DIR / name, template)
    inputs = load_evaluation(config, templates)
    for name, model in inputs.models.items():
        check_policy_weights(config_for(config, name), model.architecture, or_described=or_described)
    check_rewards(config, inputs.prompts)
    check_reward_models(config, inputs.reward, inputs.train, or_described=or_described)
    return inputs


def _decide(config: RunConfig, resume: bool, fleet: "Fleet", scratch: Path) -> "Start | None":
    from megatron_async_rlhf.jobs.evaluated_models import POLICY, sources_of
    from megatron_async_rlhf.launch.evaluation_inputs import check_same_evaluation, digest_evaluation
    from megatron_async_rlhf.launch.input_digests import write_input_digests
    from megatron_async_rlhf.launch.plan import plan_evaluation
    from megatron_async_rlhf.launch.start import Start

    goes_on = goes_on_with_answers(config, resume)
    if goes_on and is_completed(config.run.path):
        typer.echo(f"{config.run.path} is completed")
        return None
    inputs = check_evaluation(config, scratch, goes_on=goes_on)
    warn(evaluation_warnings(config))
    digests = digest_evaluation(config, inputs)
    if goes_on:
        check_same_evaluation(config, digests)
    contexts = {name: model.context_length for name, model in inputs.models.items()}
    run_dir = config.run.path.absolute()

    def prepare(directory: Path) -> None:
        for name, source in sources_of(config).items():
            make_servable(source, scratch / name, directory / SERVED_DIR / name)
        write_input_digests(directory, digests)

    return Start(
        plan=plan_evaluation(config, run_dir, contexts, fleet.nodes),
        template=scratch / POLICY,
        keeps=goes_on,
        prepare=prepare,
    )


def goes_on_with_answers(config: RunConfig, resume: bool) -> bool:
    """Whether there is an evaluation to continue with, and it was to be; else nothing that is read may be in its place."""
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart

    run_dir = config.run.path
    if resume and (run_dir / ANSWERS_DIR).is_dir():
        check_same_run(load_config(run_dir / RESOLVED_CONFIG), config, fixed=FIXED_OF_EVALUATION)
        return True
    if resume:
        typer.echo(f"{run_dir} holds no answers yet: starting from the beginning")
    check_inputs_apart(config)
    return False


def make_servable(source: Path, template: Path, directory: Path) -> None:
    """A Hugging Face directory that vLLM loads: the template's config and tokenizer, and the weights of `source`.

    Those of a checkpoint are exported; others stay where they are.

    Raises:
        CheckpointError: it cannot be read or written.
    """
    from megatron_async_rlhf.errors import CheckpointError
    from megatron_async_rlhf.formats.directory import is_checkpoint
    from megatron_async_rlhf.formats.safetensors_files import INDEX, SINGLE, find_files

    shutil.rmtree(directory, ignore_errors=True)
    if is_checkpoint(source):
        from megatron_async_rlhf.converter.convert import export_hf  # brings torch

        export_hf(source, directory, dtype=None)
    try:
        shutil.copytree(
            template, directory, dirs_exist_ok=True, ignore=_config_of(template) if directory.exists() else None
        )
        if not is_checkpoint(source):
            files = [*find_files(source), *([source / INDEX] if not (source / SINGLE).is_file() else [])]
            for file in files:
                os.symlink(file.absolute(), directory / file.name)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({error.strerror or error})") from None


def _config_of(template: Path):
    """What an export has of its own: the config that says which dtype its weights have."""
    return lambda place, names: ["config.json"] if Path(place) == template else []
