"""Digests of files: every damage is found, and named."""

import os
import random
import shutil
from pathlib import Path

import pytest

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.directory import new_directory
from megatron_async_rlhf.formats.file_digests import (
    DIGESTS,
    check_digests,
    digest_file,
    read_digests,
    write_digests,
)

DAMAGES = 1000


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A directory like a checkpoint's, with files of many sizes."""
    dice, directory = random.Random(0), tmp_path / "checkpoint"
    (directory / "hf").mkdir(parents=True)
    for name, size in (
        ("__0_0.distcp", 20_000),
        ("__1_0.distcp", 1),
        (".metadata", 900),
        ("hf/config.json", 300),
        ("empty", 0),
    ):
        (directory / name).write_bytes(dice.randbytes(size))
    write_digests(directory)
    return directory


def test_what_was_written_is_found_whole(written: Path):
    assert check_digests(written) == 20_000 + 1 + 900 + 300
    assert set(read_digests(written) or {}) == {"__0_0.distcp", "__1_0.distcp", ".metadata", "hf/config.json", "empty"}


def test_every_flipped_bit_and_every_lost_end_is_found(written: Path, tmp_path: Path):
    dice = random.Random(1)
    files = [path for path in sorted(written.rglob("*")) if path.is_file() and path.stat().st_size]
    assert any(path.name == DIGESTS for path in files)
    for number in range(DAMAGES):
        damaged = tmp_path / "damaged"
        shutil.copytree(written, damaged)
        path = damaged / dice.choice(files).relative_to(written)
        size = path.stat().st_size
        if number % 4:
            content, place = bytearray(path.read_bytes()), dice.randrange(size)
            content[place] ^= 1 << dice.randrange(8)
            path.write_bytes(content)
        else:
            os.truncate(path, dice.randrange(size))
        with pytest.raises(CheckpointError, match=str(damaged)) as found:
            check_digests(damaged)
        assert len(str(found.value).splitlines()) == 1
        shutil.rmtree(damaged)


def test_a_file_that_is_gone_or_new_is_found(written: Path):
    (written / "hf/new").write_text("x")
    with pytest.raises(CheckpointError, match="hf/new was not there when the checkpoint was written"):
        check_digests(written)
    (written / "hf/new").unlink()
    (written / "empty").unlink()
    with pytest.raises(CheckpointError, match="empty is missing"):
        check_digests(written)


def test_what_others_have_hashed_is_taken_as_it_is(written: Path):
    known = {"__0_0.distcp": digest_file(written / ".metadata")}
    write_digests(written, known=known)
    with pytest.raises(CheckpointError, match="__0_0.distcp has 20000 bytes, and not the 900 that were written"):
        check_digests(written)


def test_without_digests_there_is_nothing_to_compare(tmp_path: Path):
    assert check_digests(tmp_path) == 0 and read_digests(tmp_path) is None


def test_what_a_killed_conversion_has_left_stops_no_other_one(tmp_path: Path):
    """In containers processes have the same number each time."""
    (tmp_path / f"out.{os.getpid()}.partial").mkdir()
    (tmp_path / f"out.{os.getpid()}.partial/weights").touch()
    with new_directory(tmp_path / "out") as directory:
        (directory / "weights").touch()
    assert (tmp_path / "out/weights").is_file()
