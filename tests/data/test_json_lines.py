"""JSON lines as people have them and as runs leave them."""

import json
from pathlib import Path

import pytest

from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.json_lines import read_json_lines
from megatron_async_rlhf.telemetry.files import read_lines

# All at which `str.splitlines` cuts, except for those that end a line.
SEPARATORS = ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e", "\r"]


def write(path: Path, records: list, end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode())
    return path


@pytest.mark.parametrize("separator", SEPARATORS, ids=repr)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=repr)
def test_only_a_line_feed_ends_a_line(tmp_path: Path, separator: str, end: str):
    records = [{"prompt": f"a{separator}b"}, {"prompt": separator}]
    path = write(tmp_path / "a.jsonl", records, end)
    assert [line.record for line in read_json_lines(path)] == records
    assert read_lines(path) == records


def test_lines_keep_their_numbers_and_bytes(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a":  "\xe2\x80\xa8"}\n\xef\xbb\xbf{"a": NaN}')
    lines = list(read_json_lines(path))
    assert [line.number for line in lines] == [1, 4, 5]
    assert lines[1].raw == b'{"a":  "\xe2\x80\xa8"}'


@pytest.mark.parametrize(
    "rest", ['{"step": 2, "rew', '{"step": 2, "text": "\u2028', "\0\0\0\0", '{"step"', "1"], ids=repr
)
def test_what_a_killed_process_left_is_no_line(tmp_path: Path, rest: str):
    path = write(tmp_path / "metrics.jsonl", [{"step": 0}, {"step": 1}])
    path.write_bytes(path.read_bytes() + rest.encode())
    assert read_lines(path) == [{"step": 0}, {"step": 1}]
    with pytest.raises(DataError, match=r"metrics\.jsonl:3: "):
        list(read_json_lines(path))


def test_a_whole_last_line_counts_without_its_end(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    assert read_lines(path) == [{"step": 0}, {"step": 1}]
    assert read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("line", ['{"step": 1, "rew', "\0\0\0", "[1]"], ids=repr)
def test_a_broken_line_before_others_is_named(tmp_path: Path, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_lines(path)


def test_a_field_twice_is_refused_in_the_row_itself(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": {"x": 1, "x": 2}}\n')
    assert [line.record for line in read_json_lines(path)] == [{"a": {"x": 2}}]  # nobody reads what is inside
    path.write_text('{"a": 1, "b": 2, "a": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'a' is there twice"):
        list(read_json_lines(path))
