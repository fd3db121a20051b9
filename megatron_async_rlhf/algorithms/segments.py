"""Sums and means by sequence over a micro-batch's row of tokens.

A micro-batch is one row that holds its sequences one after another. What stands outside completion tokens (prompts,
padding) may be anything, also NaN: it reaches neither values nor gradients.
Shape legend: T tokens of the row, S sequences in it.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Where each sequence's completion tokens lie.

    Attributes:
        mask_T: True on completion tokens, bool [T].
        segments_T: which sequence each position belongs to; `count` for padding. A sequence's positions are
            neighbours, in order, [T].
        count: S.
    """

    mask_T: torch.Tensor
    segments_T: torch.Tensor
    count: int

    def keep(self, values_T: torch.Tensor) -> torch.Tensor:
        """The values on completion tokens, 0 elsewhere; differentiable."""
        return values_T.where(self.mask_T, 0)

    def sum(self, values_T: torch.Tensor) -> torch.Tensor:
        """Sum over each sequence's completion tokens, 0 for an empty completion, [S]; differentiable."""
        sums = values_T.new_zeros(self.count + 1)  # the last one collects the padding
        return sums.index_add(0, self.segments_T, self.keep(values_T))[:-1]

    def mean(self, values_T: torch.Tensor) -> torch.Tensor:
        """Mean over each sequence's completion tokens, 0 for an empty completion, [S]; differentiable."""
        return self.sum(values_T) / self.lengths(values_T).clamp(min=1)

    def lengths(self, like: torch.Tensor) -> torch.Tensor:
        """Completion tokens of each sequence in the data type of `like`, [S]."""
        return self.sum(torch.ones_like(like))

    def spread(self, values_S: torch.Tensor) -> torch.Tensor:
        """Each sequence's value on its completion tokens, 0 elsewhere, [T]; differentiable."""
        return self.keep(torch.cat([values_S, values_S.new_zeros(1)])[self.segments_T])

    def place_last(self, values_S: torch.Tensor) -> torch.Tensor:
        """Each sequence's value on its last completion token, 0 elsewhere, [T]. An empty completion has none."""
        return self.spread(values_S).where(self.last_T(), 0)

    def last_T(self) -> torch.Tensor:
        """True on each sequence's last completion token, bool [T]."""
        positions_N = self.mask_T.nonzero().squeeze(1)
        owners_N = self.segments_T[positions_N]
        followed_N = torch.zeros_like(owners_N, dtype=torch.bool)
        followed_N[:-1] = owners_N[1:] == owners_N[:-1]
        last_T = self.mask_T.clone()
        last_T[positions_N[followed_N]] = False
        return last_T
