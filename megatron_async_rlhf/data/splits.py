"""What is trained on and what is held out: no prompt is in both, for examples and for pairs alike."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Literal, Protocol, TypeVar

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.data.report import DataReport
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Message

BUILTIN = "builtin"
Split = Literal["train", "eval"]


class _Prompted(Protocol):
    @property
    def messages(self) -> list[Message]: ...


_Item = TypeVar("_Item", bound=_Prompted)
# Reads all that the split's own source has, and counts it.
Read = Callable[[Split, DataReport], list[_Item]]


def split_of(data: DataSection, split: Split, seed: int, read: Read[_Item], report: DataReport) -> list[_Item]:
    """The items of one split, in the order of their source.

    Without `data.eval` a seeded draw of `eval_prompts` is held out of `data.train`, with it whatever it contains is
    removed from train. The records of a source are counted in `report` once, though each split reads it.

    Raises:
        DataError: a source is too small.
    """
    if split == "eval":
        if _is_held_out(data):
            held_out = _hold_out(data, seed, read("train", DataReport()))
            report.used += len(held_out)  # they are read for training
            return held_out
        everything = _enough(data, read("eval", report))
        report.drop("beyond data.eval_prompts", len(everything) - data.eval_prompts)
        return everything[: data.eval_prompts]
    everything = read("train", report)
    held_out = _hold_out(data, seed, everything) if _is_held_out(data) else _enough(data, read("eval", DataReport()))
    reserved = {_key(item) for item in held_out}
    items = [item for item in everything if _key(item) not in reserved]
    if not items:
        raise DataError(
            f"data.train = {data.train}: all its prompts are used for evaluation; give more, or another data.eval"
        )
    if _is_held_out(data):
        report.used -= len(held_out)  # until they are asked for
        report.drop("the same prompt as a held-out one", len(everything) - len(items) - len(held_out))
    else:
        report.drop("the same prompt as a held-out one", len(everything) - len(items))
    chosen = items[: data.train_prompts]
    report.drop("beyond data.train_prompts", len(items) - len(chosen))
    return chosen


def _is_held_out(data: DataSection) -> bool:
    return data.eval is None and data.train != BUILTIN


def _enough(data: DataSection, items: list[_Item]) -> list[_Item]:
    if len(items) < data.eval_prompts:
        raise DataError(
            f"data.eval = {data.eval}: has {len(items)} prompts, fewer than data.eval_prompts ="
            f" {data.eval_prompts}; lower that or give more"
        )
    return items


def _hold_out(data: DataSection, seed: int, everything: Sequence[_Item]) -> list[_Item]:
    different = list({_key(item): item for item in everything}.values())
    if len(different) <= data.eval_prompts:
        raise DataError(
            f"data.train = {data.train}: holding out data.eval_prompts = {data.eval_prompts} of its {len(different)}"
            " different prompts leaves none to train on; lower data.eval_prompts or give data.eval"
        )
    chosen = Random(f"hold-out/{seed}").sample(range(len(different)), data.eval_prompts)
    return [different[index] for index in sorted(chosen)]


def _key(item: _Prompted) -> tuple[tuple[str, str], ...]:
    """What makes two prompts the same."""
    return tuple((message.role, message.content.strip()) for message in item.messages)
