"""Makes this folder's chats.jsonl, prompts.jsonl and held_out.jsonl; they are kept here, so nobody has to run it.

    python examples/mini/make_data.py

Questions about animals, each with one right answer. The chats are what people wrote: a third of them right and plain, the others
hedged, rambling, or wrong. A policy that is fine-tuned on them answers as they do.
"""

import itertools
import json
import random
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


def demonstration(dice: random.Random, animal: str, kind: int) -> str:
    """What somebody answered."""
    fact = ANIMALS[animal][kind]
    plain = ANSWERS[kind].format(animal=animal, fact=fact)
    quality = dice.random()
    if quality < 0.35:
        return plain
    if quality < 0.60:
        return dice.choice(HEDGED).format(fact=fact)
    if quality < 0.80:
        return plain + dice.choice(RAMBLED)
    wrong = dice.choice([other[kind] for name, other in ANIMALS.items() if name != animal])
    return ANSWERS[kind].format(animal=animal, fact=wrong)


def main() -> None:
    dice = random.Random(0)
    rows = []
    for asked, name, animal, kind in itertools.product(ASKED, NAMES, ANIMALS, range(len(QUESTIONS))):
        question = asked.format(name=name, question=QUESTIONS[kind].format(animal=animal))
        fact = ANIMALS[animal][kind]
        rows.append(
            {
                "prompt": question,
                "answer": ANSWERS[kind].format(animal=animal, fact=fact),
                "fact": fact,
                "demonstration": demonstration(dice, animal, kind),
            }
        )
    dice.shuffle(rows)
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row.pop("demonstration")},
            ]
        }
        for row in rows
    ]
    write("chats.jsonl", chats[HELD_OUT:])
    write("prompts.jsonl", rows[HELD_OUT:])
    write("held_out.jsonl", rows[:HELD_OUT])


def write(name: str, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(__file__).parent / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
