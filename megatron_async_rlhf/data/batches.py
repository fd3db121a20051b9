"""Which rows each optimizer step of supervised fine-tuning is made of. Plain integers."""

from collections.abc import Iterator, Sequence
from itertools import count, islice

from megatron_async_rlhf.config.sft import BATCH_SIZE, SFTSection
from megatron_async_rlhf.data.prompts import PromptOrder


def plan_batches(lengths: Sequence[int], keys: SFTSection, seed: int) -> list[list[int]]:
    """Indices of rows by step, the same for the same input. Each epoch has every row once, in an order of its own.

    With `steps` all steps are full; with `epochs` the last one has what is left.

    Args:
        lengths: tokens of each row.
    """
    order = PromptOrder(range(len(lengths)), seed)
    endless = keys.steps is not None
    positions = count() if endless else range((keys.epochs or 1) * len(lengths))
    batches = _cut((order.at(position) for position in positions), lengths, keys)
    return list(islice(batches, keys.steps))


def _cut(rows: Iterator[int], lengths: Sequence[int], keys: SFTSection) -> Iterator[list[int]]:
    """A row that is longer than `batch_tokens` is a step by itself."""
    batch: list[int] = []
    tokens = 0
    for row in rows:
        if keys.batch_tokens is not None:
            is_full = bool(batch) and tokens + lengths[row] > keys.batch_tokens
        else:
            is_full = len(batch) == (keys.batch_size or BATCH_SIZE)
        if is_full:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += lengths[row]
    if batch:
        yield batch
