"""How far a policy is from a reference: from the log-probabilities that both give to the tokens of the policy's own answers.

Both are those of the models as they are, at temperature 1. If the answers were sampled at temperature 1, the mean of k1 or
of k3 over them is an unbiased estimate of KL(policy || reference); at another temperature it is a mean over other answers,
and may even be negative (k1).

References: Schulman, Approximating KL Divergence (2020), for the names k1 and k3. Noukhovitch et al., Asynchronous RLHF
(2024), arXiv:2410.18252, reports perplexity under the SFT policy as "KL"; its code divides by the tokens of prompt and
response together.
"""

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

_LARGEST_EXPONENT = 700.0  # of nats per token: above it a perplexity would be no number any more


class Divergence(Struct, frozen=True, kw_only=True):
    """Of one answer, in nats.

    Attributes:
        k1: sum over its tokens of log policy - log reference.
        k3: sum over its tokens of r - 1 - log r, r = reference / policy: never negative, and less scattered.
        reference_nll: minus the log-probability of the whole answer under the reference.
        tokens: of the answer.
        prompt_tokens: before it.
    """

    k1: float
    k3: float
    reference_nll: float
    tokens: int
    prompt_tokens: int

    @property
    def perplexity_per_response_token(self) -> float:
        """exp of the reference's negative log-likelihood over the tokens of the answer; 1 for an empty one."""
        return _perplexity(self.reference_nll, self.tokens)

    @property
    def perplexity_over_prompt_and_response(self) -> float:
        """The same sum, over the answer alone, divided by the tokens of prompt and answer: the paper's figure."""
        return _perplexity(self.reference_nll, self.prompt_tokens + self.tokens)


def _perplexity(nll: float, tokens: int) -> float:
    return math.exp(min(nll / tokens, _LARGEST_EXPONENT)) if tokens else 1.0


def divergence(policy: Sequence[float], reference: Sequence[float], prompt_tokens: int) -> Divergence:
    """From log-probabilities of each token of one answer, [tokens] each.

    Raises:
        ValueError: the two are not of the same tokens.
    """
    if len(policy) != len(reference):
        raise ValueError(f"{len(policy)} log-probabilities of the policy, {len(reference)} of the reference")
    ours, theirs = np.asarray(policy, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    gap = theirs - ours
    return Divergence(
        k1=float(-gap.sum()),
        k3=float((np.expm1(gap) - gap).sum()),
        reference_nll=float(-theirs.sum()),
        tokens=len(ours),
        prompt_tokens=prompt_tokens,
    )
