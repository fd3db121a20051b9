"""Random sequences in two forms: a packed row as the learner has it, and one padded line each as references want it.

Everything that is no completion token holds garbage (NaN and infinities) unless a test asks for something else.
Shape legend: T positions of the row, S sequences, L tokens of the longest completion.
"""

from dataclasses import dataclass, field

import torch

from megatron_async_rlhf.algorithms.reductions import Metrics, Reduced, joined, reductions
from megatron_async_rlhf.algorithms.segments import Segments

LENGTHS = [5, 1, 0, 3, 7, 1, 4, 2]  # ragged; an empty and two single-token completions
GARBAGE = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30], dtype=torch.float64)


@dataclass
class PackedRow:
    """The row of `lengths` completions laid in `order`, each after a prompt and before some padding.

    Attributes:
        positions: of each sequence's completion tokens in the row, by sequence.
    """

    lengths: list[int]
    order: list[int] | None = None
    positions: list[list[int]] = field(init=False)
    segments: Segments = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.lengths)
        self.positions = [[] for _ in self.lengths]
        owners, mask = [], []
        for s in self.order or range(count):
            prompt, padding = 1 + s % 3, s % 2
            owners += [s] * (prompt + self.lengths[s]) + [count] * padding
            self.positions[s] = list(range(len(mask) + prompt, len(mask) + prompt + self.lengths[s]))
            mask += [False] * prompt + [True] * self.lengths[s] + [False] * padding
        owners += [count] * 3
        mask += [False] * 3
        self.segments = Segments(mask_T=torch.tensor(mask), segments_T=torch.tensor(owners), count=count)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def mask_SL(self) -> torch.Tensor:
        return torch.tensor([[t < n for t in range(max(self.lengths))] for n in self.lengths])

    def lay(self, values_SL: torch.Tensor, fill: torch.Tensor = GARBAGE) -> torch.Tensor:
        """Into the row, differentiably."""
        row_T = fill.repeat(len(self.segments.mask_T))[: len(self.segments.mask_T)]
        where = torch.tensor([p for own in self.positions for p in own], dtype=torch.long)
        return row_T.index_put((where,), values_SL[self.mask_SL])

    def tokens(self, values_T: torch.Tensor) -> list[list[float]]:
        """Each completion's values in the row."""
        return [values_T[own].tolist() for own in self.positions]


def random_values(lengths: list[int], seed: int, low: float = -3.0, high: float = 0.0) -> torch.Tensor:
    """Uniform float64 [S, L]; by default what log-probabilities look like."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def policies(lengths: list[int], seed: int = 0, spread: float = 0.5) -> list[torch.Tensor]:
    """Log-probabilities of policy (with gradient), proximal, sampler and reference, [S, L] each, `spread` apart."""
    policy_SL = random_values(lengths, seed)
    others = [policy_SL + random_values(lengths, seed + i, -spread, spread) for i in (1, 2, 3)]
    return [policy_SL.requires_grad_(), *(other.detach() for other in others)]


def assert_same_loss(ours: torch.Tensor, theirs: torch.Tensor, wrt: torch.Tensor) -> None:
    """Values and gradients by `wrt` to 1e-9, which must be float64; and the gradient is not trivially nothing."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    (our_gradient,) = torch.autograd.grad(ours, wrt, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs, wrt, retain_graph=True)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-9, atol=1e-12)
    assert their_gradient.abs().max() > 1e-6


def joined_metrics(reports: list[Metrics]) -> dict[str, torch.Tensor]:
    """Of several micro-batches what the learner makes of them, or of one what it is."""
    return {name: joined(reports, [name], how)[0] for name, how in reductions(reports[0]).items()}


def assert_same_metrics(ours: list[Metrics], theirs: Metrics, **tolerances: float) -> None:
    """Those of several micro-batches together as those of one; constants all."""
    for name, value in joined_metrics([theirs]).items():
        torch.testing.assert_close(joined_metrics(ours)[name], value, **tolerances)
    for value in theirs.values():
        assert not (value.value if isinstance(value, Reduced) else value).requires_grad
