"""Pairs of a right and a wrong solution of the same question, by language models of GSM8K's authors, as JSONL.

    python examples/smollm2/solution_pairs.py data/solutions --solutions example_model_solutions.jsonl \\
        --model path/to/SmolLM2-135M-Instruct

`example_model_solutions.jsonl` is of github.com/openai/grade-school-math (MIT): four models' solutions to each test question,
with the verdict on each. Every different right solution makes a pair with every different wrong one, unless both are longer
than `--max-tokens` together. 260 of the questions are held out, with one pair each: `eval.jsonl`, beside `train.jsonl`.
"""

import argparse
import random
from pathlib import Path

from prepare import read, write

from megatron_async_rlhf.data.tokenizer import Tokenizer

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
HELD_OUT = 260


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--solutions", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="whose tokens are counted")
    parser.add_argument("--max-tokens", type=int, default=520)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.model)
    pairs = []
    for row in read(arguments.solutions):
        right, wrong = (
            dict.fromkeys(row[model]["solution"] for model in MODELS if row[model]["is_correct"] is verdict)
            for verdict in (True, False)
        )
        tokens = {text: len(tokenizer.encode(row["question"] + text)) for text in (*right, *wrong)}
        pairs += [
            {"prompt": row["question"], "chosen": chosen, "rejected": rejected}
            for chosen in right
            for rejected in wrong
            if tokens[chosen] + tokens[rejected] <= arguments.max_tokens
        ]
    questions = sorted({pair["prompt"] for pair in pairs})
    random.Random(0).shuffle(questions)
    held_out = set(questions[:HELD_OUT])
    random.Random(1).shuffle(pairs)
    one_each: dict[str, dict] = {}
    for pair in pairs:
        if pair["prompt"] in held_out:
            one_each.setdefault(pair["prompt"], pair)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / "train.jsonl", [pair for pair in pairs if pair["prompt"] not in held_out])
    write(arguments.out / "eval.jsonl", list(one_each.values()))


if __name__ == "__main__":
    main()
