"""What a dry run of an evaluation says: its models, prompts, memory and servers."""

from functools import partial
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.report import describe_servers
from megatron_async_rlhf.jobs.described import has_tokenizer, missing_inputs
from megatron_async_rlhf.jobs.evaluated_models import (
    KEYS,
    POLICY,
    check_compared_rewards,
    config_for,
    served_context,
    sources_of,
)
from megatron_async_rlhf.jobs.inputs import check_vocabulary, make_model_template, read_tokenizer
from megatron_async_rlhf.jobs.reward_models import load_reward_models
from megatron_async_rlhf.launch.dry_run import (
    Coming,
    Plan,
    checked_with_data,
    not_checked,
    scratch_directory,
    where_processes_go,
)
from megatron_async_rlhf.launch.evaluation import check_evaluation, goes_on_with_answers
from megatron_async_rlhf.launch.nodes import planned_nodes
from megatron_async_rlhf.launch.plan import plan_evaluation
from megatron_async_rlhf.models.architecture import Architecture, policy_architecture
from megatron_async_rlhf.rewards.registry import make_reward


def plan_of_evaluation(config: RunConfig, resume: bool, coming: Coming = None) -> Plan:
    """
    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    goes_on = goes_on_with_answers(config, resume)
    policies = {KEYS[name]: source for name, source in sources_of(config).items()}
    missing = missing_inputs(config, policies=policies, coming=coming)
    with scratch_directory() as scratch:
        check = partial(check_evaluation, config, scratch, goes_on=goes_on, or_described=True)
        inputs, missing = checked_with_data(check, missing, coming)
        if inputs is None:
            models, said = _described_models(config, scratch), "prompts: not checked"
        else:
            models = {name: (model.architecture, model.context_length) for name, model in inputs.models.items()}
            said = f"prompts: {len(inputs.prompts)} held out"
    shapes = {name: architecture for name, (architecture, _) in models.items()}
    contexts = {name: context for name, (_, context) in models.items()}
    nodes = planned_nodes(config)
    plan = plan_evaluation(config, config.run.path.absolute(), contexts, nodes)
    processes = [*(spec for specs in plan.on_request.values() for spec in specs), *plan.processes]
    lines = [
        *where_processes_go(processes, nodes),
        said,
        *(f"{name}: {shape.num_parameters / 1e6:.2f} M parameters" for name, shape in shapes.items()),
        *describe_servers(config, shapes, contexts),
        *not_checked(missing.lines),
    ]
    return Plan(lines=lines)


def _described_models(config: RunConfig, scratch: Path) -> dict[str, tuple[Architecture, int]]:
    """Shape and context of each model, and all that can be checked without prompts."""
    check_compared_rewards(config)
    models: dict[str, tuple[Architecture, int]] = {}
    for name in sources_of(config):
        own, template = config_for(config, name), scratch / name
        make_model_template(own, template, or_described=True)
        architecture = policy_architecture(own.model, template)
        if has_tokenizer(template):
            check_vocabulary(own, read_tokenizer(own, template), architecture)
        of_policy = models[POLICY][1] if POLICY in models else None
        models[name] = architecture, served_context(config, name, architecture, of_policy)
    load_reward_models(config, make_reward(config.rewards), scratch / POLICY, or_described=True)
    return models
