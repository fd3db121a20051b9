"""Every key with values of every kind: what is refused is refused in lines that a person can read."""

import re

from megatron_async_rlhf.config.algorithms import SECTIONS
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.schema import is_section, types_at
from megatron_async_rlhf.errors import ConfigError

VALUES = (
    "null", "true", "[]", "{}", "[1]", "{a: 1}", "''", "x", "-1", "0", "1e400", ".nan", "'a\\nb'", "2026-11-26", "2.5",
    "{a: {b: [c]}}", "99999999999999999999999999", "{type: ppo}", "[null]", "{a: null}",
)  # fmt: skip
JARGON = re.compile(
    r"valid dictionary|instance of|Keys\b|Section\b|[Ii]nput should|Value error|\[type=|further information|tag:yaml|<class|"
    r"\bNoneType\b|\bTrue\b|\bFalse\b|\bNone\b"
)
REPEATED = re.compile(r"\b([\w.]+): \1\b")


def keys_below(location: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every section and key."""
    sections = [kind for kind in types_at(location) if is_section(kind)]
    names = dict.fromkeys(name for section in sections for name in section.model_fields)
    return [key for name in names for key in ((*location, name), *keys_below((*location, name)))]


def test_all_keys_are_found():
    keys = {".".join(key) for key in keys_below()}
    assert {"learner", "learner.fp8.recipe", "launch.slurm.time", "algorithm.kl.coefficient", "sweep.axes"} <= keys
    assert {f"algorithm.{name}" for section in SECTIONS.values() for name in section.model_fields} <= keys
    assert set(RunConfig.model_fields) <= keys


def test_no_value_of_any_key_gives_another_error_or_an_unreadable_line(tmp_path, load):
    load()
    refused, unreadable = 0, []
    for key in map(".".join, keys_below()):
        for value in VALUES:
            try:
                load_config(tmp_path / "config.yaml", [f"{key}={value}"])
            except ConfigError as error:
                refused += 1
                for line in str(error).split("\n"):
                    names_it = key.split(".")[0] in line and len(line) < 700
                    if not names_it or JARGON.search(line) or REPEATED.search(line) or len(line.splitlines()) != 1:
                        unreadable.append(f"{key}={value}: {line}")
    assert unreadable == []
    assert refused > 2000
