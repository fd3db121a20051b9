"""Preference pairs as training rows: each side is all that the chat template writes, as a served reward model is given it."""

from collections.abc import Sequence as Seq

from msgspec import Struct

from megatron_async_rlhf.data.pairs import PreferencePair
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Message, TokenizedPair


class PairRows(Struct, frozen=True, kw_only=True):
    """The pairs that fit, and how many do not."""

    rows: list[TokenizedPair]
    too_long: int


def tokenize_pairs(
    pairs: Seq[PreferencePair], tokenizer: Tokenizer, max_tokens: int, *, margin: bool, drop_long: bool = False
) -> PairRows:
    """
    Args:
        max_tokens: of either side; none is cut, because it would lose the token whose reward is read.
        margin: every pair must have one.

    Raises:
        DataError: a pair lacks its margin; one is longer and `drop_long` is off, naming the first; or all are longer.
    """
    rows: list[TokenizedPair] = []
    long: list[tuple[PreferencePair, int]] = []
    for pair in pairs:
        if margin and pair.margin is None:
            raise DataError(
                f"{pair.origin}: the pair has no margin, which reward_model.margin = true needs; set data.margin_field to a "
                "column with a number, or reward_model.margin = false"
            )
        chosen, rejected = (_answered(pair, answer, tokenizer) for answer in (pair.chosen, pair.rejected))
        longest = max(len(chosen), len(rejected))
        if longest > max_tokens:
            long.append((pair, longest))
        else:
            rows.append(TokenizedPair(chosen=chosen, rejected=rejected, margin=pair.margin or 0.0))
    if long and not (drop_long and rows):
        pair, length = long[0] if rows else min(long, key=lambda each: each[1])
        which = "the first" if rows else "the shortest"
        raise DataError(
            f"{pair.origin}: the longer side of the pair has {length} tokens, above the limit of {max_tokens}, {which} of "
            f"{len(long)} such pairs{'' if rows else ', which are all'}; raise reward_model.max_tokens or "
            f"model.context_length{', or set data.long_prompts = drop' if rows else ''}"
        )
    return PairRows(rows=rows, too_long=len(long))


def _answered(pair: PreferencePair, answer: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.render_conversation([*pair.messages, Message("assistant", answer)])
