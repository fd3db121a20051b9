"""Makes this folder's chats.jsonl, prompts.jsonl and held_out.jsonl; they are kept here, so nobody has to run it.

    python examples/mini/make_data.py

Questions about animals, each with one right answer. The chats stand for what people write: a third of them right and plain, the others
hedged, rambling, or wrong. A policy that is fine-tuned on them answers as they do.
"""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

# What it says, eats, and lives in.
ANIMALS = {
    "bee": ("buzz", "nectar", "hive"),
    "cat": ("meow", "mice", "house"),
    "cow": ("moo", "grass", "barn"),
    "dog": ("woof", "bones", "kennel"),
    "duck": ("quack", "weed", "pond"),
    "frog": ("croak", "flies", "swamp"),
    "hen": ("cluck", "corn", "coop"),
    "horse": ("neigh", "hay", "stable"),
    "lion": ("roar", "zebras", "savanna"),
    "owl": ("hoot", "voles", "tree"),
    "pig": ("oink", "roots", "sty"),
    "wolf": ("howl", "deer", "forest"),
}
QUESTIONS = ("what does a {animal} say?", "what does a {animal} eat?", "where does a {animal} live?")
ANSWERS = ("A {animal} says {fact}.", "A {animal} eats {fact}.", "A {animal} lives in a {fact}.")
HEDGED = ("Maybe {fact}.", "Perhaps it is {fact}?", "I think {fact}, but I may be wrong.")
RAMBLED = (" Or so I heard.", " That is a good question.", " Who knows what else?")
NAMES = (
    "Ada Ben Cem Dot Eva Fay Gus Hal Ida Jim Kay Leo Mia Ned Oda Pat Quy Ria Sam Tia Udo Val Wim Xia Yan Zoe".split()
)
ASKED = ("{name} asks: {question}", "{name}: {question}")
HELD_OUT = 384


def plain_answer(animal: str, kind: int, fact: str) -> str:
    return ANSWERS[kind].format(animal=animal, fact=fact)


def demonstration(dice: random.Random, animal: str, kind: int) -> str:
    """What somebody answers."""
    fact = ANIMALS[animal][kind]
    plain = plain_answer(animal, kind, fact)
    quality = dice.random()
    if quality < 0.35:
        return plain
    if quality < 0.60:
        return dice.choice(HEDGED).format(fact=fact)
    if quality < 0.80:
        return plain + dice.choice(RAMBLED)
    wrong = dice.choice([other[kind] for name, other in ANIMALS.items() if name != animal])
    return plain_answer(animal, kind, wrong)


def main() -> None:
    dice = random.Random(0)
    examples = []  # a chat, and the same question with its right answer
    for asked, name, animal, kind in itertools.product(ASKED, NAMES, ANIMALS, range(len(QUESTIONS))):
        question = asked.format(name=name, question=QUESTIONS[kind].format(animal=animal))
        fact = ANIMALS[animal][kind]
        answered = demonstration(dice, animal, kind)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answered}]
        row = {"prompt": question, "answer": plain_answer(animal, kind, fact), "fact": fact}
        examples.append(({"messages": turns}, row))
    dice.shuffle(examples)
    chats, rows = zip(*examples, strict=True)
    write("chats.jsonl", chats[HELD_OUT:])
    write("prompts.jsonl", rows[HELD_OUT:])
    write("held_out.jsonl", rows[:HELD_OUT])


def write(name: str, rows: Sequence[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(__file__).parent / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
