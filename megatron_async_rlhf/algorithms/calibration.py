"""How well a reward model tells better completions from worse ones, on pairs it has not seen. Plain Python.

The model of Bradley and Terry gives a comparison the probability `sigmoid(r_chosen - r_rejected)`. Of a pair it prefers the
completion with the higher reward, with the confidence `sigmoid(|r_chosen - r_rejected|)`, from 0.5 to 1.
"""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev, quantiles

BINS = 10  # of the confidence, each 0.05 wide
Z_95 = 1.959964  # standard errors of a 95 % interval
_PERCENTILES = (5, 25, 50, 75, 95)


def pair_figures(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, float]:
    """Accuracy with its interval, loss, calibration and the distribution of the rewards, of at least one pair.

    A pair with equal rewards counts as wrong. `calibration_error` is the expected one (Guo et al. 2017, arXiv 1706.04599,
    eq. 3): the mean over pairs of the gap between accuracy and mean confidence in their bin.
    """
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    right = sum(margin > 0 for margin in margins)
    low, high = wilson_interval(right, len(margins))
    return {
        "pairs": float(len(margins)),
        "accuracy": right / len(margins),
        "accuracy_low": low,
        "accuracy_high": high,
        "loss": fmean(_softplus(-margin) for margin in margins),
        **_of(margins, "margin"),
        **_of([*chosen, *rejected], "reward"),
        "chosen_reward_mean": fmean(chosen),
        "rejected_reward_mean": fmean(rejected),
        **calibration(margins),
    }


def wilson_interval(successes: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """Of a share, after Wilson (1927): unlike the normal one it stays inside [0, 1] and does not vanish at the ends."""
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration(margins: Sequence[float]) -> dict[str, float]:
    """`calibration_error`, and of each bin that has pairs their number, mean confidence and accuracy."""
    bins: dict[int, list[float]] = {}
    for margin in margins:
        place = int((_sigmoid(abs(margin)) - 0.5) * 2 * BINS)
        bins.setdefault(min(place, BINS - 1), []).append(margin)
    error = 0.0
    figures: dict[str, float] = {}
    for place, inside in sorted(bins.items()):
        confidence = fmean(_sigmoid(abs(margin)) for margin in inside)
        accuracy = sum(margin > 0 for margin in inside) / len(inside)
        error += len(inside) / len(margins) * abs(accuracy - confidence)
        name = f"calibration/{0.5 + place / 2 / BINS:.2f}"
        figures |= {f"{name}/pairs": float(len(inside)), f"{name}/confidence": confidence, f"{name}/accuracy": accuracy}
    return {"calibration_error": error, **figures}


def _of(values: Sequence[float], name: str) -> dict[str, float]:
    points = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    spread = {f"{name}_p{share:02d}": points[share - 1] for share in _PERCENTILES}
    return {f"{name}_mean": fmean(values), f"{name}_std": pstdev(values), **spread}


def _sigmoid(value: float) -> float:
    return math.exp(-_softplus(-value))


def _softplus(value: float) -> float:
    """log(1 + e^value), of any size."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
