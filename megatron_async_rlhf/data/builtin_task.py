"""The built-in task: small instructions on random words whose answers a program can check.

The words are random letters, so nothing can be answered from memory and a byte-level model of a few million
parameters can learn every kind. A hash of its text decides which split an instruction belongs to; the splits are
therefore disjoint whatever the seeds and sizes.
"""

import hashlib
import string
from collections.abc import Callable
from random import Random
from typing import Literal

from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.errors import DataError

# The kind with the fewest different instructions (`add`) still has several times its share of this many.
MAX_EXAMPLES = 1_000_000

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
    return _letters(rng, rng.randint(3, 5))


def _letters(rng: Random, length: int) -> str:
    """Consonants and vowels in turn, starting with either: easier to spell than any letters, as hard to guess."""
    start = rng.randint(0, 1)
    return "".join(rng.choice(_CONSONANTS if (start + i) % 2 else _VOWELS) for i in range(length))


def _one_answer(kind: str, text: str, answer: str) -> Example:
    return Example(text=text, reference={"kind": kind, "answer": answer}, solution=answer)


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
    word = _word(rng)
    return _one_answer(kind, f"Count the letters of {word}.", str(len(word)))


def _pick(rng: Random, kind: str) -> Example:
    word = _word(rng)
    place = rng.randint(1, len(word))
    return _one_answer(kind, f"Write letter {place} of {word}.", word[place - 1])


def _add(rng: Random, kind: str) -> Example:
    left, right = rng.randint(0, 99), rng.randint(0, 99)
    return _one_answer(kind, f"Add {left} and {right}.", str(left + right))


def _drop_vowels(rng: Random, kind: str) -> Example:
    answer = ""
    while not answer:  # a word of vowels only would have an empty answer
        word = _word(rng)
        answer = "".join(letter for letter in word if letter not in _VOWELS)
    return _one_answer(kind, f"Drop the vowels of {word}.", answer)


def _double(rng: Random, kind: str) -> Example:
    word = _word(rng)
    return _one_answer(kind, f"Double each letter of {word}.", "".join(letter * 2 for letter in word))


def _initials(rng: Random, kind: str) -> Example:
    words = [_word(rng) for _ in range(3)]
    return _one_answer(kind, f"First letters of {' '.join(words)}.", "".join(word[0] for word in words))


def _swap(rng: Random, kind: str) -> Example:
    first, second = _word(rng), _word(rng)
    return _one_answer(kind, f"Swap {first} and {second}.", f"{second} {first}")


def _end_with(rng: Random, kind: str) -> Example:
    word = _word(rng)
    text = f"Write 3 words, the last one {word}."
    return Example(text=text, reference={"kind": kind, "word": word}, solution=f"{_word(rng)} {_word(rng)} {word}")


def _start_with(rng: Random, kind: str) -> Example:
    start = _word(rng)
    text = f"Write a word starting with {start}."
    solution = start + _letters(rng, rng.randint(1, 3))
    return Example(text=text, reference={"kind": kind, "word": start}, solution=solution)


_MAKERS: dict[str, Callable[[Random, str], Example]] = {
    "reverse": _reverse,
    "sort": _sort,
    "repeat": _repeat,
    "upper": _upper,
    "count": _count,
    "pick": _pick,
    "add": _add,
    "drop_vowels": _drop_vowels,
    "double": _double,
    "initials": _initials,
    "swap": _swap,
    "end_with": _end_with,
    "start_with": _start_with,
}

KINDS = tuple(_MAKERS)
