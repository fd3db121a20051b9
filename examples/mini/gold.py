"""The gold reward: an exact check, which the reward model never sees but through the pairs that it decides."""


def score(completions: list[str], answer: str, fact: str) -> list[float]:
    """1 for the right answer and nothing else, 0.5 for one that has the right fact in it, else 0."""
    return [1.0 if text.strip() == answer else 0.5 * (fact in text) for text in completions]
