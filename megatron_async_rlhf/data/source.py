"""Which examples a run trains and evaluates on: `data.train` and `data.eval` taken together."""

from random import Random
from typing import Literal

from msgspec.structs import replace

from megatron_async_rlhf.config.sections import DataSection
from megatron_async_rlhf.data.builtin_task import make_examples
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.hub import read_hub
from megatron_async_rlhf.data.jsonl import find_jsonl, read_jsonl
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Message

_BUILTIN = "builtin"
_BUILTIN_TRAIN_PROMPTS = 4096


def load_examples(data: DataSection, split: Literal["train", "eval"], seed: int) -> list[Example]:
    """The examples of one split, in the order of their source.

    No text is in both splits: without `data.eval` a seeded draw of `eval_prompts` is held out of `data.train`, with it
    whatever it contains is removed from train.

    Raises:
        DataError: a source that is missing, broken or too small.
    """
    if split == "eval":
        return _eval_examples(data, seed)[: data.eval_prompts]
    everything = _read(data, "train", seed)
    reserved = {_key(example) for example in _eval_examples(data, seed)}
    examples = [example for example in everything if _key(example) not in reserved]
    if not examples:
        raise DataError(
            f"data.train = {data.train}: all its prompts are used for evaluation; give more, or another data.eval"
        )
    return examples[: data.train_prompts]


def _eval_examples(data: DataSection, seed: int) -> list[Example]:
    """Everything set apart for evaluation, at least `eval_prompts` of it."""
    if data.eval is None and data.train != _BUILTIN:
        return _hold_out(data, seed)
    examples = _read(data, "eval", seed)
    if len(examples) < data.eval_prompts:
        raise DataError(
            f"data.eval = {data.eval}: has {len(examples)} prompts, fewer than data.eval_prompts ="
            f" {data.eval_prompts}; lower that or give more"
        )
    return examples


def _hold_out(data: DataSection, seed: int) -> list[Example]:
    different = list({_key(example): example for example in _read(data, "train", seed)}.values())
    if len(different) <= data.eval_prompts:
        raise DataError(
            f"data.train = {data.train}: holding out data.eval_prompts = {data.eval_prompts} of its {len(different)}"
            " different prompts leaves none to train on; lower data.eval_prompts or give data.eval"
        )
    chosen = Random(f"hold-out/{seed}").sample(range(len(different)), data.eval_prompts)
    return [different[index] for index in sorted(chosen)]


def _read(data: DataSection, split: Literal["train", "eval"], seed: int) -> list[Example]:
    """All that the split's own source has, with what the configuration adds to every conversation."""
    return [_completed(example, data) for example in _read_source(data, split, seed)]


def _completed(example: Example, data: DataSection) -> Example:
    messages = list(example.messages)
    if data.instruction is not None:
        last = messages.pop()
        messages.append(Message(last.role, f"{last.content}\n\n{data.instruction}"))
    if data.system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", data.system_prompt))
    return replace(example, messages=messages)


def _read_source(data: DataSection, split: Literal["train", "eval"], seed: int) -> list[Example]:
    source = data.train if split == "train" or data.eval is None else data.eval
    if source == _BUILTIN:
        count = data.eval_prompts if split == "eval" else data.train_prompts or _BUILTIN_TRAIN_PROMPTS
        return make_examples(seed, count, split)
    key = f"data.{split}"
    if source.startswith("hf:"):
        return read_hub(source, key, data)
    path = find_jsonl(source, key, beside=data.train if split == "eval" else None)
    return read_jsonl(path, key, data)


def _key(example: Example) -> tuple[tuple[str, str], ...]:
    """What makes two prompts the same."""
    return tuple((message.role, message.content.strip()) for message in example.messages)
