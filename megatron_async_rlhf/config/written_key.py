"""A name in one of the files that a run writes, as whoever writes it declares it."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

from megatron_async_rlhf.config.section import Section

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


class ReportingSection(Section):
    """A section of which metrics come.

    Attributes:
        own_metrics: that this class adds to those of its bases.
    """

    own_metrics: ClassVar[tuple[Key, ...]] = ()

    @classmethod
    def possible_metrics(cls) -> list[Key]:
        """Under some setting of the keys."""
        return [metric for base in reversed(cls.__mro__) for metric in vars(base).get("own_metrics", ())]

    @property
    def metrics(self) -> list[str]:
        """The names of those that there are under these keys."""
        return [metric.name for metric in self.possible_metrics() if metric.given(self)]
