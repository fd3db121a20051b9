"""The value model of PPO: the policy's architecture with one output, the value of the state before each token.

A Megatron model of its own, divided over the ranks as the policy is, with a score head in place of the output matrix. It
starts from the policy, or from `algorithm.value_hf`.

A head that is not given starts at zero: the first values are 0 everywhere, so the first advantages are plain rewards to
come rather than noise, and the body follows as soon as the head has made its first step.
"""

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.formats.score_head import WithScoreHead
from megatron_async_rlhf.formats.value_source import open_value_source
from megatron_async_rlhf.learner.megatron.model import build_model
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.transfer.weights import load_weights, named_parameters
from megatron_async_rlhf.models.architecture import Architecture

_HEAD = "output_layer.weight"


def build_value_model(arch: Architecture, placement: Placement, learner: LearnerSection) -> list[GPTModel]:
    """This rank's chunks, one per virtual stage, on its device; the head is zero, the rest is yet to be filled."""
    return build_model(arch.with_score_head(), placement, learner)


@torch.no_grad()
def copy_policy(policy: list[GPTModel], value_model: list[GPTModel]) -> None:
    """Fill all but the head with the policy's weights, which must be whole."""
    source = named_parameters(policy)
    for name, parameter in named_parameters(value_model).items():
        if not name.endswith(_HEAD):
            parameter.copy_(source[name])


def read_value_model(value_model: list[GPTModel], arch: Architecture, placement: Placement, source: Path) -> None:
    """Fill with the weights of a Hugging Face directory; without a head in it that stays zero.

    Raises:
        CheckpointError: weights that are missing or do not fit.
    """
    reader = WithScoreHead(open_value_source(source, arch), torch.zeros(1, arch.hidden_size))
    load_weights(value_model, arch.with_score_head(), placement, reader)
