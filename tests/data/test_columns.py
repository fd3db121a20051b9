"""What is recognised in the columns of public data sets, each written as it is published, and what is refused."""

import json
from pathlib import Path

import pytest

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.report import DataReport
from megatron_async_rlhf.data.source import load_examples
from megatron_async_rlhf.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def read(*records: dict, **keys: object) -> tuple[list[Example], list[str]]:
    """The examples of these records, and what is said about them."""
    Path("t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report = DataReport()
    examples = load_examples(DataSection(train="t.jsonl", eval="builtin", **keys), "train", 0, report)
    return examples, report.notes


POST = "SUBREDDIT: r/x\n\nTITLE: A\n\nPOST: I did.\n\nTL;DR:"
TOKENS = {"query_token": [1, 2], "reference_response_token": [3], "reference_response_token_len": 1}
# name -> a record, messages of the prompt, the solution, the columns that are named aloud
PUBLISHED = {
    "No Robots": (
        {
            "prompt": "Hi",
            "prompt_id": "7a",
            "messages": [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello.")],
            "category": "Chat",
        },
        [("system", "Be kind."), ("user", "Hi")], "Hello.", ["messages"],
    ),
    "UltraFeedback binarized": (
        {
            "prompt": "Hi", "prompt_id": "7a",
            "chosen": [turn("user", "Hi"), turn("assistant", "Hello.")],
            "rejected": [turn("user", "Hi"), turn("assistant", "What?")],
            "messages": [turn("user", "Hi"), turn("assistant", "Hello.")],
            "score_chosen": 8.0, "score_rejected": 2.0,
        },
        [("user", "Hi")], "Hello.", ["messages"],
    ),
    "trl-lib/ultrafeedback_binarized": (
        {
            "chosen": [turn("user", "Hi"), turn("assistant", "Hello.")],
            "rejected": [turn("user", "Hi"), turn("assistant", "What?")],
            "score_chosen": 8.0, "score_rejected": 2.0,
        },
        [("user", "Hi")], "Hello.", ["chosen"],
    ),
    "Anthropic HH": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: Me.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: You.",
        },
        [("user", "Hi"), ("assistant", "Hello."), ("user", "Who?")], "Me.", ["chosen"],
    ),
    "trl-lib/tldr": ({"prompt": POST, "completion": " I did."}, [("user", POST)], " I did.", ["prompt", "completion"]),
    "CarperAI/openai_summarize_tldr": ({"prompt": POST, "label": "I did."}, [("user", POST)], "I did.", ["prompt", "label"]),
    "CarperAI/openai_summarize_comparisons": (
        {"prompt": POST, "chosen": "I did.", "rejected": "No."}, [("user", POST)], "I did.", ["prompt", "chosen"],
    ),
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered": (
        {"id": "t3_x", "subreddit": "r/x", "title": "A", "post": "I did.", "summary": "Did."},
        [("user", "I did.")], "Did.", ["post", "summary"],
    ),
    "vwxyzjn/..._oai_preprocessing_1706381144": (
        {
            "id": "t3_x", "subreddit": "r/x", "title": "A", "post": "I did.", "summary": "Did.",
            "query": POST, "reference_response": " Did.<|endoftext|>", **TOKENS,
        },
        [("user", POST)], " Did.", ["query", "reference_response"],
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is an instruction ..."},
        [("user", "Add.\n\n1 2")], "3", ["instruction", "input", "output"],
    ),
    "Alpaca without input": (
        {"instruction": "Add.", "input": "", "output": "3"}, [("user", "Add.")], "3", ["instruction", "output"],
    ),
    "Dolly": (
        {"instruction": "Add.", "context": "1 2", "response": "3", "category": "qa"},
        [("user", "Add.\n\n1 2")], "3", ["instruction", "context", "response"],
    ),
    "GSM8K": ({"question": "1+1?", "answer": "2\n#### 2"}, [("user", "1+1?")], "2\n#### 2", ["question", "answer"]),
    "numbers as answers": ({"question": "1+1?", "answer": "2"}, [("user", "1+1?")], "2", ["question", "answer"]),
    "ShareGPT": (
        {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        [("user", "Hi")], "Hello.", ["conversations"],
    ),
    "ShareGPT with a system column": (
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        [("system", "Be kind."), ("user", "Hi")], "Hello.", ["conversations", "system"],
    ),
    "OpenOrca": (
        {"id": "x", "system_prompt": "Be kind.", "question": "Hi", "response": "Hello."},
        [("system", "Be kind."), ("user", "Hi")], "Hello.", ["question", "system_prompt", "response"],
    ),
    "TRL, conversational": (
        {"prompt": [turn("user", "Hi")], "completion": [turn("assistant", "Hello.")]},
        [("user", "Hi")], "Hello.", ["prompt", "completion"],
    ),
    "a column of text": ({"text": "Hi", "n": 1}, [("user", "Hi")], None, ["text"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_columns_of_public_data_are_recognised_and_named(name: str):
    record, messages, solution, named = PUBLISHED[name]
    (example,), (note,) = read(record)
    assert [(message.role, message.content) for message in example.messages] == messages
    assert example.solution == solution
    assert example.reference == ({} if solution is None else {"solution": solution})
    assert "\n" not in note and note.startswith("data.train = t.jsonl: ") and "data.prompt_field" in note
    assert [column for column in named if repr(column) not in note] == []


def test_a_blank_cell_is_no_answer():
    examples, _ = read({"instruction": "Add.", "output": "3"}, {"instruction": "Sum.", "output": " "})
    assert [(example.solution, example.reference) for example in examples] == [("3", {"solution": "3"}), (None, {})]


def test_a_column_called_prompt_needs_no_word():
    (example,), notes = read({"prompt": "Hi", "letter": "b", "times": 3})
    assert (example.text, example.solution, notes) == ("Hi", None, [])


@pytest.mark.parametrize("field", ["prompt", "question"])
def test_a_column_that_is_set_wins_and_nothing_else_is_looked_for(field: str):
    record = {"prompt": "a", "question": "b", "answer": "c", "messages": [turn("user", "d")]}
    (example,), notes = read(record, prompt_field=field)
    assert (example.text, example.solution, notes) == (record[field], None, [])
    (example,), notes = read(record, prompt_field=field, solution_field="answer")
    assert (example.text, example.solution, notes) == (record[field], "c", [])


def test_a_solution_that_is_set_leaves_the_prompt_to_be_found():
    (example,), (note,) = read({"problem": "a", "solution": "b", "answer": "c"}, solution_field="answer")
    assert (example.text, example.solution) == ("a", "c")
    assert "'problem'" in note and "'solution'" not in note


def test_what_a_reward_is_given_is_no_solution():
    (example,), notes = read({"prompt": "a", "answer": "b"}, reference_fields=["answer"])
    assert (example.solution, example.reference, notes) == (None, {"answer": "b"}, [])


def test_the_first_row_may_be_empty():
    records = [{"question": "", "answer": None, "n": 1}, {"question": "a", "answer": "b", "n": 2}]
    examples, notes = read(*records, bad_records="drop")
    assert [(example.text, example.solution) for example in examples] == [("a", "b")]
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "problem": "b"}, "the prompt may be in 'question' or 'problem'; set data.prompt_field"),
        ({"prompt": "a", "answer": "b", "output": "c"}, "the solution may be in 'answer' or 'output'; set data.solution_field"),
        (
            {"problem": "a", "solution": "b", "answer": "c", "response": "d"},
            "the solution may be in 'response', 'answer' or 'solution'; set data.solution_field",
        ),
        (
            {"messages": [turn("user", "a")], "conversations": [turn("user", "a")]},
            "the conversation may be in 'messages' or 'conversations'; set data.prompt_field",
        ),
        ({"utterance": "a"}, "t.jsonl:1: no field 'prompt', the fields present are 'utterance'; set data.prompt_field"),
        (
            # openai/summarize_from_feedback: texts are inside
            {"info": {"id": "x", "post": "a"}, "summaries": [{"text": "b"}, {"text": "c"}], "choice": 0, "worker": "w"},
            "no field 'prompt', the fields present are 'info', 'summaries', 'choice', 'worker'",
        ),
    ],
)  # fmt: skip
def test_what_may_be_several_things_is_refused(record: dict, message: str):
    with pytest.raises(DataError) as error:
        read(record)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("gsm8k/train.jsonl", ["question", "answer"]),
        ("ifeval/input_data.jsonl", []),
    ],
)
def test_real_files(file: str, columns: list[str]):
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    report = DataReport()
    data = DataSection(train=str(path), eval="builtin", eval_prompts=1)
    examples = load_examples(data, "train", 0, report)
    assert len(examples) == len(records) and report.dropped == {}
    name = columns[0] if columns else "prompt"
    assert [example.text for example in examples] == [record[name] for record in records]
    assert [column for column in columns if not any(repr(column) in note for note in report.notes)] == []
