"""What an evaluation has already: a file of lines for each thing that is asked, a line as soon as a prompt's is complete."""

import json
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.json_lines import read_json_lines
from megatron_async_rlhf.telemetry.files import replace_file, writing

T = TypeVar("T")


class KeptAnswers(Generic[T]):
    """By the index of the prompt that they belong to.

    Attributes:
        found: what is there, read and added.
    """

    def __init__(self, path: Path, kind: Any) -> None:
        """
        Args:
            kind: type of what belongs to one prompt.

        Raises:
            DataError: a line that no evaluation wrote, other than the last one, which a kill cuts off.
            WriteError: the file cannot be written.
        """
        self._path = path
        self.found: dict[int, T] = {}
        whole = []
        for line in read_json_lines(path, may_be_cut=True) if path.exists() else ():
            try:
                self.found[line.record["prompt"]] = msgspec.convert(line.record["value"], kind)
            except (KeyError, TypeError, msgspec.ValidationError) as error:
                raise DataError(f"{path}:{line.number}: no evaluation wrote this line ({error}); remove it") from None
            whole.append(line.raw + b"\n")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, b"".join(whole))  # without half a line, which the next would be added to
            self._file = path.open("a", buffering=1, encoding="utf-8")

    def add(self, index: int, value: T) -> None:
        """
        Raises:
            WriteError: the file cannot be written.
        """
        line = json.dumps({"prompt": index, "value": msgspec.to_builtins(value)}, ensure_ascii=False)
        with writing(self._path):
            self._file.write(line + "\n")
        self.found[index] = value

    def close(self) -> None:
        self._file.close()
