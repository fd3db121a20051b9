"""Losses as a user brings them: `algorithm.loss_function`."""

import torch

from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss
from megatron_async_rlhf.algorithms.reductions import Reduced


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
        "own/highest": Reduced(ours_T.max(), "max"),
        "own/lowest": Reduced(ours_T.min(), "min"),
    }


def raises(**given):
    raise IndexError("no such thing")


def no_pair(logprobs_T, **given):
    return logprobs_T.sum()


def no_gradient(logprobs_T, **given):
    return logprobs_T.detach().sum(), {}


def no_scalar(logprobs_T, **given):
    return logprobs_T.sum(), {"own": logprobs_T}
