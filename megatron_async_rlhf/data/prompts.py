"""Prompts, tokenized once, and the order in which a run draws them."""

from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Generic, TypeVar

from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Prompt


def build_prompts(
    examples: Sequence[Example], tokenizer: Tokenizer, max_prompt_tokens: int, *, drop_long: bool = False
) -> list[Prompt]:
    """Template and tokenize each example; `max_prompt_tokens` counts the template's own tokens.

    Raises:
        DataError: a prompt is longer and `drop_long` is off, naming the first; or every prompt is.
    """
    prompts: list[Prompt] = []
    too_long: list[Prompt] = []
    for index, example in enumerate(examples):
        prompt = Prompt(
            index=index,
            text=example.text,
            messages=example.messages,
            token_ids=tokenizer.render_prompt(example.messages),
            reference=example.reference,
            solution=example.solution,
            origin=example.origin,
        )
        (prompts if len(prompt.token_ids) <= max_prompt_tokens else too_long).append(prompt)
    if too_long and not drop_long:
        first = too_long[0]
        raise DataError(
            f"{first.name} has {len(first.token_ids)} tokens with the chat template, above the limit of"
            f" {max_prompt_tokens}, the first of {len(too_long)} such prompts; raise data.max_prompt_tokens,"
            " lower generator.max_new_tokens, raise model.context_length, or set data.long_prompts = drop"
        )
    if not prompts:
        raise DataError(
            f"all {len(examples)} prompts are longer than the limit of {max_prompt_tokens} tokens; raise"
            " data.max_prompt_tokens or lower generator.max_new_tokens"
        )
    return prompts


_Item = TypeVar("_Item")


class PromptOrder(Generic[_Item]):
    """The prompts in an endless sequence of epochs, each a shuffle of its own.

    What a step gets depends on the seed, the step and the batch size only, so a resumed run needs no state from here.
    """

    def __init__(self, prompts: Sequence[_Item], seed: int) -> None:
        """Raises DataError if there are no prompts."""
        if not prompts:
            raise DataError("there are no prompts to draw from; give data.train at least one")
        self._prompts = prompts
        self._seed = seed

    def batch(self, step: int, size: int) -> list[_Item]:
        """The prompts of a step, counted from 0, [size].

        Batches of one size follow each other without a gap, so each epoch has every prompt exactly once. A batch that
        spans two epochs may hold a prompt twice.
        """
        if step < 0 or size < 1:
            raise ValueError(f"no batch of {size} prompts at step {step}: size starts at 1, step at 0")
        return [self.at(position) for position in range(step * size, (step + 1) * size)]

    def at(self, position: int) -> _Item:
        """One prompt of the sequence, counted from 0."""
        epoch, place = divmod(position, len(self._prompts))
        return self._prompts[_shuffle(self._seed, epoch, len(self._prompts))[place]]


@lru_cache(maxsize=4)  # steps go forward: this epoch and the next are in use, of the train and the eval prompts
def _shuffle(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    # A string seed goes through SHA-512: (seed 1, epoch 0) has nothing in common with (seed 0, epoch 1).
    Random(f"order/{seed}/{epoch}").shuffle(order)
    return tuple(order)
