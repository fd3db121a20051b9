"""Records that are empty or malformed: refused, the first one named, or dropped and counted by reason."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.report import DataReport
from megatron_async_rlhf.data.source import load_examples
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.jobs.inputs import load_run_inputs, make_model_template
from megatron_async_rlhf.telemetry.summary import RunTotals

GOOD = [json.dumps({"prompt": f"question {number}"}) for number in range(6)]
# line -> the reason by which it is counted
BAD = {
    '{"prompt": " "}': "an empty prompt",
    '{"prompt": ""}': "an empty prompt",
    '{"prompt": 3}': "a wrong type",
    '{"question": "a"}': "a missing field",
    '{"prompt": [{"role": "system", "content": "s"}]}': "no message to answer",
    '{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}': "a part that is not text",
    '{"prompt": "\\ud800"}': "invalid Unicode",
    "[1, 2]": "no JSON object",
    '{"prompt": "cut off': "no JSON object",
}
REASONS = {reason: list(BAD.values()).count(reason) for reason in BAD.values()}


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(lines: list[str], path: str = "t.jsonl") -> None:
    content = "".join(line + "\n" for line in lines).encode()
    Path(path).write_bytes(gzip.compress(content) if path.endswith(".gz") else content)


def load(**keys: object) -> tuple[list[str], DataReport]:
    report = DataReport()
    keys = {"train": "t.jsonl", "eval": "builtin", "prompt_field": "prompt"} | keys
    return [example.text for example in load_examples(DataSection(**keys), "train", 0, report)], report


@pytest.mark.parametrize("bad", BAD)
def test_the_first_bad_record_is_named_and_how_many_there_are(bad: str):
    write([GOOD[0], bad, *GOOD[1:], bad])
    with pytest.raises(DataError) as error:
        load()
    line = str(error.value)
    assert line.startswith("t.jsonl:2: ") and "\n" not in line
    assert f"(bad are 2 of 8 records: 2 with {BAD[bad]}; data.bad_records = drop leaves them out)" in line


def test_there_is_a_count_of_each_kind():
    write([*GOOD, *BAD])
    with pytest.raises(DataError) as error:
        load()
    assert f"bad are {len(BAD)} of {len(GOOD) + len(BAD)} records: " in str(error.value)
    assert all(f"{count} with {reason}" in str(error.value) for reason, count in REASONS.items())


@pytest.mark.parametrize("path", ["t.jsonl", "t.jsonl.gz"])
def test_dropped_records_are_counted_by_reason_and_the_first_of_each_is_shown(path: str):
    lines = [line for pair in zip([*GOOD, *[GOOD[0]] * 3], BAD, strict=True) for line in pair]
    write(lines, path)
    texts, report = load(train=path, bad_records="drop")
    assert len(texts) == len(BAD) and set(texts) == {f"question {number}" for number in range(6)}
    assert report.dropped == REASONS
    assert (report.read, report.used) == (len(lines), len(BAD))
    notes = {note.split(" records are left out for ")[1].split(";")[0]: note for note in report.notes}
    assert notes.keys() == REASONS.keys()
    for reason, note in notes.items():
        first = 1 + next(place for place, line in enumerate(lines) if BAD.get(line) == reason)
        assert f"data.train = {path}: {REASONS[reason]} of {len(lines)} records" in note
        assert f"the first: {path}:{first}: " in note and "\n" not in note


@pytest.mark.parametrize("policy", ["refuse", "drop"])
def test_where_all_records_are_bad_nothing_can_be_left_out(policy: str):
    write(['{"question": "a"}'] * 3)
    with pytest.raises(DataError) as error:
        load(bad_records=policy)
    assert str(error.value).startswith("t.jsonl:1: no field 'prompt'")
    assert "(all 3 records are bad: 3 with a missing field)" in str(error.value)


def test_a_file_of_another_kind_is_no_bad_record():
    Path("t.jsonl").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is a Parquet file"):
        load(bad_records="drop")


def test_bad_rows_of_tables_and_lists_are_dropped_too():
    Path("t.csv").write_text("prompt,answer\na,b\n,c\n")
    Path("t.json").write_text(json.dumps([{"prompt": "a"}, 3, {"prompt": ""}]))
    assert load(train="t.csv", bad_records="drop")[1].dropped == {"an empty prompt": 1}
    assert load(train="t.json", bad_records="drop")[1].dropped == {"an empty prompt": 1, "no JSON object": 1}


@pytest.mark.parametrize(
    "keys", [{}, {"eval": "e.jsonl"}, {"train_prompts": 2}, {"eval": "e.jsonl", "train_prompts": 2}]
)
def test_every_record_is_used_or_dropped_for_a_reason(keys: dict):
    records = [*GOOD, *GOOD[:2], *BAD]
    write(records)
    write([GOOD[0], '{"prompt": "another"}', '{"prompt": "yet another"}', '{"prompt": ""}'], "e.jsonl")
    data = DataSection(train="t.jsonl", eval_prompts=2, bad_records="drop", prompt_field="prompt", **keys)
    report = DataReport()
    loaded = [example for split in ("train", "eval") for example in load_examples(data, split, 0, report)]
    assert report.used == len(loaded)
    assert report.read == len(records) + (4 if "eval" in keys else 0)
    assert report.read == report.used + report.dropped.total()
    assert ("beyond data.train_prompts" in report.dropped) == ("train_prompts" in keys)
    assert report.dropped["an empty prompt"] == 2 + ("eval" in keys)


def test_the_summary_has_the_counts(tmp_path: Path):
    write([*GOOD, *BAD, json.dumps({"prompt": "long " * 50})])
    tree = {
        "model": {"layers": 1, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96},
        "generator": {"max_new_tokens": 16},
        "data": {
            "train": "t.jsonl", "prompt_field": "prompt", "eval_prompts": 2, "bad_records": "drop", "long_prompts": "drop",
        },
        "reward": {"type": "function", "function": "own.py:score"},
    }  # fmt: skip
    config = RunConfig.model_validate(tree)
    make_model_template(config, tmp_path / "template")
    run_inputs = load_run_inputs(config, tmp_path / "template")
    totals = RunTotals.of(config)
    assert totals.to_summary("completed", None)["data"] == {"read": 0, "used": 0, "dropped": {}}
    totals.data = run_inputs.data_counts
    told = totals.to_summary("completed", None)["data"]
    assert told["used"] == len(run_inputs.train) + len(run_inputs.eval) == 6
    assert told["read"] == len(GOOD) + len(BAD) + 1
    assert told["dropped"] == REASONS | {"longer than data.max_prompt_tokens": 1}
