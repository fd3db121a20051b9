"""The value model of PPO: the policy's architecture with one output, the value of the state before each token.

A Megatron model of its own, divided over the ranks as the policy is. Its last stage has a head of one row in place of
the output matrix, whole on every tensor-parallel rank. It starts from the policy, or from `algorithm.value_hf`.

A head that is not given starts at zero: the first values are 0 everywhere, so the first advantages are plain rewards to
come rather than noise, the same in every layout, and the body follows as soon as the head has made its first step.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.formats.stored import read_blocks
from megatron_async_rlhf.formats.value_source import HF_HEAD, open_value_source, value_body
from megatron_async_rlhf.learner.megatron.model import build_model
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.transfer.weights import load_parameters, named_parameters
from megatron_async_rlhf.models.architecture import Architecture

_HEAD = "output_layer.weight"


class ValueHead(torch.nn.Module):
    """Stands where `GPTModel` has its output layer: hidden states, [T, B, H], to values, [T, B, 1], in float32.

    With sequence parallelism a rank computes the values of its share of the tokens; the mark on the row has Megatron
    sum its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.sequence_parallel = config.sequence_parallel

    def forward(
        self, input_: torch.Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        values = F.linear(input_.float(), self.weight.float())
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


def build_value_model(arch: Architecture, placement: Placement, learner: LearnerSection) -> list[GPTModel]:
    """This rank's chunks, one per virtual stage, on its device; the head is zero, the rest is yet to be filled."""
    chunks = build_model(value_body(arch), placement, learner)
    if placement.is_last_stage:
        chunks[-1].output_layer = ValueHead(chunks[-1].config).to(placement.device)
    return chunks


@torch.no_grad()
def copy_policy(policy: list[GPTModel], value_model: list[GPTModel]) -> None:
    """Fill all but the head with the policy's weights, which must be whole."""
    source = named_parameters(policy)
    for name, parameter in _body(value_model).items():
        parameter.copy_(source[name])


@torch.no_grad()
def read_value_model(value_model: list[GPTModel], arch: Architecture, placement: Placement, source: Path) -> None:
    """Fill with the weights of a Hugging Face directory; without `score.weight` in it the head stays zero.

    Raises:
        CheckpointError: weights that are missing or do not fit.
    """
    reader = open_value_source(source, arch)
    load_parameters(_body(value_model), value_body(arch), placement, reader)
    if placement.is_last_stage and HF_HEAD in reader.tensors:
        head = value_model[-1].output_layer.weight
        for block in read_blocks(reader, HF_HEAD, (0, 1), (0, arch.hidden_size), head.dtype):
            head.copy_(block)


def _body(value_model: list[GPTModel]) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in named_parameters(value_model).items() if not name.endswith(_HEAD)}
