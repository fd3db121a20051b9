"""Preference pairs in the forms of public data sets, and the pairs that teach nothing."""

import json
from pathlib import Path

import pytest

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.config.load import check_tree
from megatron_async_rlhf.data.pairs import PreferencePair, load_pairs
from megatron_async_rlhf.data.report import DataReport
from megatron_async_rlhf.errors import ConfigError, DataError
from megatron_async_rlhf.types import Message

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def messages(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


def write(records: list[dict]) -> None:
    Path("t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def read(*records: dict, **keys: object) -> tuple[list[PreferencePair], DataReport]:
    write(list(records))
    names = [keys.get(f"{name}_field", name) for name in ("prompt", "chosen", "rejected", "margin")]
    Path("e.jsonl").write_text(json.dumps(dict(zip(names, ["held out", "yes", "no", 1], strict=True))) + "\n")
    report = DataReport()
    keys = {"train": "t.jsonl", "eval": "e.jsonl", "eval_prompts": 1} | keys
    return load_pairs(DataSection(**keys), "train", 0, report), report


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who are you?\n\nAssistant:"
HH_PROMPT = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who are you?")]
# name -> a record, its prompt, its sides, its margin, the columns that are named aloud
PUBLISHED = {
    "Anthropic HH": (
        {"chosen": f"{HH} A friend.\n\nReally.", "rejected": f"{HH} A foe."},
        HH_PROMPT, ("A friend.\n\nReally.", "A foe."), None, ["chosen", "rejected"],
    ),
    "Anthropic HH, sides that begin alike": (
        {"chosen": f"{HH} A friend.", "rejected": f"{HH} A friend or foe."},
        HH_PROMPT, ("A friend.", "A friend or foe."), None, ["chosen", "rejected"],
    ),
    "UltraFeedback binarized": (
        {
            "prompt": "Hi", "prompt_id": "7a",
            "chosen": [turn("user", "Hi"), turn("assistant", "Hello.")],
            "rejected": [turn("user", "Hi"), turn("assistant", "What?")],
            "messages": [turn("user", "Hi"), turn("assistant", "Hello.")],
            "score_chosen": 8.5, "score_rejected": 2.0,
        },
        [("user", "Hi")], ("Hello.", "What?"), 6.5, ["chosen", "score_chosen", "score_rejected"],
    ),
    "TRL, conversational": (
        {
            "prompt": [turn("system", "s"), turn("user", "Hi")],
            "chosen": [turn("assistant", "Hello.")], "rejected": [turn("assistant", "What?")],
        },
        [("system", "s"), ("user", "Hi")], ("Hello.", "What?"), None, ["prompt"],
    ),
    "CarperAI/openai_summarize_comparisons": (
        {"prompt": "POST: a\n\nTL;DR:", "chosen": " b", "rejected": " c"},
        [("user", "POST: a\n\nTL;DR:")], (" b", " c"), None, ["prompt"],
    ),
    "Dahoas/full-hh-rlhf": (
        {"prompt": HH, "response": " A friend.", "chosen": " A friend.", "rejected": " A foe."},
        [("user", HH)], (" A friend.", " A foe."), None, ["prompt"],
    ),
    "Intel/orca_dpo_pairs": (
        {"system": "Be kind.", "question": "Hi", "chosen": "Hello.", "rejected": "What?"},
        [("system", "Be kind."), ("user", "Hi")], ("Hello.", "What?"), None, ["question", "system"],
    ),
    "argilla, with ratings": (
        {
            "instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4",
            "chosen-rating": 5, "rejected-rating": 1,
        },
        [("user", "Add.\n\n1 2")], ("3", "4"), 4.0, ["instruction", "input", "chosen-rating"],
    ),
    "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144": (
        {
            "info": {"id": "t3_x", "post": "a"}, "summaries": [{"text": "b"}, {"text": "c"}], "choice": 1,
            "query_token": [1, 2], "query": "POST: a\n\nTL;DR:",
            "response0": " b<|endoftext|>", "response0_token": [3], "response1": " c<|endoftext|>", "response1_token": [4],
        },
        [("user", "POST: a\n\nTL;DR:")], (" c", " b"), None, ["query", "choice"],
    ),
    "a choice in text, as CSV has it": (
        {"query": "a", "response0": "b", "response1": "c", "choice": "1"}, [("user", "a")], ("c", "b"), None, ["choice"],
    ),
    "a system column beside conversations": (
        {
            "system": "Be kind.",
            "chosen": [turn("user", "Hi"), turn("assistant", "Hello.")],
            "rejected": [turn("user", "Hi"), turn("assistant", "What?")],
        },
        [("system", "Be kind."), ("user", "Hi")], ("Hello.", "What?"), None, ["system"],
    ),
    "a system column beside conversations that have a system message": (
        {
            "system": "Be kind.",
            "chosen": [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello.")],
            "rejected": [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "What?")],
        },
        [("system", "Be brief."), ("user", "Hi")], ("Hello.", "What?"), None, ["system"],
    ),
    "PKU-SafeRLHF": (
        {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0, "safer_response_id": 1},
        [("user", "a")], ("b", "c"), None, ["better_response_id"],
    ),
    "a margin": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}, [("user", "a")], ("b", "c"), 0.5, ["margin"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_pairs_of_public_data_are_recognised_and_named(name: str):
    record, prompt, sides, margin, named = PUBLISHED[name]
    (pair,), report = read(record)
    assert pair == PreferencePair(
        messages=messages(*prompt), chosen=sides[0], rejected=sides[1], margin=margin, origin="t.jsonl:1"
    )
    note = report.notes[0]
    assert "\n" not in note and note.startswith("data.train = t.jsonl: ") and "data.chosen_field" in note
    assert [column for column in named if repr(column) not in note] == []


def test_columns_that_are_set_win():
    record = {
        "prompt": "a",
        "q": "b",
        "chosen": "c",
        "rejected": "d",
        "good": "e",
        "bad": "f",
        "by": "1.5",
        "margin": 9,
    }
    keys = {"prompt_field": "q", "chosen_field": "good", "rejected_field": "bad", "margin_field": "by"}
    (pair,), report = read(record, **keys)
    assert (pair.messages, pair.chosen, pair.rejected, pair.margin) == (messages(("user", "b")), "e", "f", 1.5)
    assert report.notes == []
    for key in ("prompt_field", "margin_field"):  # one that is not set is recognised, and said
        some = {name: value for name, value in keys.items() if name != key}
        assert len(read(record, **some)[1].notes) == 1


def test_the_configuration_completes_every_conversation():
    (pair,), _ = read({"prompt": "a", "chosen": "b", "rejected": "c"}, system_prompt="s", instruction="i")
    assert pair.messages == messages(("system", "s"), ("user", "a\n\ni"))


TEXTS = {"prompt": "good", "chosen": "yes", "rejected": "no", "margin": 1.0}
TRANSCRIPTS = {"chosen": f"{HH} yes", "rejected": f"{HH} no"}
CHATS = {side: [turn("user", "good"), turn("assistant", side)] for side in ("chosen", "rejected")}
ANSWERS = {"prompt": [turn("user", "good")]} | {side: [turn("assistant", side)] for side in ("chosen", "rejected")}
# a good record, and changes that make it bad, by reason
BAD = [
    (TEXTS, {"rejected": "yes "}, "identical sides"),
    (TRANSCRIPTS, {"rejected": f"{HH} yes"}, "identical sides"),
    (CHATS, {"rejected": CHATS["chosen"]}, "identical sides"),
    (TEXTS, {"rejected": " "}, "an empty side"),
    (TRANSCRIPTS, {"chosen": HH}, "an empty side"),
    (TRANSCRIPTS, {"rejected": "\n\nHuman: Else\n\nAssistant: no"}, "different prompts"),
    (TRANSCRIPTS, {"chosen": f"{HH} yes\n\nHuman: More\n\nAssistant: z"}, "different prompts"),
    (CHATS, {"rejected": [turn("user", "else"), turn("assistant", "no")]}, "different prompts"),
    (CHATS, {"rejected": [turn("user", "good")]}, "no answer of the assistant"),
    (TRANSCRIPTS, {"chosen": "yes", "rejected": "no"}, "no prompt"),
    (CHATS, {side: CHATS[side][1:] for side in CHATS}, "no prompt"),
    (TEXTS, {"prompt": " "}, "an empty prompt"),
    (ANSWERS, {"prompt": [turn("user", "a"), turn("assistant", "x")]}, "no message to answer"),
    (TEXTS, {"rejected": ["no"]}, "a wrong type"),
    (TEXTS, {"rejected": None}, "a wrong type"),
    (TEXTS, {"margin": "much"}, "a wrong type"),
    (TEXTS, {"margin": float("nan")}, "a wrong type"),
    (TEXTS, {"chosen": "\ud800"}, "invalid Unicode"),
]


@pytest.mark.parametrize(("good", "change", "reason"), BAD, ids=[f"{bad[2]}-{n}" for n, bad in enumerate(BAD)])
def test_a_pair_that_teaches_nothing_is_refused_or_dropped_by_its_reason(good: dict, change: dict, reason: str):
    with pytest.raises(DataError) as error:
        read(good, good | change)
    line = str(error.value)
    assert line.startswith("t.jsonl:2: ") and f"1 with {reason}; data.bad_records = drop" in line and "\n" not in line
    pairs, report = read(good, good | change, bad_records="drop")
    assert len(pairs) == 1 and report.dropped == {reason: 1}
    assert any(f"for {reason}; the first: t.jsonl:2: " in note for note in report.notes)


def test_a_pair_without_a_margin_has_none_among_others_that_have_one():
    pairs, _ = read(TEXTS, TEXTS | {"margin": None})
    assert [pair.margin for pair in pairs] == [1.0, None]


def test_scores_of_a_csv_file_are_numbers():
    Path("t.csv").write_text("prompt,chosen,rejected,score_chosen,score_rejected\n1 + 1,2,3,7.5,1e0\n2 + 2,4,5,,\n")
    Path("e.jsonl").write_text('{"prompt": "x", "chosen": "y", "rejected": "z"}\n')
    data = DataSection(train="t.csv", eval="e.jsonl", eval_prompts=1)
    pairs = load_pairs(data, "train", 0)
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [("2", "3", 6.5), ("4", "5", None)]


def test_sides_that_are_missing_are_named():
    with pytest.raises(
        DataError, match="no field 'chosen', the fields present are 'prompt', 'a'; set data.chosen_field"
    ):
        read({"prompt": "a", "a": "b"})


def test_held_out_pairs_have_no_prompt_that_is_trained_on():
    records = [
        {"prompt": f"p{number % 20}", "chosen": f"yes {number}", "rejected": f"no {number}"} for number in range(60)
    ]
    write(records)
    report = DataReport()
    data = DataSection(train="t.jsonl", eval_prompts=5)
    train, held_out = (load_pairs(data, split, 3, report) for split in ("train", "eval"))
    prompts = [{pair.messages[-1].content for pair in pairs} for pairs in (train, held_out)]
    assert len(prompts[1]) == len(held_out) == 5 and len(train) == 45
    assert not prompts[0] & prompts[1] and prompts[0] | prompts[1] == {f"p{number}" for number in range(20)}
    assert (report.read, report.used) == (60, 50) and report.dropped == {"the same prompt as a held-out one": 10}
    assert load_pairs(data, "eval", 3) == held_out


def test_pairs_hold_out_the_same_prompts_as_examples():
    from megatron_async_rlhf.data.source import load_examples

    write([{"prompt": f"p{number}", "chosen": "yes", "rejected": "no"} for number in range(40)])
    data = DataSection(train="t.jsonl", eval_prompts=8)
    pairs, examples = load_pairs(data, "eval", 1), load_examples(data, "eval", 1)
    assert [pair.messages for pair in pairs] == [example.messages for example in examples]


def test_the_built_in_task_has_no_pairs():
    with pytest.raises(DataError, match="data.train = builtin: the built-in task has no preference pairs"):
        load_pairs(DataSection(), "train", 0)


@pytest.mark.parametrize(("given", "missing"), [("chosen_field", "rejected_field"), ("rejected_field", "chosen_field")])
def test_one_side_alone_is_no_pair(given: str, missing: str):
    tree = {
        "model": {"hf": "x"},
        "data": {"train": "t.jsonl", given: "a"},
        "reward": {"type": "function", "function": "a.py:b"},
    }
    with pytest.raises(ConfigError, match=f"data.{given} = a needs data.{missing}"):
        check_tree(tree)


def test_real_model_solutions_make_pairs(tmp_path: Path):
    """Of each question one right and one wrong solution of the models."""
    path = SHARED / "gsm8k" / "example_model_solutions.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    records = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        solutions = [value for value in row.values() if isinstance(value, dict) and "is_correct" in value]
        right = [each["solution"] for each in solutions if each["is_correct"]]
        wrong = [each["solution"] for each in solutions if not each["is_correct"]]
        if right and wrong:
            records.append({"question": row["question"], "chosen": right[0], "rejected": wrong[0]})
    write(records)
    report = DataReport()
    pairs = load_pairs(DataSection(train="t.jsonl", eval_prompts=64), "train", 0, report)
    assert len(records) > 500 and report.read == len(records) and len(pairs) >= len(records) - 70
    assert {pair.messages[0].content for pair in pairs} <= {record["question"] for record in records}
