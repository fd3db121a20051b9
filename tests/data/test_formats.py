"""The same records in every form that a source may have, and files that are not what their names say."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.data.source import load_examples
from megatron_async_rlhf.errors import DataError

RECORDS = [
    {"prompt": 'She said "hi", twice.\nAnd left.', "answer": "42"},
    {"prompt": "Größe 😀", "answer": "NA"},
    {"prompt": "x", "answer": ""},
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
CSV = 'prompt,answer\n"She said ""hi"", twice.\nAnd left.",42\nGröße 😀,NA\nx,\n'


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def use_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For copies that the `datasets` library makes."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)


def section(source: str, **keys: object) -> DataSection:
    return DataSection(train=source, eval="builtin", prompt_field="prompt", solution_field="answer", **keys)


def examples_of(source: str) -> list[tuple[str, str | None]]:
    return [(example.text, example.solution) for example in load_examples(section(source), "train", 0)]


def origins_of(source: str) -> list[str]:
    return [example.origin for example in load_examples(section(source), "train", 0)]


def refusal_of(source: str) -> str:
    with pytest.raises(DataError) as error:
        load_examples(section(source), "train", 0)
    assert "\n" not in str(error.value)
    return str(error.value)


def parquet(path: str, records: list[dict]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(records), path)


def saved(path: str, parts: dict[str, list[dict]] | list[dict]) -> None:
    import datasets

    if isinstance(parts, list):
        datasets.Dataset.from_list(parts).save_to_disk(path)
    else:
        whole = {name: datasets.Dataset.from_list(records) for name, records in parts.items()}
        datasets.DatasetDict(whole).save_to_disk(path)


WRITTEN = {
    "a.jsonl": lambda: Path("a.jsonl").write_text(LINES),
    "a.ndjson": lambda: Path("a.ndjson").write_text(LINES),
    "A.JSONL": lambda: Path("A.JSONL").write_text(LINES),
    "a.jsonl.gz": lambda: Path("a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())),
    "a.json": lambda: Path("a.json").write_text(json.dumps(RECORDS, indent=2)),
    "bom.json": lambda: Path("bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(RECORDS).encode()),
    "data.json": lambda: Path("data.json").write_text(json.dumps({"version": 1, "data": RECORDS})),
    "parts.json": lambda: Path("parts.json").write_text(json.dumps({"train": RECORDS, "test": RECORDS[:1]})),
    "a.json.gz": lambda: Path("a.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode())),
    "lines.json": lambda: Path("lines.json").write_text(LINES),  # as the library writes and reads them
    "a.csv": lambda: Path("a.csv").write_text(CSV),
    "a.parquet": lambda: parquet("a.parquet", RECORDS),
    "saved": lambda: saved("saved", RECORDS),
    "parts": lambda: saved("parts", {"train": RECORDS, "test": RECORDS[:1]}),
    "hf:parts:train": lambda: saved("parts", {"train": RECORDS, "test": RECORDS[:1]}),
}


@pytest.mark.parametrize("source", WRITTEN)
def test_the_same_records_come_of_every_form(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_cache(tmp_path / "cache", monkeypatch)
    WRITTEN[source]()
    assert examples_of(source) == [(record["prompt"], record["answer"] or None) for record in RECORDS]


def test_files_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_cache(tmp_path / "cache", monkeypatch)
    os.mkdir("folder")
    parquet("folder/train-00000-of-00001.parquet", RECORDS[:1])
    parquet("folder/test-00000-of-00001.parquet", RECORDS[1:])
    data = DataSection(train="folder", eval="folder", eval_prompts=2, solution_field="answer")
    assert [example.text for example in load_examples(data, "train", 0)] == [RECORDS[0]["prompt"]]
    assert [example.text for example in load_examples(data, "eval", 0)] == [r["prompt"] for r in RECORDS[1:]]


@pytest.mark.parametrize(
    ("source", "places"),
    [
        ("a.jsonl", ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]),
        ("a.jsonl.gz", ["a.jsonl.gz:1", "a.jsonl.gz:2", "a.jsonl.gz:3"]),
        ("a.json", ["a.json record 1", "a.json record 2", "a.json record 3"]),
        ("parts.json", ["parts.json train record 1", "parts.json train record 2", "parts.json train record 3"]),
        ("a.csv", ["a.csv row 0", "a.csv row 1", "a.csv row 2"]),
        ("a.parquet", ["a.parquet row 0", "a.parquet row 1", "a.parquet row 2"]),
        ("parts", ["parts row 0", "parts row 1", "parts row 2"]),
    ],
)
def test_every_example_knows_where_it_comes_from(source: str, places: list[str]):
    WRITTEN[source]()
    assert origins_of(source) == places


def test_a_file_read_by_its_path_leaves_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_cache(tmp_path / "cache", monkeypatch)
    for source in ("a.csv", "a.parquet"):
        WRITTEN[source]()
        examples_of(source)
    copies = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert copies == []


def test_tab_separated_and_plain_text():
    Path("a.tsv").write_text("prompt\tanswer\na, b\tc\n")
    assert examples_of("a.tsv") == [("a, b", "c")]
    Path("a.txt").write_text("first\nsecond\n")
    data = DataSection(train="a.txt", eval="builtin")
    assert [example.text for example in load_examples(data, "train", 0)] == ["first", "second"]


MISLABELLED = [
    ("a.jsonl", gzip.compress(LINES.encode()), "is compressed with gzip; unpack it with gunzip"),
    ("a.jsonl.gz", LINES.encode(), "is not compressed with gzip; rename it to a.jsonl"),
    ("a.jsonl.gz", gzip.compress(LINES.encode())[:-12], "cannot be unpacked"),
    ("a.jsonl", b"PAR1", "is a Parquet file"),
    ("a.jsonl", b"<!DOCTYPE html><html>", "is a web page"),
    ("a.parquet", LINES.encode(), "is no Parquet file"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    ("a.parquet", b"PAR1" + b"x" * 100, "a.parquet: datasets cannot"),
    ("a.csv", b"PK\x03\x04", "is a zip archive"),
    ("a.csv", b"\xff\xfep\0", "is UTF-16 text"),
    ("a.csv", b"prompt,prompt\na,b\n", "column 'prompt' is there twice"),
    ("a.csv", b"prompt,answer\n\xff,b\n", "save it as UTF-8"),
    ("a.csv", b"prompt,answer\na,b\nc,d,e\n", "a.csv: datasets cannot"),
    ("a.csv", b"", "a.csv:1: there are no names of columns"),
    ("a.csv", b"prompt,answer\n", "has no prompts"),
    ("a.json", b"", "a.json:1: not JSON"),
    ("a.json", b'[{"prompt": "a"},\n{"prompt"', "a.json:2: not JSON"),
    ("a.json", b'"text"', "holds a string, not a list of records"),
    ("a.json", b"[]", "has no prompts"),
    ("a.json", b'{"prompt": ["a"], "answer": ["b"]}', "whose fields ('prompt', 'answer') are no lists of records"),
    ("a.json", b'[{"prompt": "a", "answer": "b"}, 3]', "a.json record 2: a number, not an object"),
    ("a.json", b'{"a": [{"prompt": "x"}], "b": [{"prompt": "y"}]}', "has the parts a, b"),
    ("a.json", b"\xff", "a.json:1: not UTF-8"),
    ("a.jsonl.zst", b"", "is compressed; unpack it with unzstd, and give a.jsonl"),
    ("a.parquet.gz", b"", "is compressed; unpack it with gunzip, and give a.parquet"),
    ("a.xlsx", b"", "its name does not say how to read it"),
]


@pytest.mark.parametrize(("name", "content", "said"), MISLABELLED, ids=[f"{m[0]} {m[2][:30]}" for m in MISLABELLED])
def test_a_file_that_is_not_what_its_name_says(name: str, content: bytes, said: str):
    Path(name).write_bytes(content)
    line = refusal_of(name)
    assert said in line and name in line


def test_a_directory_of_which_no_part_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_cache(tmp_path / "cache", monkeypatch)
    saved("ultra", {"train_prefs": RECORDS, "test_prefs": RECORDS})
    assert "has the parts train_prefs, test_prefs; write hf:ultra:<part>" in refusal_of("ultra")
    assert examples_of("hf:ultra:train_prefs") == [(record["prompt"], record["answer"] or None) for record in RECORDS]
    assert "no part 'train', only train_prefs, test_prefs" in refusal_of("hf:ultra:train")
    os.mkdir("empty")
    assert "datasets cannot load it" in refusal_of("empty")


def test_what_lies_beside_the_training_data(tmp_path: Path):
    os.mkdir("data")
    for name in ("train", "test"):
        Path(f"data/{name}.csv").write_text(f"prompt,answer\n{name},a\n")
    data = DataSection(train="data/train.csv", eval="test.csv", eval_prompts=1, solution_field="answer")
    assert [example.text for example in load_examples(data, "eval", 0)] == ["test"]


@pytest.mark.parametrize("source", ["a.csv", "a.parquet", "hf:org/data:train"])
def test_without_the_library_what_it_reads_is_refused_and_the_rest_is_not(source: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.csv", "a.parquet", "a.jsonl", "a.json"):
        WRITTEN[name]()
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import fails
    assert "datasets is not installed, which reads it; install `datasets`" in refusal_of(source)
    assert len(examples_of("a.jsonl")) == len(examples_of("a.json")) == len(RECORDS)
