"""Chats and instructions with checkable constraints, from public files of people's instructions, as JSONL.

    python examples/smollm2/prepare.py data/smollm2 --seed-tasks seed_tasks.jsonl \\
        --user-oriented user_oriented_instructions.jsonl --mt-bench question.jsonl

`seed_tasks.jsonl` and `user_oriented_instructions.jsonl` are of github.com/yizhongw/self-instruct (Apache-2.0), `question.jsonl`
is of FastChat's MT-bench (Apache-2.0). It writes
- `chats.jsonl`: the seed tasks with short answers as conversations, for supervised fine-tuning; each as it is, and once with a
  constraint, its answer changed so that it keeps it;
- `train.jsonl`: seed tasks and MT-bench's first turns, each once with every constraint, as IFEval has its prompts;
- `held_out.jsonl`: the user-oriented instructions, each with one constraint. Nothing of them is in the other two files.
"""

import argparse
import json
from pathlib import Path

# An instruction in words, its name in IFEval (arXiv 2311.07911), and what it is about.
CONSTRAINTS = [
    (
        "Your entire response should be in English, and in all lowercase letters. No capital letters are allowed.",
        "change_case:english_lowercase",
        {},
    ),
    ("Wrap your entire response with double quotation marks.", "startend:quotation", {}),
    ("In your entire response, refrain from the use of any commas.", "punctuation:no_comma", {}),
    (
        "Your answer must contain exactly 3 bullet points. Use the markdown bullets such as:\n* This is a point.",
        "detectable_format:number_bullet_lists",
        {"num_bullets": 3},
    ),
]

# An answer so that it keeps the first, the second ... of these.
KEPT = [
    str.lower,
    lambda answer: f'"{answer}"',
    lambda answer: answer.replace(",", ""),
]
LONGEST_ANSWER = 240  # characters, about as many as the 64 tokens that a completion may have


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records)}")


def request(task: dict) -> str:
    """Instruction and input of a task's first instance."""
    return "\n\n".join(filter(None, (task["instruction"].strip(), task["instances"][0]["input"].strip())))


def constrained(text: str, number: int) -> dict:
    words, name, about = CONSTRAINTS[number]
    return {"prompt": f"{text}\n\n{words}", "instruction_id_list": [name], "kwargs": [about]}


def chat(request: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("--seed-tasks", "--user-oriented", "--mt-bench"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tasks = read(arguments.seed_tasks)
    answers = [(request(task), task["instances"][0]["output"].strip()) for task in tasks]
    short = [(text, answer) for text, answer in answers if len(answer) <= LONGEST_ANSWER]
    chats = [chat(text, answer) for text, answer in short]
    chats += [
        chat(constrained(text, i % len(KEPT))["prompt"], KEPT[i % len(KEPT)](answer))
        for i, (text, answer) in enumerate(short)
    ]
    write(arguments.out / "chats.jsonl", chats)
    texts = [request(task) for task in tasks] + [each["turns"][0].strip() for each in read(arguments.mt_bench)]
    train = [constrained(text, number) for text in texts for number in range(len(CONSTRAINTS))]
    write(arguments.out / "train.jsonl", train)
    held_out = [
        constrained(request(task), i % len(CONSTRAINTS)) for i, task in enumerate(read(arguments.user_oriented))
    ]
    write(arguments.out / "held_out.jsonl", held_out)


if __name__ == "__main__":
    main()
