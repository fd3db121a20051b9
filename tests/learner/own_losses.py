"""Losses as a user brings them: `algorithm.loss_function`."""

import os

import torch

from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss
from megatron_async_rlhf.algorithms.reductions import Reduced

_micro_batches: list[torch.Tensor] = []


def clipped(logprobs_T, base_T, advantages_T, token_weights_T, segments, weight_T, num_tokens, clip=0.0):
    """PPO's, with metrics of its own that are reduced in every way."""
    total, _ = clipped_policy_loss(
        logprobs_T, base_T, advantages_T, token_weights_T, segments, weight_T,
        clip_low=clip, clip_high=clip, num_tokens=num_tokens,
    )  # fmt: skip
    ours_T = logprobs_T.detach().where(segments.mask_T, -1.0)
    return total, {
        "own/tokens": segments.mask_T.sum(),
        "own/mean": Reduced(torch.tensor(2.0), "mean"),
        "own/real": Reduced(segments.mask_T.any().float(), "mean"),
        "own/highest": Reduced(ours_T.max(), "max"),
        "own/lowest": Reduced(ours_T.min(), "min"),
    }


def raises(**given):
    raise IndexError("no such thing")


def raises_on_the_last_rank(logprobs_T, **given):
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        raise IndexError("no such thing")
    return logprobs_T.sum(), {}


def other_metrics(logprobs_T, **given):
    """In a rank's first micro-batch than in the others."""
    _micro_batches.append(logprobs_T)
    return logprobs_T.sum(), {} if len(_micro_batches) > 1 else {"own": torch.tensor(1.0)}


def no_pair(logprobs_T, **given):
    return logprobs_T.sum()


def no_gradient(logprobs_T, **given):
    return logprobs_T.detach().sum(), {}


def no_scalar(logprobs_T, **given):
    return logprobs_T.sum(), {"own": logprobs_T}


def no_metrics(logprobs_T, **given):
    return logprobs_T.sum(), None


def no_such_reduction(logprobs_T, **given):
    return logprobs_T.sum(), {"own": Reduced(torch.tensor(1.0), "avg")}


def no_name(logprobs_T, **given):
    return logprobs_T.sum(), {7: torch.tensor(1.0)}


def a_name_of_others(logprobs_T, **given):
    return logprobs_T.sum(), {"tokens": torch.tensor(1.0)}
