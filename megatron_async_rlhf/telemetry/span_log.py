"""The spans of an unfinished run, in a file: those of many hours are too many to keep in memory until the timeline is written."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from megatron_async_rlhf.telemetry.files import writing
from megatron_async_rlhf.types import Span

_LENGTH_BYTES = 4


class SpanLog:
    """In the order in which they were added; the file is begun anew."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            WriteError: the file cannot be made.
        """
        self._path = path
        self._encoder = msgspec.msgpack.Encoder()
        with writing(path):
            self._file = path.open("w+b")

    def add(self, spans: Iterable[Span]) -> None:
        """
        Raises:
            WriteError: the file cannot be written.
        """
        with writing(self._path):
            for span in spans:
                content = self._encoder.encode(span)
                self._file.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)

    def read(self) -> list[Span]:
        """All of them. Raises OSError."""
        self._file.flush()
        self._file.seek(0)
        decoder, spans = msgspec.msgpack.Decoder(Span), []
        while length := self._file.read(_LENGTH_BYTES):
            spans.append(decoder.decode(self._file.read(int.from_bytes(length, "little"))))
        return spans

    def close(self) -> None:
        """Delete the file. Raises OSError."""
        try:
            self._file.close()
        finally:
            self._path.unlink(missing_ok=True)
