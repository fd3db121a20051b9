"""The data of examples/mini, and its gold reward."""

import importlib.util
import json
from pathlib import Path

MINI = Path(__file__).parents[2] / "examples/mini"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, MINI / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (MINI / name).read_text(encoding="utf-8").splitlines()]


def test_the_data_are_what_the_script_makes(tmp_path, monkeypatch):
    make_data = load("make_data")
    monkeypatch.setattr(make_data, "__file__", str(tmp_path / "make_data.py"))
    make_data.main()
    for path in MINI.glob("*.jsonl"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_what_is_held_out_is_trained_on_nowhere():
    held_out = {row["prompt"] for row in rows("held_out.jsonl")}
    assert len(held_out) == 384
    assert not held_out & {row["prompt"] for row in rows("prompts.jsonl")}
    assert not held_out & {row["messages"][0]["content"] for row in rows("chats.jsonl")}


def test_the_gold_reward_tells_the_demonstrations_apart():
    """A third of the demonstrations is right and plain, a fifth is wrong."""
    score = load("gold").score
    facts = {row["prompt"]: row for row in rows("prompts.jsonl")}
    scores = []
    for chat in rows("chats.jsonl"):
        question, demonstration = (message["content"] for message in chat["messages"])
        row = facts[question]
        assert score([row["answer"], ""], row["answer"], row["fact"]) == [1.0, 0.0]
        scores += score([demonstration], row["answer"], row["fact"])
    share = {value: scores.count(value) / len(scores) for value in (0.0, 0.5, 1.0)}
    assert 0.32 < share[1.0] < 0.38 and 0.17 < share[0.0] < 0.23 and sum(share.values()) == 1
