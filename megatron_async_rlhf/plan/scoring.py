"""How many servers of a reward model a plan needs, so that no step waits for scores; and how long one waits if they are fewer."""

import math

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.machines import machine_of
from megatron_async_rlhf.estimate.reward_memory import classifier_size
from megatron_async_rlhf.estimate.speed import Lengths
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.classifier import read_classifier
from megatron_async_rlhf.plan.layouts import with_keys
from megatron_async_rlhf.serving.reward_model_command import max_concurrent

_BUSY = 0.7  # of a step, at most: completions end unevenly
_MOST = 0.5  # of all devices


def with_reward_servers(config: RunConfig, lengths: Lengths, step_s: float, devices: int) -> RunConfig:
    """With as many replicas of each served reward model as score a step's completions within a step of so many seconds.

    Raises:
        ConfigError, CheckpointError: there is no such model.
    """
    changed = config
    for key, section in config.served_reward_models.items():
        most = max(1, math.floor(_MOST * devices / section.tensor_parallel / len(config.served_reward_models)))
        needed = math.ceil(scoring_s(config, key, lengths) / (_BUSY * step_s))
        changed = _with_replicas(changed, key, min(most, max(1, needed)))
    return changed


def scoring_s(config: RunConfig, key: str, lengths: Lengths) -> float:
    """Seconds in which one replica scores all completions of an optimizer step: a pass over each with its prompt."""
    section, schedule = config.served_reward_models[key], config.schedule
    completions = config.completions_per_rollout / schedule.updates_per_rollout
    name = f"{key}.model"
    numbers = classifier_size(name, section.model, read_classifier(name, section.model))
    machine = machine_of(with_keys(config, "generator", {"dtype": section.dtype}))  # at whose precision it computes
    passes = completions / max_concurrent(section, config)
    computing = 2.0 * numbers * completions * sum(lengths) / (machine.prefill * section.tensor_parallel)
    reading = passes * numbers * ITEM_BYTES[section.dtype] / (machine.bandwidth * section.tensor_parallel)
    in_model = max(computing, reading) if machine.computes_while_reading else computing + reading
    return in_model + passes * machine.step_s + completions * machine.completion_s


def longest_scoring_s(config: RunConfig, lengths: Lengths) -> float:
    """Of all served reward models, which score at the same time: seconds of an optimizer step."""
    scoring = (scoring_s(config, key, lengths) / each.replicas for key, each in config.served_reward_models.items())
    return max(scoring, default=0.0)


def _with_replicas(config: RunConfig, key: str, replicas: int) -> RunConfig:
    changed = config.reward_models[key].model_copy(update={"replicas": replicas})
    if not isinstance(config.reward, list):
        return config.model_copy(update={"reward": changed})
    place = int(key.removeprefix("reward."))
    return config.model_copy(update={"reward": [*config.reward[:place], changed, *config.reward[place + 1 :]]})
