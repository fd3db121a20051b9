"""Continuous batching without tokens: how far every sequence is follows from how many there were, and when.

All running sequences advance together, one token per step, and a step takes longer the more of them there are. So one
number, `_steps`, tells the progress of all: a sequence that joined at step `a` and has `n` tokens left is done at step
`a + n`. Only the next of these moments needs a timer.
"""

import asyncio
import heapq
from bisect import bisect_right
from collections.abc import Callable
from itertools import count
from math import ceil

from megatron_async_rlhf.simulate.scenario import Speeds

_ROUNDING = 1e-6  # of a step


class EngineSequence:
    """A completion being sampled.

    Attributes:
        joined: step of its first token; None while it waits for a place.
        left: tokens it had to go when it joined.
        prompt: tokens that are taken in before its first.
    """

    __slots__ = ("joined", "left", "number", "on_end", "prompt")

    def __init__(self, left: int, prompt: int, on_end: Callable[["EngineSequence"], None]) -> None:
        self.left, self.prompt, self.on_end = left, prompt, on_end
        self.joined: float | None = None
        self.number = -1


class Engine:
    """Of one generator, from its start to its end.

    Attributes:
        running: sequences that have a place.
        busy_s: time something was decoded; `frozen_s`: time something could have been, but for a pause.
        sequence_seconds: sum over sequences of the time each was decoded.
    """

    def __init__(self, speeds: Speeds, *, places: int, slowness: float = 1.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._speeds, self._places, self._slowness = speeds, places, slowness
        self._steps, self._since = 0.0, self._loop.time()
        self._free_at = 0.0  # caches are being made again until then
        self._ends: list[tuple[float, int, EngineSequence]] = []
        self._waiting: list[tuple[int, int, EngineSequence]] = []
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None
        self._weights_since: list[float] = []  # steps at which versions came, with `_versions`
        self._versions: list[int] = []
        self.paused = False
        self.running: set[EngineSequence] = set()
        self.busy_s = self.frozen_s = self.sequence_seconds = 0.0

    @property
    def queued(self) -> int:
        """Sequences that wait for a place."""
        return sum(sequence.number >= 0 for _, _, sequence in self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.queued

    def add(self, sequence: EngineSequence, order: int) -> None:
        """Lower orders get a place first."""
        sequence.number = next(self._numbers)
        heapq.heappush(self._waiting, (order, sequence.number, sequence))
        if not self.paused and len(self.running) < self._places:
            self._advance()
            self._fill()
            self._arm()

    def remove(self, sequence: EngineSequence) -> None:
        """Before its end."""
        self._advance()
        self.running.discard(sequence)
        sequence.number = -1  # its entries in the heaps are void
        if not self.paused:
            self._fill()
            self._arm()

    def pause(self) -> None:
        self._advance()
        self.paused = True
        self._disarm()

    def resume(self) -> None:
        self._advance()
        self.paused = False
        self._fill()
        self._arm()

    def stop(self) -> None:
        """For good; nothing ends any more."""
        self.pause()
        self.running.clear()
        self._waiting.clear()

    def set_weights(self, version: int) -> None:
        """Tokens from now on are of this version."""
        self._advance()
        self._weights_since.append(self._steps)
        self._versions.append(version)

    def recompute(self, tokens: int) -> None:
        """So many tokens of cache are made again before anything continues."""
        self._free_at = self._loop.time() + self._prefill_s(tokens)

    def done(self, sequence: EngineSequence) -> int:
        """Tokens sampled so far."""
        if sequence.joined is None:
            return 0
        self._advance()
        return min(sequence.left, max(0, int(self._steps - sequence.joined + _ROUNDING)))

    def versions(self, sequence: EngineSequence, tokens: int) -> list[int]:
        """Which weights sampled its first `tokens` tokens."""
        if not tokens:
            return []
        assert sequence.joined is not None  # it has tokens
        begun, end = sequence.joined, sequence.joined + tokens
        first = bisect_right(self._weights_since, begun + _ROUNDING) - 1
        versions: list[int] = []
        for place in range(first, len(self._versions)):
            since = self._weights_since[place + 1] if place + 1 < len(self._versions) else end
            until = min(tokens, int(since - begun + _ROUNDING))  # tokens that were whole when the next version came
            if until > len(versions):
                versions += [self._versions[place]] * (until - len(versions))
            if until == tokens:
                break
        return versions

    def _step_s(self) -> float:
        return (self._speeds.token_s + len(self.running) * self._speeds.sequence_s) * self._slowness

    def _prefill_s(self, tokens: int) -> float:
        return tokens * self._speeds.prompt_token_s * self._slowness

    def _advance(self) -> None:
        """Bring `_steps` up to now."""
        now = self._loop.time()
        start, self._since = self._since, now
        if self.paused:
            self.frozen_s += now - start if self.running else 0.0
            return
        elapsed = now - max(start, min(self._free_at, now))
        if self.running and elapsed > 0:
            self._steps += elapsed / self._step_s()
            self.busy_s += elapsed
            self.sequence_seconds += elapsed * len(self.running)

    def _fill(self) -> None:
        """Give places to those that wait."""
        while self._waiting and len(self.running) < self._places:
            _, number, sequence = heapq.heappop(self._waiting)
            if sequence.number != number:
                continue
            self.running.add(sequence)
            sequence.joined = self._steps + max(1, ceil(self._prefill_s(sequence.prompt) / self._step_s()))
            heapq.heappush(self._ends, (sequence.joined + sequence.left, number, sequence))

    def _arm(self) -> None:
        """Set the timer for the next end."""
        while self._ends and self._ends[0][2] not in self.running:
            heapq.heappop(self._ends)
        if not self._ends:
            return self._disarm()
        wait = max(0.0, self._ends[0][0] - self._steps) * self._step_s()
        at = max(self._loop.time(), self._free_at) + wait
        if self._timer is not None:
            if self._timer.when() <= at:
                return  # too early does no harm: it looks again
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._tick)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        self._advance()
        ended = []
        while self._ends and self._ends[0][0] <= self._steps + _ROUNDING:
            sequence = heapq.heappop(self._ends)[2]
            if sequence in self.running:
                self.running.discard(sequence)
                ended.append(sequence)
        for sequence in ended:
            sequence.on_end(sequence)
        self._fill()
        self._arm()
