"""When one side of the loop was at work, as spans, although it works on many things at once."""

from collections.abc import Callable
from types import TracebackType

from megatron_async_rlhf.types import Span


class BusyTime:
    """Busy while anything is inside `with busy:`, and not frozen."""

    def __init__(self, name: str, process: str, clock: Callable[[], float], on_span: Callable[[Span], None]) -> None:
        self._name, self._process, self._clock, self._on_span = name, process, clock, on_span
        self._inside = 0
        self._frozen = False
        self._since: float | None = None

    def __enter__(self) -> None:
        self._inside += 1
        self._update()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._inside -= 1
        self._update()

    def freeze(self) -> None:
        """What is inside waits."""
        self._frozen = True
        self._update()

    def thaw(self) -> None:
        self._frozen = False
        self._update()

    def _update(self) -> None:
        busy = self._inside > 0 and not self._frozen
        if busy and self._since is None:
            self._since = self._clock()
        elif not busy and self._since is not None:
            self._on_span(Span(name=self._name, start=self._since, end=self._clock(), process=self._process))
            self._since = None
