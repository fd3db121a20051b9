"""The objective that a configuration asks for."""

import importlib

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.learner.megatron.objectives.objective import Objective


def choose_objective(config: RunConfig) -> Objective:
    """Of `algorithm.type`, whose section says where it is."""
    section = config.algorithm
    module, _, name = section.objective.partition(":")
    kind = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return kind(section, longest_completion=config.generator.max_new_tokens)
