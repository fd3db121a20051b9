"""The reference policy: the policy as it was when RL began, frozen.

resident: a second model on the device
swapped:  weights in host memory that take the policy's place for a pass; the policy's wait in host memory meanwhile
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel


class Reference(Protocol):
    """Lends its model for forward passes. Collective: every rank asks for it at the same time."""

    def model(self) -> AbstractContextManager[list[GPTModel]]: ...


class ResidentReference:
    """A model of its own."""

    def __init__(self, chunks: list[GPTModel], policy: list[GPTModel]) -> None:
        self._chunks = chunks
        with torch.no_grad():
            for chunk, source in zip(chunks, policy, strict=True):
                # Parameters alone: the rest of a state dict is what FP8 learned about the policy's activations.
                for parameter, value in zip(chunk.parameters(), source.parameters(), strict=True):
                    parameter.copy_(value)
                chunk.eval().requires_grad_(False)

    @contextmanager
    def model(self) -> Iterator[list[GPTModel]]:
        yield self._chunks


class SwappedReference:
    """Host copies, page-locked beside a GPU, that are exchanged with the policy's weights.

    Nobody else may read the policy while `model` is open; a push under way must have ended or have its own snapshot.
    """

    def __init__(self, policy: list[GPTModel]) -> None:
        self._policy = policy
        self._parameters = [parameter for chunk in policy for parameter in chunk.parameters()]
        pinned = self._parameters[0].is_cuda
        self._reference = [_on_host(parameter, pinned) for parameter in self._parameters]
        self._waiting = [_on_host(parameter, pinned) for parameter in self._parameters]

    @contextmanager
    @torch.no_grad()
    def model(self) -> Iterator[list[GPTModel]]:
        _copy(self._waiting, self._parameters)
        _copy(self._parameters, self._reference)
        try:
            yield self._policy
        finally:
            _copy(self._parameters, self._waiting)


def _on_host(parameter: torch.Tensor, pinned: bool) -> torch.Tensor:
    copy = torch.empty_like(parameter, device="cpu", pin_memory=pinned, requires_grad=False)
    return copy.copy_(parameter)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)  # page-locked: ordered on the stream, like the passes around it
