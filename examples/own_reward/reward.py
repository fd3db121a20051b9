"""A reward of one's own: a function, called with a prompt and all its completions, in processes of its own.

It is given by name what it has parameters for: `prompt`, `completions`, the columns that `data.reference_fields` lists
(here `letter` and `times`), and `reward.kwargs` (here `too_long`).
"""


def score(completions: list[str], letter: str, times: int, too_long: float = 0.0) -> list[float]:
    """The share of characters that are right, less a penalty for each one too many; one number for each completion."""
    scores = []
    for text in completions:
        right = sum(character == letter for character in text[:times]) / times
        scores.append(right - too_long * max(0, len(text) - times))
    return scores
