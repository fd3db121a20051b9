"""The pacer's choices, each derived by hand; a rollout is two groups and one step unless a test says otherwise."""

import pytest

from megatron_async_rlhf.config.sections import ScheduleSection
from megatron_async_rlhf.scheduler.pacing import Pacer

PLENTY = 1000


def make(**keys) -> Pacer:
    keys = {"generation": "streaming", "prompts_per_step": 2, "steps": 64, **keys}
    return Pacer(ScheduleSection(**keys))


def admit(pacer: Pacer, count: int | None = None) -> list[int]:
    """Indices of the groups that start; all that may if no `count` is given."""
    allowed = pacer.admissible(PLENTY)
    assert count is None or count <= allowed
    return [ticket.index for ticket in pacer.admit(allowed if count is None else count)]


def arrive(pacer: Pacer, *indices: int) -> None:
    for index in indices:
        pacer.arrived(index)


def train(pacer: Pacer, push: bool = True) -> list[int]:
    """The groups of the next rollout, which is then trained and, unless told otherwise, pushed."""
    tickets = pacer.next_rollout()
    pacer.begin_training(tickets)
    pacer.trained()
    pacer.end_training()
    if push:
        pacer.push_arrived(pacer.trained_version)
    return [ticket.index for ticket in tickets]


def waits(pacer: Pacer) -> bool:
    return pacer.next_rollout() is None


@pytest.mark.parametrize(("bound", "groups"), [(0, 2), (1, 4), (3, 8)])
def test_so_many_groups_start_before_the_first_step(bound, groups):
    assert admit(make(max_staleness=bound)) == list(range(groups))


@pytest.mark.parametrize(
    ("mini_batches", "epochs", "bound", "groups"), [(2, 1, 0, 4), (2, 1, 2, 8), (1, 3, 3, 4), (2, 2, 8, 12)]
)
def test_a_rollout_of_several_updates_is_admitted_as_one(mini_batches, epochs, bound, groups):
    """(bound + updates) / updates rollouts of mini_batches x 2 groups."""
    pacer = make(mini_batches=mini_batches, epochs=epochs, max_staleness=bound, steps=24)
    assert admit(pacer) == list(range(groups))
    assert pacer.admissible(PLENTY) == 0


def test_a_push_makes_room_for_one_rollout_and_training_alone_for_none():
    pacer = make(max_staleness=1, in_flight_updates="keep")
    arrive(pacer, *admit(pacer))
    assert train(pacer, push=False) == [0, 1]
    assert pacer.admissible(PLENTY) == 0
    pacer.push_arrived(1)
    assert admit(pacer) == [4, 5]


def test_room_and_the_end_of_the_run_limit_admission_too():
    pacer = make(max_staleness=3, steps=3)
    assert pacer.admissible(1) == 1
    assert admit(pacer) == [0, 1, 2, 3, 4, 5]


def test_a_batch_starts_whole_and_alone():
    pacer = make(generation="batch", max_staleness=3)
    assert admit(pacer) == [0, 1]
    assert pacer.admissible(PLENTY) == 0
    arrive(pacer, 0, 1)
    assert pacer.admissible(1) == 2, "a batch needs no room for all of it"
    pacer.trained()
    assert pacer.admissible(PLENTY) == 0, "newer weights come first"
    pacer.begin_training([])
    assert pacer.admissible(PLENTY) == 2, "but not while the learner is at the next step"
    pacer.begin_offer()
    assert pacer.may_push() and pacer.admissible(PLENTY) == 0, "unless it offers to push meanwhile"
    pacer.end_offer()
    assert pacer.admissible(PLENTY) == 2


def test_fifo_takes_what_was_started_first_however_late_it_is():
    pacer = make(max_staleness=2)
    admit(pacer)
    arrive(pacer, 5, 4, 3, 1)
    assert waits(pacer)
    arrive(pacer, 0)
    assert train(pacer) == [0, 1]
    assert waits(pacer)


