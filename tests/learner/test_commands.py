"""What the learner refuses, and what it leaves alone."""

import pytest
from learner_ranks import LayoutRun


@pytest.mark.parametrize("name", ["plain", "tied", "wide"])
def test_a_step_without_pairs_advances_the_version_and_changes_no_weight(run: LayoutRun, name: str):
    for rank in run.ranks:
        assert rank[name]["empty"] == {"num_sequences": 0.0, "num_pairs": 0.0}
        assert rank[name]["version after empty"] == 1
        assert not rank[name]["changed by an empty and a refused step"]


def test_the_wrong_version_is_refused_on_every_rank(run: LayoutRun):
    for rank in run.ranks:
        error = rank["plain"]["wrong version"]
        assert error["kind"] == "LearnerError"
        assert "version 0" in error["message"]
        assert "is at 1" in error["message"]
        assert rank["plain"]["version after wrong version"] == 1


def test_preferences_before_reinforcement_started_are_refused(run: LayoutRun):
    for rank in run.ranks:
        assert rank["plain"]["too early"]["kind"] == "LearnerError"
        assert "StartReinforcement" in rank["plain"]["too early"]["message"]


def test_every_step_advances_the_version_by_one(run: LayoutRun):
    assert [rank["plain"]["version"] for rank in run.ranks] == [4] * run.layout.ranks


def test_pairs_are_counted(run: LayoutRun):
    steps = run.result("plain")["preferences"]
    assert [(step["num_pairs"], step["num_sequences"]) for step in steps] == [(5, 10), (1, 2), (5, 10)]


@pytest.mark.parametrize(("stage", "what"), [("supervised", "supervised step 2"), ("preferences", "step 1")])
def test_a_loss_that_is_not_finite_is_refused_on_every_rank(run: LayoutRun, stage: str, what: str):
    for rank in run.ranks:
        assert rank["blow up"][stage]["kind"] == "NonFiniteLossError"
        assert rank["blow up"][stage]["message"].startswith(f"{what}: loss ")


def test_a_loss_that_is_not_finite_leaves_weights_and_version_alone(run: LayoutRun):
    for rank in run.ranks:
        assert not rank["blow up"]["changed"]
        assert rank["blow up"]["version"] == 0
