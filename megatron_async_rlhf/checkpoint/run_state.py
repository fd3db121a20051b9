"""The controller's part of a checkpoint: what it continues from beside the learner's state. No torch."""

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.scheduler.state import ControllerState
from megatron_async_rlhf.telemetry.files import RUN_STATE
from megatron_async_rlhf.telemetry.summary import RunTotals

_FORMAT = 3


class RunState(Struct, frozen=True, kw_only=True):
    """A run after an optimizer step, seen from the controller.

    Attributes:
        totals: what the run had done, pushes and staleness included.
        metric: what `scores` are of: `checkpoint.keep_best`.
        scores: of the checkpoints so far, by policy version.
    """

    controller: ControllerState
    totals: RunTotals
    metric: str | None
    scores: dict[int, float]
    format: int = _FORMAT


encode_run_state = msgspec.msgpack.Encoder().encode


def read_run_state(checkpoint: Path) -> RunState:
    """
    Raises:
        CheckpointError: one line; the file is missing, broken, or was written by another release.
    """
    path = checkpoint / RUN_STATE
    try:
        state = msgspec.convert(_upgraded(msgspec.msgpack.decode(path.read_bytes())), RunState, dec_hook=_decode)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path} is broken or from another release ({error})") from None
    if state.format != _FORMAT:
        raise CheckpointError(f"{path} is from another release (format {state.format}, not {_FORMAT})")
    controller = state.controller
    groups = [*(group.index for group in controller.ready), *controller.unfinished]
    if len(set(groups)) < len(groups) or any(not 0 <= index < controller.admitted for index in groups):
        raise CheckpointError(f"{path} is broken: its groups do not add up")
    return state


def _upgraded(state: Any) -> Any:
    """What version 0.1.0 wrote, format 2, in today's names."""
    if (
        isinstance(state, dict)
        and state.get("format") == 2
        and "samples_dropped" in (totals := state.get("totals", {}))
    ):
        totals = totals | {"samples_not_selected": totals["samples_dropped"]}
        return state | {"totals": totals, "format": _FORMAT}
    return state


def _decode(kind: type, value: Any) -> Any:
    if kind is Counter:
        return Counter(value)
    raise NotImplementedError(kind)
