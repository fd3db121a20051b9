"""Staleness kept by admission: which groups may start, which are trained next, when weights change hands.

A group is one prompt with its samples; a rollout is the `schedule.groups_per_rollout` groups that the learner makes
`schedule.updates_per_rollout` optimizer steps of. Rollout `r` starts at policy version `r x updates`, and weights change
hands between rollouts only. With `admitted` groups so far, another may start if it belongs to a rollout that is at most
`bound` steps ahead of the weights the generators hold:

    admitted < (pushed_version + bound + updates) / updates x groups

A group is sampled by the version it was admitted at or a later one, so it must be trained in a rollout that starts at
most `bound` steps after that: its deadline. Admission leaves no more groups with a deadline than rollouts up to it have
room for; `next_rollout` never takes a group so that this stops being true. Hence no group is ever too old, whatever the
speeds are, and none is dropped for its age: docs/staleness.md has the proof.

Everything here is arithmetic on a few integers, without clock or event loop.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import islice

from msgspec import Struct

from megatron_async_rlhf.config.sections import ScheduleSection
from megatron_async_rlhf.errors import StaleSampleError


class Ticket(Struct, frozen=True, kw_only=True):
    """A group that was admitted.

    Attributes:
        index: which group of the run; decides prompt and seeds.
        number: how many tickets came before; a group that is sampled anew gets a new number.
        attempt: how often it was sampled before.
        version: policy version the generators held; no token of it is older.
    """

    index: int
    number: int
    attempt: int = 0
    version: int = 0


class Pacer:
    """State of the schedule. Only its methods change it; others read.

    Attributes:
        trained_version: policy version the learner is at.
        pushed_version: policy version the generators hold.
        pushing: from the pause of the engines until they have been told to continue.
        learner_busy: a rollout is being trained on, or saved.
        offering: the version that is being trained from can still be pushed.
        evaluating: pushes wait, so that an evaluation sees one version.
        admitted: groups that were ever started.
        running: groups under way, by index, oldest number first.
        ready: complete groups the learner has not had, by index, in order of arrival.
    """

    def __init__(self, schedule: ScheduleSection, version: int = 0, admitted: int = 0) -> None:
        self._schedule = schedule
        self._bound = schedule.staleness_bound
        self._in_flight = schedule.in_flight_updates != "none"
        self._updates, self._groups = schedule.updates_per_rollout, schedule.groups_per_rollout
        self._numbers = 0
        self._again: deque[tuple[int, int]] = deque()  # index and attempt of groups to start once more
        self.trained_version = self.pushed_version = version
        self.admitted = admitted
        self.running: dict[int, Ticket] = {}
        self.ready: dict[int, Ticket] = {}
        # Both, by number, which is the order of their versions and deadlines too; and how many there are of each version.
        self._outstanding: dict[int, Ticket] = {}
        self._of_version: dict[int, int] = {}
        self.pushing = self.learner_busy = self.offering = self.evaluating = False

    def admissible(self, room: int) -> int:
        """How many groups may start now, if there is room for so many."""
        limit = self._schedule.rollouts * self._groups
        if self._bound is not None:
            limit = min(limit, (self.pushed_version + self._bound + self._updates) // self._updates * self._groups)
        allowed = len(self._again) + limit - self.admitted
        if self._schedule.generation == "batch":
            can_be_pushed = self.offering or not self.learner_busy
            push_is_next = self.trained_version > self.pushed_version and can_be_pushed and not self.evaluating
            closed = self.running or self.pushing or push_is_next
            return self._groups if allowed >= self._groups and room and not closed else 0
        if self._schedule.max_groups is not None:
            allowed = min(allowed, self._schedule.max_groups - len(self.running) - len(self.ready))
        # Without updates in flight the generators have to come to an end for a push.
        closed = self.pushing or (
            self.trained_version > self.pushed_version and not self._in_flight and not self.evaluating
        )
        return 0 if closed else max(0, min(allowed, room))

    def admit(self, count: int) -> list[Ticket]:
        """The next groups, which are running from now on: those to be sampled anew first."""
        tickets = []
        for _ in range(count):
            if self._again:
                index, attempt = self._again.popleft()
            else:
                index, attempt = self.admitted, 0
                self.admitted += 1
            ticket = Ticket(index=index, number=self._numbers, attempt=attempt, version=self.pushed_version)
            self._numbers += 1
            self.running[index] = ticket
            self._begin(ticket)
            tickets.append(ticket)
        return tickets

    def restore(self, ready: Iterable[tuple[int, int]], unfinished: Iterable[int]) -> None:
        """What an earlier run left: complete groups with their versions, in order of arrival, and groups it had started."""
        arrived = list(ready)
        tickets: dict[int, Ticket] = {}
        for version, index in sorted((version, index) for index, version in arrived):  # as they were started
            ticket = tickets[index] = Ticket(index=index, number=self._numbers, version=version)
            self._begin(ticket)
            self._numbers += 1
        self.ready = {index: tickets[index] for index, _ in arrived}
        self._again.extend((index, 0) for index in unfinished)

    @property
    def unfinished(self) -> list[int]:
        """Indices of admitted groups that are not complete."""
        return sorted([*self.running, *(index for index, _ in self._again)])

    def arrived(self, index: int) -> None:
        """A group is complete."""
        self.ready[index] = self.running.pop(index)

    def sample_anew(self, index: int) -> None:
        """A running group was cancelled; it starts once more, with newer weights."""
        ticket = self.running.pop(index)
        self._end(ticket)
        self._again.append((index, ticket.attempt + 1))

    def next_rollout(self) -> list[Ticket] | None:
        """The groups to train now, by index, or None if too few are complete, or one that must be among them is not."""
        if len(self.ready) < self._groups:
            return None
        if self._schedule.order == "fifo":
            first = self._first(self._groups)
            return _by_index(first) if all(ticket.index in self.ready for ticket in first) else None
        candidates = self._candidates()
        chosen: dict[int, Ticket] = {}
        for version, needed in self._needed():
            due = [ticket for ticket in candidates if ticket.version <= version]
            if len(due) < needed:
                return None
            for ticket in due:
                if len(chosen) >= needed:  # all chosen so far are of this version or an earlier one
                    break
                chosen[ticket.index] = ticket
        for ticket in candidates:
            if len(chosen) == self._groups:
                break
            chosen[ticket.index] = ticket
        return _by_index(chosen.values()) if len(chosen) == self._groups else None

    def begin_training(self, rollout: Sequence[Ticket]) -> None:
        """The learner takes these groups."""
        self.learner_busy = True
        for ticket in rollout:
            self._end(self.ready.pop(ticket.index))

    def trained(self) -> None:
        """It has made all optimizer steps of a rollout."""
        self.trained_version += self._updates

    def end_training(self) -> None:
        """It may take the next one."""
        self.learner_busy = False

    def begin_offer(self) -> None:
        """The learner trains, and sends the version it trains from as soon as it is told to."""
        self.offering = True

    def end_offer(self) -> None:
        """It has trained."""
        self.offering = False

    def begin_push(self) -> None:
        """Engines are paused from now on, and nobody else may pause or resume them."""
        self.pushing = True

    def push_arrived(self, version: int) -> None:
        """The generators hold this version; engines are still paused."""
        self.pushed_version = version

    def end_push(self) -> None:
        """Engines have been told to continue, or the push has failed."""
        self.pushing = False

    def begin_evaluation(self) -> None:
        self.evaluating = True

    def end_evaluation(self) -> None:
        self.evaluating = False

    def stragglers(self) -> set[int]:
        """Running groups without which the learner cannot continue, although enough others are complete."""
        if self.learner_busy or len(self.ready) < self._groups or self.next_rollout() is not None:
            return set()
        return {ticket.index for ticket in self._awaited() if ticket.index in self.running}

    def may_push(self, *, waiting: bool = False, abandoned: bool = False) -> bool:
        """Newer weights exist, and the generators can take them.

        Where groups must not meet two versions, they can when nothing is running, or when all that runs has been
        `abandoned`: no generator is at it any more. Then one that is `waiting` for any weights gets them at once;
        otherwise it waits for the next version, because a push stops all others for as long as it takes.
        """
        if self.pushing or not (self.trained_version > self.pushed_version or (waiting and abandoned)):
            return False
        return abandoned or not (self.evaluating or (self.running and not self._in_flight))

    def staleness(self, versions: Counter[int], update: int = 0) -> Counter[int]:
        """Staleness of tokens if they are trained on now, in the `update`-th step of their rollout, in optimizer steps.

        Args:
            versions: how many tokens each version sampled.

        Raises:
            StaleSampleError: a token breaks the bound, or is from the future.
        """
        now = self.trained_version + update
        ages = Counter({now - version: tokens for version, tokens in versions.items()})
        largest = float("inf") if self._bound is None else self._bound + update
        if ages and not 0 <= min(ages) <= max(ages) <= largest:
            raise StaleSampleError(
                f"training version {now} on tokens of versions {now - max(ages)} to {now - min(ages)} breaks "
                f"max_staleness = {self._bound}; this is a bug in pacing"
            )
        return ages

    def _begin(self, ticket: Ticket) -> None:
        self._outstanding[ticket.number] = ticket
        self._of_version[ticket.version] = self._of_version.get(ticket.version, 0) + 1

    def _end(self, ticket: Ticket) -> None:
        del self._outstanding[ticket.number]
        self._of_version[ticket.version] -= 1
        if not self._of_version[ticket.version]:
            del self._of_version[ticket.version]

    def _first(self, count: int) -> list[Ticket]:
        """The oldest of those outstanding."""
        return list(islice(self._outstanding.values(), count))

    @property
    def _window(self) -> int:
        """How many of the oldest may be trained now."""
        sizes = {"fifo": self._groups, "windowed": self._schedule.window or 2 * self._groups}
        return sizes.get(self._schedule.order, len(self._outstanding))

    def _candidates(self) -> list[Ticket]:
        """Complete groups, those preferred by `schedule.order` first."""
        if self._schedule.order == "freshest":
            return sorted(self.ready.values(), key=lambda ticket: (-ticket.version, ticket.number))
        near = {ticket.index for ticket in self._first(self._window)}
        return [ticket for ticket in self.ready.values() if ticket.index in near]

    def _needed(self) -> list[tuple[int, int]]:
        """(version, how many groups of it or an earlier one must be trained now), where any must, earliest first."""
        if self._bound is None:
            return []
        needed, seen = [], 0
        for version, count in self._of_version.items():
            seen += count
            deadline = version + self._bound  # the last version at which a rollout with these groups may start
            later = (deadline - self.trained_version) // self._updates  # rollouts after this one, up to the deadline
            if seen > later * self._groups:
                needed.append((version, seen - later * self._groups))
        return needed

    def _awaited(self) -> list[Ticket]:
        """Groups the next rollout is made of, or must be chosen from, and enough of them are not complete."""
        near = self._first(self._window)
        for version, needed in self._needed() if self._schedule.order != "fifo" else []:
            due = [ticket for ticket in near if ticket.version <= version]
            if sum(ticket.index in self.ready for ticket in due) < needed:
                return due
        return near


def _by_index(tickets: Iterable[Ticket]) -> list[Ticket]:
    return sorted(tickets, key=lambda ticket: ticket.index)