def test_windowed_takes_what_came_first_among_the_oldest():
    pacer = make(max_staleness=3, order="windowed", window=4)
    assert len(admit(pacer)) == 8
    arrive(pacer, 7, 6, 5, 3)
    assert waits(pacer), "of the oldest four only one is complete"
    arrive(pacer, 1)
    assert train(pacer) == [1, 3]
    assert waits(pacer), "the window is 0 2 4 5 now, of which only 5 is complete"
    arrive(pacer, 4)
    assert train(pacer) == [4, 5]


def test_windowed_waits_for_a_group_at_its_deadline():
    """Bound 1: of the four groups of version 0 the rollouts at versions 0 and 1 must take two each."""
    pacer = make(max_staleness=1, order="windowed", window=4)
    assert admit(pacer) == [0, 1, 2, 3]
    arrive(pacer, 3, 2)
    assert train(pacer) == [2, 3]
    assert admit(pacer) == [4, 5]
    arrive(pacer, 4, 5)
    assert waits(pacer), "0 and 1 would be two steps old in the rollout after this one"
    arrive(pacer, 1)
    assert waits(pacer)
    arrive(pacer, 0)
    assert train(pacer) == [0, 1]
    assert train(pacer) == [4, 5]


def test_freshest_takes_the_newest_but_leaves_time_for_the_oldest():
    """Bound 2, so six groups of version 0; each push admits two more."""
    pacer = make(max_staleness=2, order="freshest")
    assert admit(pacer) == [0, 1, 2, 3, 4, 5]
    arrive(pacer, 0, 1, 2, 3, 4, 5)
    assert train(pacer) == [0, 1], "all are of version 0: in their order"
    assert admit(pacer) == [6, 7]
    arrive(pacer, 6, 7)
    # Four of version 0 must go into the rollouts at versions 1 and 2, which have four places.
    assert train(pacer) == [2, 3]
    assert admit(pacer) == [8, 9]
    arrive(pacer, 8, 9)
    assert train(pacer) == [4, 5]
    assert admit(pacer) == [10, 11]
    arrive(pacer, 10, 11)
    # Version 3: 6 7 of version 1, 8 9 of version 2, 10 11 of version 3; 6 7 must go now.
    assert train(pacer) == [6, 7]


def test_freshest_prefers_the_newest_where_deadlines_leave_a_choice():
    """One group fewer of version 0: the rollout at version 1 has one free place."""
    pacer = make(max_staleness=2, order="freshest")
    assert admit(pacer, 5) == [0, 1, 2, 3, 4]
    arrive(pacer, 0, 1, 2, 3, 4)
    assert train(pacer) == [0, 1]
    assert admit(pacer, 2) == [5, 6]
    arrive(pacer, 5, 6)
    # 2 3 4 of version 0 have the rollouts at 1 and 2, four places: one of them must go now, one place is free.
    assert train(pacer) == [2, 5]
    assert train(pacer) == [3, 4]


def test_freshest_waits_only_for_as_many_old_ones_as_must_go():
    pacer = make(max_staleness=2, order="freshest")
    admit(pacer, 5)
    arrive(pacer, 0, 1)
    assert train(pacer) == [0, 1]
    admit(pacer, 2)
    arrive(pacer, 5, 6)
    assert waits(pacer), "one of 2 3 4 must go now"
    arrive(pacer, 4)
    assert train(pacer) == [4, 5]


def test_without_a_bound_the_newest_always_come_first():
    pacer = make(max_staleness=None, max_groups=6, order="freshest")
    assert admit(pacer) == [0, 1, 2, 3, 4, 5]
    arrive(pacer, 0, 1, 2, 3)
    assert train(pacer) == [0, 1]
    assert admit(pacer) == [6, 7], "six are outstanding, whatever their age"
    arrive(pacer, 6, 7)
    for version in range(1, 9):
        assert train(pacer) == [4 + 2 * version, 5 + 2 * version]
        arrive(pacer, *admit(pacer))
    assert {2, 3} <= set(pacer.ready)


def test_a_cap_counts_what_runs_and_what_waits():
    pacer = make(max_staleness=5, max_groups=3)
    assert admit(pacer) == [0, 1, 2]
    arrive(pacer, 0)
    assert pacer.admissible(PLENTY) == 0
    arrive(pacer, 1)
    assert train(pacer) == [0, 1]
    assert admit(pacer) == [3, 4]


