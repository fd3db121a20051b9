import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_async_rlhf.data.builtin_task import KINDS, MAX_EXAMPLES, make_examples, split_of
from megatron_async_rlhf.errors import DataError

ROOT = Path(__file__).parents[2]


def texts(seed: int, count: int, split: str) -> list[str]:
    return [example.text for example in make_examples(seed, count, split)]


def test_no_text_is_in_two_splits_or_twice_in_one():
    train = texts(0, 6000, "train") + texts(1, 6000, "train")
    evaluation = texts(0, 1000, "eval") + texts(1, 1000, "eval")
    assert not set(train) & set(evaluation)
    assert len(set(train[:6000])) == 6000
    assert len(set(evaluation[:1000])) == 1000


def test_every_instruction_has_one_split_by_its_text_alone():
    assert {split_of(text) for text in texts(3, 500, "train")} == {"train"}
    assert {split_of(text) for text in texts(3, 500, "eval")} == {"eval"}


def test_seed_and_split_decide_everything_in_any_process():
    code = (
        "from megatron_async_rlhf.data.builtin_task import make_examples\n"
        "for split in ('train', 'eval'):\n"
        "    for example in make_examples(5, 40, split): print(example)"
    )
    run = [sys.executable, "-c", code]
    outputs = [
        subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT, env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    ]
    here = "".join(f"{example}\n" for split in ("train", "eval") for example in make_examples(5, 40, split))
    assert outputs == [here, here]
    assert texts(5, 40, "train") != texts(6, 40, "train")


def test_a_shorter_list_is_a_prefix_of_a_longer_one():
    assert make_examples(0, 300, "eval")[:37] == make_examples(0, 37, "eval")
    assert make_examples(0, 0, "train") == []


def test_kinds_are_evenly_mixed():
    assert len(KINDS) >= 10
    counts = Counter(example.reference["kind"] for example in make_examples(0, 20 * len(KINDS), "train"))
    assert counts == dict.fromkeys(KINDS, 20)


def test_prompts_and_answers_are_short():
    for example in make_examples(2, 3000, "train"):
        assert len(example.text) <= 40
        assert 1 <= len(example.solution) <= 24
        assert example.solution == example.solution.strip()


def test_answers_are_right():
    """Answers worked out again from the instruction's own words."""
    for example in make_examples(4, 40 * len(KINDS), "train"):
        words = example.text.rstrip(".").split()
        last = words[-1]
        expected = {
            "reverse": lambda: "".join(reversed(last)),
            "sort": lambda: "".join(sorted(last)),
            "repeat": lambda: " ".join(words[1] for _ in range(int(words[2]))),
            "upper": lambda: words[1].upper(),
            "count": lambda: str(sum(1 for _ in last)),
            "pick": lambda: last[int(words[2]) - 1],
            "add": lambda: str(int(words[1]) + int(last)),
        }
        answer = example.solution
        holds = {
            "end_with": lambda: answer.split()[2:] == [last],
            "start_with": lambda: answer.startswith(last) and answer != last,
            "ending_in": lambda: answer.endswith(last) and answer != last,
            "some_words": lambda: len(answer.split()) == int(words[1]) and answer.split()[0] == last,
        }
        kind = example.reference["kind"]
        if kind in expected:
            assert example.solution == example.reference["answer"] == expected[kind](), example
        else:
            assert holds[kind](), example


def test_more_than_there_can_be_is_refused():
    with pytest.raises(DataError, match=f"at most {MAX_EXAMPLES} prompts, {MAX_EXAMPLES + 1} were asked for"):
        make_examples(0, MAX_EXAMPLES + 1, "train")
