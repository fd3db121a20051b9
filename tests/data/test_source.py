import json
from pathlib import Path

import pytest

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.data.builtin_task import make_examples
from megatron_async_rlhf.data.conversation import one_turn
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.source import load_examples
from megatron_async_rlhf.errors import DataError


def write(path: Path, records: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"question {index}"} for index in range(start, start + count)]


def texts(data: DataSection, split: str, seed: int = 0) -> list[str]:
    return [example.text for example in load_examples(data, split, seed)]


def refused(data: DataSection, message: str, split: str = "train") -> None:
    with pytest.raises(DataError, match=message) as error:
        load_examples(data, split, 0)
    assert "\n" not in str(error.value)


def test_builtin_is_the_default():
    assert load_examples(DataSection(), "train", 7) == make_examples(7, 4096, "train")
    assert load_examples(DataSection(), "eval", 7) == make_examples(7, 256, "eval")
    sized = DataSection(train_prompts=20, eval_prompts=10)
    assert len(load_examples(sized, "train", 7)) == 20
    assert len(load_examples(sized, "eval", 7)) == 10


def test_jsonl_fields_become_text_reference_and_solution(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"q": " Wie früh? ", "a": "so #### 1", "other": [1]}, {"q": "x", "a": "y"}])
    with_solution = DataSection(train=path, eval="builtin", prompt_field="q", solution_field="a")
    assert load_examples(with_solution, "train", 0)[0] == Example(
        messages=one_turn(" Wie früh? "), reference={"solution": "so #### 1"}, solution="so #### 1", origin=f"{path}:1"
    )
    without = DataSection(train=path, eval="builtin", prompt_field="q")
    assert load_examples(without, "train", 0)[1] == Example(messages=one_turn("x"), reference={}, origin=f"{path}:2")


def test_blank_lines_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b\xe2\x80\xa8c", "score": NaN}')
    assert texts(DataSection(train=str(path), eval="builtin"), "train") == ["a", "b\u2028c"]


def test_held_out_prompts_are_not_trained_on(tmp_path):
    records = numbered(50) + numbered(50)  # a second copy must not bring a held-out prompt back
    data = DataSection(train=write(tmp_path / "t.jsonl", records), eval_prompts=10)
    evaluation, train = texts(data, "eval"), texts(data, "train")
    assert len(set(evaluation)) == 10
    assert not set(evaluation) & set(train)
    assert set(evaluation) | set(train) == {f"question {index}" for index in range(50)}
    assert len(train) == 80
    assert texts(data, "eval") == evaluation
    assert texts(data, "eval", seed=1) != evaluation
    assert evaluation != [f"question {index}" for index in range(10)]


def test_train_prompts_limits_training_without_changing_the_evaluation(tmp_path):
    path = write(tmp_path / "t.jsonl", numbered(50))
    whole = DataSection(train=path, eval_prompts=10)
    limited = DataSection(train=path, eval_prompts=10, train_prompts=7)
    assert texts(limited, "eval") == texts(whole, "eval")
    assert texts(limited, "train") == texts(whole, "train")[:7]
    assert len(texts(DataSection(train=path, eval_prompts=10, train_prompts=1000), "train")) == 40


def test_eval_file_is_used_in_order_and_removed_from_train(tmp_path):
    train = write(tmp_path / "t.jsonl", numbered(10))
    evaluation = write(tmp_path / "e.jsonl", [*numbered(2, 20), {"prompt": "question 3 "}, {"prompt": "question 5"}])
    data = DataSection(train=train, eval=evaluation, eval_prompts=2)
    assert texts(data, "eval") == ["question 20", "question 21"]
    assert texts(data, "train") == [f"question {index}" for index in (0, 1, 2, 4, 6, 7, 8, 9)]