def test_what_is_sampled_anew_gets_a_new_deadline_and_its_old_place_in_the_count():
    pacer = make(max_staleness=1, order="freshest", in_flight_updates="keep")
    assert admit(pacer) == [0, 1, 2, 3]
    arrive(pacer, 1, 2)
    assert train(pacer) == [1, 2]
    pacer.sample_anew(0)
    # Version 1 allows six groups in all; four were admitted, and 0 is one of them again.
    assert pacer.admissible(PLENTY) == 3
    (again, *others) = pacer.admit(3)
    assert (again.index, again.attempt, again.version) == (0, 1, 1)
    assert [ticket.index for ticket in others] == [4, 5]
    arrive(pacer, 0, 4, 5)
    assert waits(pacer), "3 of version 0 must go now"
    arrive(pacer, 3)
    assert train(pacer) == [0, 3], "the freshest beside it is the one with the lowest number"
    assert pacer.admissible(PLENTY) == 2


def test_stragglers_are_those_the_next_rollout_waits_for():
    pacer = make(max_staleness=2, straggler_s=1.0)
    admit(pacer)
    arrive(pacer, 1)
    assert pacer.stragglers() == set(), "no two groups are complete"
    arrive(pacer, 4)
    assert pacer.stragglers() == {0}
    pacer.begin_training([])
    assert pacer.stragglers() == set(), "nobody waits"


def test_stragglers_of_a_deadline_and_of_a_window():
    pacer = make(max_staleness=1, order="freshest", straggler_s=1.0)
    admit(pacer)
    arrive(pacer, 2, 3)
    assert train(pacer) == [2, 3]
    arrive(pacer, *admit(pacer))
    assert pacer.stragglers() == {0, 1}
    pacer = make(max_staleness=3, order="windowed", window=3, straggler_s=1.0)
    admit(pacer)
    arrive(pacer, 0, 5)
    assert pacer.stragglers() == {1, 2}, "no deadline is near, but the window holds only one complete group"


def test_restored_groups_keep_their_deadlines_and_unfinished_ones_start_first():
    """At version 4 with bound 2: ready ones of versions 2 and 3, one group was under way, ten were ever started."""
    pacer = Pacer(ScheduleSection(generation="streaming", prompts_per_step=2, max_staleness=2, order="freshest"), 4, 12)
    pacer.restore([(11, 3), (8, 2), (10, 3)], [9])
    assert pacer.unfinished == [9]
    assert pacer.admissible(PLENTY) == 3, "(4 + 2 + 1) x 2 groups in all, and 9 once more"
    assert admit(pacer) == [9, 12, 13]
    arrive(pacer, 12, 13)
    assert train(pacer) == [8, 12], "8 would be too old in the next step"


def test_restored_groups_are_first_in_first_out_whichever_came_first():
    """And a window has those that arrived first, as it had before."""
    for order, expected in (("fifo", [2, 3]), ("windowed", [4, 5])):
        pacer = Pacer(ScheduleSection(generation="streaming", prompts_per_step=2, max_staleness=4, order=order), 2, 6)
        pacer.restore([(5, 0), (4, 0), (3, 0), (2, 0)], [])
        assert [ticket.index for ticket in pacer.next_rollout()] == expected, order


def test_pushes_wait_for_what_must_not_meet_two_versions():
    pacer = make(max_staleness=2)
    admit(pacer)
    pacer.trained()
    assert not pacer.may_push()
    assert pacer.admissible(PLENTY) == 0, "the generators come to an end first"
    assert pacer.may_push(abandoned=True)
    arrive(pacer, *list(pacer.running))
    assert pacer.may_push()
    pacer.begin_evaluation()
    assert not pacer.may_push()
    in_flight = make(max_staleness=2, in_flight_updates="keep")
    admit(in_flight)
    assert not in_flight.may_push(waiting=True), "a push for one would stop the others"
    assert in_flight.may_push(waiting=True, abandoned=True)
    in_flight.trained()
    assert in_flight.may_push()
