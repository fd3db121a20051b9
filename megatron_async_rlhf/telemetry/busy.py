"""When servers were at work, as spans, although each works on many requests at once."""

from collections.abc import Callable
from types import TracebackType

from megatron_async_rlhf.types import Span

OnSpan = Callable[[Span], None]


class BusyTime:
    """Busy while anything is inside `with busy:`, and not frozen."""

    def __init__(self, name: str, process: str, clock: Callable[[], float], on_span: OnSpan) -> None:
        self._name, self._process, self._clock, self._on_span = name, process, clock, on_span
        self._inside = 0
        self._frozen = False
        self._since: float | None = None
        self._done: dict[str, int | float] = {}

    def __enter__(self) -> "BusyTime":
        self._inside += 1
        self._update()
        return self

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

    def done(self, **amounts: int | float) -> None:
        """What has just been finished: arguments of the span under way, or of the next one."""
        for name, amount in amounts.items():
            self._done[name] = self._done.get(name, 0) + amount

    def _update(self) -> None:
        busy = self._inside > 0 and not self._frozen
        if busy and self._since is None:
            self._since = self._clock()
        elif not busy and self._since is not None:
            end, args = self._clock(), self._done
            self._on_span(Span(name=self._name, start=self._since, end=end, process=self._process, args=args))
            self._since, self._done = None, {}


class ServersBusy:
    """When anything was being done: by any server, for the totals, and by each of them, for its own lane.

    Attributes:
        any: of all servers together.
    """

    def __init__(self, clock: Callable[[], float], *, what: str = "generate", on_any: OnSpan, on_one: OnSpan) -> None:
        """
        Args:
            what: they do, the name of every span.
        """
        self._clock, self._what, self._on_one = clock, what, on_one
        self.any = BusyTime(what, "", clock, on_any)
        self._one: dict[str, BusyTime] = {}
        self._frozen = False

    def at(self, server: str) -> BusyTime:
        """Of one server."""
        if server not in self._one:
            self._one[server] = BusyTime(self._what, server, self._clock, self._on_one)
            if self._frozen:
                self._one[server].freeze()
        return self._one[server]

    def freeze(self) -> None:
        """All of them are paused."""
        self._frozen = True
        for busy in (self.any, *self._one.values()):
            busy.freeze()

    def thaw(self) -> None:
        self._frozen = False
        for busy in (self.any, *self._one.values()):
            busy.thaw()