def test_relative_eval_is_tried_beside_train_first(tmp_path, monkeypatch):
    train = write(tmp_path / "data/t.jsonl", numbered(5))
    write(tmp_path / "work/e.jsonl", [{"prompt": "in the working directory"}])
    monkeypatch.chdir(tmp_path / "work")
    data = DataSection(train=train, eval="e.jsonl", eval_prompts=1)
    assert texts(data, "eval") == ["in the working directory"]
    write(tmp_path / "data/e.jsonl", [{"prompt": "beside train"}])
    assert texts(data, "eval") == ["beside train"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', r"t\.jsonl:2: not JSON \(.*each line must be one JSON object"),
        (b'{"prompt": "\xff"}\n', r"t\.jsonl:1: not UTF-8 \(byte 0xff at column 13\)"),
        (b"[" * 100_000, r"t\.jsonl:1: not JSON"),
        (b'\n["a"]\n', r"t\.jsonl:2: a list, not an object"),
        (b"null\n", r"t\.jsonl:1: null, not an object"),
        (
            b'{"utterance": "a", "id": 1}\n',
            r"t\.jsonl:1: no field 'prompt', the fields present are 'utterance', 'id'; set data.prompt_field",
        ),
        (b"{}\n", r"t\.jsonl:1: no field 'prompt', the fields present are none"),
        (b'{"prompt": " \\n"}\n', r"t\.jsonl:1: field 'prompt' is empty"),
        (b'{"prompt": 3}\n', r"t\.jsonl:1: field 'prompt' is a number, neither text nor a list of messages"),
        (b'{"prompt": null}\n', r"t\.jsonl:1: field 'prompt' is null, neither text nor a list of messages"),
        (b'{"prompt": "\\ud800"}\n', r"t\.jsonl:1: field 'prompt' is not valid Unicode"),
        (b"", r"data.train = .*t\.jsonl: has no prompts"),
        (b"\n \n", r"data.train = .*t\.jsonl: has no prompts"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    refused(DataSection(train=str(path), eval="builtin"), message)


def test_bad_solutions_are_named(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": None}])
    refused(
        DataSection(train=path, eval="builtin", solution_field="solution"),
        r":1: no field 'solution', the fields present are 'prompt', 'answer'; set data.solution_field",
    )
    refused(DataSection(train=path, eval="builtin", solution_field="answer"), r":2: field 'answer' is null")


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = write(tmp_path / "data/t.jsonl", numbered(3))
    (tmp_path / "folder.jsonl").mkdir()
    refused(DataSection(train="none.jsonl"), rf"data.train = none.jsonl: no such file \({tmp_path}/none.jsonl\)")
    refused(
        DataSection(train=train, eval="none.jsonl"),
        rf"data.eval = none.jsonl: no such file \({tmp_path}/data/none.jsonl or {tmp_path}/none.jsonl\)",
    )
    refused(DataSection(train="folder.jsonl"), "data.train = folder.jsonl: datasets cannot load it .*any data files")
    refused(DataSection(train="built-in"), "data.train = built-in: write `builtin`")


def test_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", numbered(3))

    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)  # a mode of 000 does not stop root
    refused(DataSection(train=path), r"t\.jsonl: cannot be read \(Permission denied\)")


def test_too_few_prompts(tmp_path):
    path = write(tmp_path / "t.jsonl", numbered(10) + numbered(10))
    refused(
        DataSection(train=path, eval_prompts=10),
        r"holding out data.eval_prompts = 10 of its 10 different prompts leaves none to train on",
    )
    assert len(texts(DataSection(train=path, eval_prompts=9), "train")) == 2
    refused(
        DataSection(train="builtin", eval=path, eval_prompts=21),
        r"has 20 prompts, fewer than data.eval_prompts = 21; lower that or give more",
        split="eval",
    )
    refused(DataSection(train=path, eval=path, eval_prompts=5), "all its prompts are used for evaluation")


# The `datasets` library, on local files and with a stand-in for the hub.


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture
def hub(monkeypatch):
    """Records what is asked of the library and answers with five rows."""
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": f"q{n}", "answer": f"#### {n}"} for n in range(5)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:openai/gsm8k:main:train", (("openai/gsm8k", "main"), {"split": "train"})),
        ("hf:squad:train", (("squad", None), {"split": "train"})),
        ("hf:openai/gsm8k:main:train[2:100]", (("openai/gsm8k", "main"), {"split": "train[2:100]"})),
    ],
)
def test_hub_source_is_taken_apart(hub, source, asked):
    data = DataSection(train=source, eval_prompts=2, prompt_field="question", solution_field="answer")
    train = load_examples(data, "train", 0)
    assert hub == [asked] * len(hub)
    evaluation = load_examples(data, "eval", 0)
    assert sorted(example.text for example in train + evaluation) == ["q0", "q1", "q2", "q3", "q4"]
    assert {example.solution for example in train + evaluation} == {f"#### {n}" for n in range(5)}
    assert all(example.reference == {"solution": example.solution} for example in train)


@pytest.mark.parametrize("source", ["hf:", "hf:gsm8k", "hf:gsm8k:", "hf::train", "hf:a:b:c:d"])
def test_malformed_hub_source(source):
    refused(DataSection(train=source), "the form is hf:<dataset>")


def test_hub_rows_are_checked(hub, monkeypatch):
    refused(
        DataSection(train="hf:x:train", prompt_field="text"),
        r"hf:x:train row 0: no field 'text', the fields present are 'question', 'answer'",
    )
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_dict({"prompt": []}))
    refused(DataSection(train="hf:x:train"), "data.train = hf:x:train: has no prompts")


def test_hub_failures_are_one_line(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    refused(
        DataSection(train="hf:x:train"),
        r"data.train = hf:x:train: datasets cannot load it \(RuntimeError: no route\); check name, config, split",
    )


def test_local_file_and_directory_through_the_library(hub_cache, tmp_path):
    path = write(tmp_path / "set/train.jsonl", numbered(6))
    for source in (f"hf:{path}:train", f"hf:{tmp_path}/set:train"):
        assert texts(DataSection(train=source, eval="builtin"), "train") == [f"question {n}" for n in range(6)]
    part = DataSection(train="builtin", train_prompts=13, eval=f"hf:{path}:test[1:3]", eval_prompts=2)
    assert texts(part, "eval") == ["question 1", "question 2"]
    refused(DataSection(train=f"hf:{tmp_path}/set:nosuch"), "datasets cannot load it")
