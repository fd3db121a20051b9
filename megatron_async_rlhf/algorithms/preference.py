"""Which of K samples a preference pair is made of. Plain Python: the controller decides, the learner trains."""

from collections.abc import Sequence


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int] | None:
    """Indices of the highest and the lowest reward, or None on a tie: no preference, nothing to learn.

    Among equals the first wins. The paper's code trains on an arbitrary pair, or a zero gradient, when all rewards
    are equal; skipping is our choice, counted as `pairs_skipped`.
    """
    best = max(range(len(rewards)), key=lambda i: rewards[i])
    worst = min(range(len(rewards)), key=lambda i: rewards[i])
    return None if rewards[best] == rewards[worst] else (best, worst)
