"""What a comparison comes to, in sentences: whether asynchronous training pays, and where the time goes."""

from megatron_async_rlhf.compare.comparison import WORTHWHILE, Against, Comparison, ScheduleFigures
from megatron_async_rlhf.compare.estimates import Estimate

_NAMES = {
    "same_split": "synchronous training on the same split",
    "alternating": "synchronous training in which both sides take turns on all devices",
}
_ANSWERS = {
    True: "Asynchronous training pays",
    False: "Asynchronous training does not pay",
    None: "Whether asynchronous training pays is not decided",
}


def verdict_of(comparison: Comparison) -> str:
    """A sentence for the answer and each baseline, and a reason for each."""
    sentences = [_ANSWERS[comparison.pays] + "."]
    for name, against in comparison.against.items():
        sentences.append(_outcome(name, against))
        sentences.append(_reason(name, comparison.schedules["async"], comparison.schedules[name]))
    if any(against.pays is None for against in comparison.against.values()):
        sentences.append("More seeds would narrow the intervals.")
    return " ".join(sentences)


def _outcome(name: str, against: Against) -> str:
    speedup = against.speedup
    pace = (
        f"{number(speedup, 2)}x the speed of {_NAMES[name]} ({number(against.time_saved, 0, 100)} % of the time saved)"
    )
    if against.is_faster is False:
        if speedup.is_above(WORTHWHILE) is None:
            pace += f", and can have {number(against.speedup_limit, 2)}x at most"
        pace += f", below the {WORTHWHILE:g}x from which older samples are worth it"
    return f"It has {pace}{_quality(against)}."


def _quality(against: Against) -> str:
    reward = against.held_out_reward
    if reward is None:
        return "; nothing was held out"
    if reward.low is None:
        return f"; held-out reward {reward.mean:+.3f}, of one seed"
    words = {True: "higher", False: "lower", None: "no different"}[reward.is_above(0)]
    return f"; held-out reward is {words} ({reward.mean:+.3f}, {reward.low:+.3f} to {reward.high:+.3f})"


def _reason(name: str, ours: ScheduleFigures, theirs: ScheduleFigures) -> str:
    """Where the time of a step goes, and what could be gained at most."""
    step, generate, train = theirs.step_seconds.mean, theirs.generate_seconds.mean, theirs.train_seconds.mean
    longer, longer_name = max((generate, "generation"), (train, "training"))
    shorter, shorter_name = min((generate, "generation"), (train, "training"))
    sides = {"generation": ours.generate_seconds.mean, "training": ours.train_seconds.mean}
    alone = sides[longer_name] / longer if longer else 1.0
    gain = (
        f"hiding {shorter_name} behind {longer_name} could make it {(longer + shorter) / longer:.2f} times as fast."
        if name == "same_split"
        else "each of them has all devices, so that overlap gains what one alone cannot use of them."
    )
    text = (
        f"A synchronous step takes {step:.3g} s, generation {generate:.3g} s of it and training {train:.3g} s: {gain}"
    )
    slower = max(sides, key=lambda side: sides[side])
    text += (
        f" An asynchronous step takes {ours.step_seconds.mean:.3g} s, of which {slower}, the slower side, works "
        f"{ours.overlap.mean:.0%}"
    )
    if slower == longer_name:
        text += f" and takes {alone:.2f} times as long as in a synchronous one"
        if name == "alternating":
            text += ", where it has all devices"
    return text + "."


def number(estimate: Estimate, decimals: int, scale: float = 1.0) -> str:
    """`1.78 (1.70 to 1.86)`; without an interval the mean alone."""
    mean = f"{scale * estimate.mean:.{decimals}f}"
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} ({scale * estimate.low:.{decimals}f} to {scale * estimate.high:.{decimals}f})"
