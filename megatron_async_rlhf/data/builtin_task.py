"""The built-in task: short tasks on random words with automatic checks.

The words are random letters, so nothing can be answered from memory and a byte-level model of a few million
parameters can learn every kind. A hash of its text decides which split an instruction belongs to; the splits are
therefore disjoint whatever the seeds and sizes.
"""

import hashlib
from collections.abc import Callable
from random import Random
from typing import Literal

from megatron_async_rlhf.data.conversation import one_turn
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.errors import DataError

# The kind with the fewest different instructions (`upper`) still has its share of this many in either split.
MAX_EXAMPLES = 10_000

_EVAL_ONE_IN = 8
_VOWELS = "aeiou"
_CONSONANTS = "bdfgklmnprst"


def make_examples(seed: int, count: int, split: Literal["train", "eval"]) -> list[Example]:
    """The first `count` examples of a split: no text twice, kinds in turn, a shorter list is a prefix of a longer one.

    Raises:
        DataError: more than `MAX_EXAMPLES` were asked for.
    """
    if count > MAX_EXAMPLES:
        raise DataError(f"the built-in task makes at most {MAX_EXAMPLES} prompts, {count} were asked for; ask for less")
    # A string seed goes through SHA-512 and is the same in every process, unlike `hash()`.
    rng = Random(f"builtin/{split}/{seed}")
    makers = list(_MAKERS.items())
    examples: list[Example] = []
    seen: set[str] = set()
    while len(examples) < count:
        kind, make = makers[len(examples) % len(makers)]
        example = make(rng, kind)
        if example.text not in seen and split_of(example.text) == split:
            seen.add(example.text)
            examples.append(example)
    return examples


def split_of(text: str) -> Literal["train", "eval"]:
    """The split an instruction belongs to, for every seed; one in eight is for evaluation."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return "eval" if int.from_bytes(digest, "big") % _EVAL_ONE_IN == 0 else "train"


def _word(rng: Random) -> str:
    return _letters(rng, rng.randint(3, 4))


def _letters(rng: Random, length: int) -> str:
    """Consonants and vowels in turn, starting with either: easier to spell than any letters, as hard to guess."""
    start = rng.randint(0, 1)
    return "".join(rng.choice(_CONSONANTS if (start + i) % 2 else _VOWELS) for i in range(length))


def _one_answer(kind: str, text: str, answer: str) -> Example:
    return Example(messages=one_turn(text), reference={"kind": kind, "answer": answer}, solution=answer)


def _open(kind: str, text: str, solution: str, **facts: object) -> Example:
    """An instruction with many right answers: `facts` is what a right one has to fulfil."""
    return Example(messages=one_turn(text), reference={"kind": kind, **facts}, solution=solution)


def _reverse(rng: Random, kind: str) -> Example:
    word = _word(rng)
    return _one_answer(kind, f"Reverse {word}.", word[::-1])


def _sort(rng: Random, kind: str) -> Example:
    word = _word(rng)
    return _one_answer(kind, f"Sort the letters of {word}.", "".join(sorted(word)))


def _repeat(rng: Random, kind: str) -> Example:
    word, times = _word(rng), rng.randint(2, 3)
    return _one_answer(kind, f"Write {word} {times} times.", " ".join([word] * times))


def _upper(rng: Random, kind: str) -> Example:
    word = _word(rng)
    return _one_answer(kind, f"Write {word} in capitals.", word.upper())


def _count(rng: Random, kind: str) -> Example:
    word = _letters(rng, rng.randint(3, 7))
    return _one_answer(kind, f"Count the letters of {word}.", str(len(word)))


def _pick(rng: Random, kind: str) -> Example:
    word = _word(rng)
    place = rng.randint(1, len(word))
    return _one_answer(kind, f"Write letter {place} of {word}.", word[place - 1])


def _add(rng: Random, kind: str) -> Example:
    left, right = rng.randint(0, 199), rng.randint(0, 199)
    return _one_answer(kind, f"Add {left} and {right}.", str(left + right))


def _end_with(rng: Random, kind: str) -> Example:
    word = _word(rng)
    return _open(kind, f"Write 3 words, the last one {word}.", f"{_word(rng)} {_word(rng)} {word}", word=word)


def _start_with(rng: Random, kind: str) -> Example:
    start = _word(rng)
    solution = start + _letters(rng, rng.randint(1, 3))
    return _open(kind, f"Write a word starting with {start}.", solution, word=start)


def _ending_in(rng: Random, kind: str) -> Example:
    end = _letters(rng, rng.randint(2, 5))
    solution = _letters(rng, rng.randint(1, 4)) + end
    return _open(kind, f"Write a word ending in {end}.", solution, word=end)


def _some_words(rng: Random, kind: str) -> Example:
    count, first = rng.randint(2, 4), _word(rng)
    words = [first, *(_letters(rng, 3) for _ in range(count - 1))]
    return _open(kind, f"Write {count} words, the first one {first}.", " ".join(words), count=count, word=first)


_MAKERS: dict[str, Callable[[Random, str], Example]] = {
    "reverse": _reverse,
    "sort": _sort,
    "repeat": _repeat,
    "upper": _upper,
    "count": _count,
    "pick": _pick,
    "add": _add,
    "end_with": _end_with,
    "start_with": _start_with,
    "ending_in": _ending_in,
    "some_words": _some_words,
}

KINDS = tuple(_MAKERS)
