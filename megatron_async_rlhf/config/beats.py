"""How often those who wait for each other hear that all is well, and the timeouts that have to be longer."""

from typing import Annotated

from pydantic import AfterValidator, PositiveFloat

IDLE_BEAT_S = 5.0  # learner rank 0, by the ranks that wait inside a collective for its next command
NODE_BEAT_S = 1.0  # machines of a run, by each other


def _at_least(least: float, why: str) -> AfterValidator:
    def check(value: float) -> float:
        if value < least:
            raise ValueError(f"must be at least {least:g}: {why}")
        return value

    return AfterValidator(check)


LearnerTimeout = Annotated[
    PositiveFloat, _at_least(2 * IDLE_BEAT_S, f"ranks without work hear from rank 0 every {IDLE_BEAT_S:g} s")
]
NodeTimeout = Annotated[
    PositiveFloat, _at_least(3 * NODE_BEAT_S, f"machines hear from each other every {NODE_BEAT_S:g} s")
]
