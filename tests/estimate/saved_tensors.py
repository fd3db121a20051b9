"""Prints how many bytes autograd keeps from the forward pass of a model, for the cases of a JSON list in `sys.argv[1]`.

A case has an `arch`, a `recompute` and a `precision`. What counts is each storage once, parameters left out: those of
the layers, of all else on the last stage, and what is kept if nothing is to be trained further down than the first layer.
"""

import dataclasses
import json
import os
import sys
from itertools import accumulate

import torch

from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.learner.megatron.layers.packed_row import PackedRow
from megatron_async_rlhf.learner.megatron.model import build_model
from megatron_async_rlhf.learner.megatron.parallel import Placement, join_learner
from megatron_async_rlhf.models.architecture import Architecture

LENGTHS = [300, 300, 400]
TOKENS = sum(LENGTHS)


def packed() -> PackedRow:
    return PackedRow.of([0, *accumulate(LENGTHS)], places_T=torch.cat([torch.arange(length) for length in LENGTHS]))


def saved_bytes(case: dict, layers: int, placement: Placement) -> int:
    arch = dataclasses.replace(Architecture(**case["arch"]), layers=layers)
    (model,) = build_model(arch, placement, LearnerSection(recompute=case["recompute"], precision=case["precision"]))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=tokens, position_ids=None, attention_mask=None, packed_seq_params=packed())
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    placement = join_learner(LearnerSection(timeout_s=30), "cpu")
    figures = []
    for case in json.loads(sys.argv[1]):
        one, three = (saved_bytes(case, layers, placement) for layers in (1, 3))
        figures.append({"layer": (three - one) / 2 / TOKENS, "rest": (one - (three - one) / 2) / TOKENS})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
