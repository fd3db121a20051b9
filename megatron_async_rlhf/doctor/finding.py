"""One line of what `async-rlhf doctor` says."""

from typing import Literal

from msgspec import Struct


class Finding(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        state: `broken` ends with exit code 1: nothing runs without it. `missing` costs a feature.
        remedy: how to get it; empty if there is nothing to do.
    """

    what: str
    state: Literal["ok", "missing", "broken"]
    detail: str
    remedy: str = ""
