"""A stage of supervised fine-tuning continues with the rows that it began with."""

from pathlib import Path

import pytest
from msgspec.structs import replace
from small_config import small_config

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.input_digests import digest_rows, write_input_digests
from megatron_async_rlhf.launch.supervised_digests import SupervisedDigests, check_same_rows
from megatron_async_rlhf.types import Sequence

ROWS = [Sequence(token_ids=[1, 2, 3], prompt_length=1), Sequence(token_ids=[4, 5, 6, 7], prompt_length=2)]


def digests(train: list[Sequence], held_out: list[Sequence]) -> SupervisedDigests:
    return SupervisedDigests(train=digest_rows(train), held_out=digest_rows(held_out))


def test_other_rows_or_another_order_are_refused(tmp_path: Path):
    config = small_config(tmp_path, 0)
    begun = digests(ROWS, ROWS[:1])
    check_same_rows(config, begun)  # nothing was noted
    write_input_digests(tmp_path, begun)
    check_same_rows(config, begun)
    with pytest.raises(ConfigError, match="^data.train = builtin: its conversations.*start again without --resume$"):
        check_same_rows(config, digests(ROWS[::-1], ROWS[:1]))
    with pytest.raises(ConfigError, match="^data.eval = "):
        check_same_rows(config, digests(ROWS, ROWS[1:]))
    with pytest.raises(ConfigError, match="^model.hf = "):
        check_same_rows(config, replace(begun, weights="other"))
    targets = [Sequence(token_ids=[1, 2, 3], prompt_length=2), ROWS[1]]
    assert digest_rows(targets) != digest_rows(ROWS)
