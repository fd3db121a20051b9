"""Which rows each optimizer step of a stage before RL is made of. Plain integers."""

from collections.abc import Iterator, Sequence
from itertools import count, islice

from megatron_async_rlhf.config.reward_modelling import RewardModellingSection
from megatron_async_rlhf.config.sft import BATCH_SIZE, SFTSection
from megatron_async_rlhf.data.prompts import PromptOrder


def plan_batches(lengths: Sequence[int], keys: SFTSection, seed: int) -> list[list[int]]:
    """Indices of rows by step, the same for the same input. Each epoch has every row once, in an order of its own.

    With `steps` all steps are full; with `epochs` the last one has what is left.

    Args:
        lengths: tokens of each row.
    """
    rows = _in_epochs(len(lengths), keys.steps, keys.epochs, seed)
    return list(islice(_cut(rows, lengths, keys.batch_size or BATCH_SIZE, keys.batch_tokens), keys.steps))


def plan_pair_batches(pairs: int, keys: RewardModellingSection, seed: int) -> list[list[int]]:
    """The same of a reward model's preference pairs, of which every step has a number."""
    rows = _in_epochs(pairs, keys.steps, keys.epochs, seed)
    return list(islice(_cut(rows, [1] * pairs, keys.batch_size, None), keys.steps))


def _in_epochs(rows: int, steps: int | None, epochs: int | None, seed: int) -> Iterator[int]:
    """Without end where steps are counted."""
    order = PromptOrder(range(rows), seed)
    return (order.at(position) for position in (count() if steps is not None else range((epochs or 1) * rows)))


def _cut(rows: Iterator[int], lengths: Sequence[int], size: int, most_tokens: int | None) -> Iterator[list[int]]:
    """Steps of `size` rows; or of as many as have `most_tokens`, a longer one by itself."""
    batch: list[int] = []
    tokens = 0
    for row in rows:
        if most_tokens is not None:
            is_full = bool(batch) and tokens + lengths[row] > most_tokens
        else:
            is_full = len(batch) == size
        if is_full:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += lengths[row]
    if batch:
        yield batch
