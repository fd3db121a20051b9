"""A loss that a user brings, `algorithm.loss_function`, with what it returns looked at before it is trained on."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch

from megatron_async_rlhf.algorithms.reductions import Metrics, Reduced, Reduction
from megatron_async_rlhf.algorithms.segments import Segments
from megatron_async_rlhf.config.algorithms import LOSS_ARGUMENTS
from megatron_async_rlhf.errors import LearnerError, UserFunctionError
from megatron_async_rlhf.user_functions import find_function, raised

# Others say these of every step.
_TAKEN = {
    "loss", "tokens", "positions", "padding", "grad_norm", "learning_rate", "correction/weight", "correction/weight_squared",
}  # fmt: skip


def user_loss(function: str, kwargs: Mapping[str, Any]) -> Callable[..., tuple[torch.Tensor, Metrics]]:
    """The function as a loss with the parameters of `algorithms.ppo.clipped_policy_loss`.

    Raises:
        LearnerError: from the loss: it raised, or returned something else than a scalar with a gradient and metrics.
    """

    def loss(
        logprobs_T: torch.Tensor,
        base_T: torch.Tensor,
        advantages_T: torch.Tensor,
        token_weights_T: torch.Tensor,
        segments: Segments,
        weight_T: torch.Tensor | None = None,
        *,
        num_tokens: int,
    ) -> tuple[torch.Tensor, Metrics]:
        values = (logprobs_T, base_T, advantages_T, token_weights_T, segments, weight_T, num_tokens)
        try:
            answer = find_function(function)(**dict(zip(LOSS_ARGUMENTS, values, strict=True)), **kwargs)
        except UserFunctionError as error:
            raise LearnerError(f"algorithm.loss_function = {function} {error}") from None
        except Exception as error:
            raise LearnerError(f"algorithm.loss_function = {function} {raised(error)}") from None
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise LearnerError(f"algorithm.loss_function = {function} returned no pair of a loss and its metrics")
        total, metrics = answer
        if wrong := _wrong_metrics(metrics):
            raise LearnerError(f"algorithm.loss_function = {function} returned {wrong}")
        if not (isinstance(total, torch.Tensor) and total.dim() == 0 and total.requires_grad):
            raise LearnerError(
                f"algorithm.loss_function = {function} returned a loss that is no scalar with a gradient"
            )
        return total, {"policy_loss": total.detach()} | metrics

    return loss


def _wrong_metrics(metrics: object) -> str | None:
    """What is wrong with them, if anything is."""
    if not isinstance(metrics, Mapping):
        return f"{type(metrics).__name__} in place of a dictionary of metrics"
    for name, part in metrics.items():
        value, how = (part.value, part.how) if isinstance(part, Reduced) else (part, "sum")
        if not isinstance(name, str) or name in _TAKEN:
            return f"a metric called {name!r}, which is no name for one of its own; call it own/..."
        if not (isinstance(value, torch.Tensor) and value.dim() == 0):
            return f"a metric {name} that is no scalar tensor"
        if how not in get_args(Reduction):
            return f"a metric {name} that is to be reduced by {how!r}; there are {', '.join(get_args(Reduction))}"
    return None
