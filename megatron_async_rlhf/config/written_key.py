"""A name in one of the files that a run writes, as whoever writes it declares it."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Source = Literal["controller", "learner", "reward"]


class Key(NamedTuple):
    """For metrics.jsonl also by whom, and when.

    Attributes:
        unit: `share` is between 0 and 1, `-` where there is none.
        source: who reports it.
        given: whether it is there under the keys of the section that declares it.
    """

    name: str
    unit: str
    meaning: str
    source: Source = "controller"
    given: Callable[[Any], bool] = lambda keys: True
