"""What Megatron's schedule is given."""

from types import SimpleNamespace

import pytest
import torch

from megatron_async_rlhf.learner.megatron.training import steps
from megatron_async_rlhf.learner.megatron.training.steps import Passes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_forward_passes_are_in_evaluation_mode(monkeypatch, training: bool, fails: bool):
    """Or FP8 scales would be kept for a backward pass that never comes."""
    chunk, modes = torch.nn.Sequential(torch.nn.Linear(1, 1)).train(training), []

    def schedule(*, model, **arguments):
        modes.append((model[0].training, model[0][0].training, torch.is_grad_enabled(), arguments["forward_only"]))
        if fails:
            raise RuntimeError("out of memory")
        return []

    monkeypatch.setattr(steps, "get_forward_backward_func", lambda: schedule)
    batch = SimpleNamespace(tokens_T=torch.zeros(3))
    try:
        Passes(placement=None, read=None).forward_pass([chunk], [batch])
    except RuntimeError:
        assert fails
    assert modes == [(False, False, False, True)]
    assert chunk.training == chunk[0].training == training
