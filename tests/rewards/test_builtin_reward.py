import random
from itertools import accumulate

import pytest

from megatron_async_rlhf.data.builtin_task import KINDS, make_examples
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.rewards.builtin import MAX_PARTIAL, BuiltinReward, _common_subsequence, resemblance
from megatron_async_rlhf.types import Completion, Prompt


def prompt(**reference) -> Prompt:
    return Prompt(index=4, text="instruction", token_ids=[1], reference=reference)


def completion(text: str) -> Completion:
    return Completion(token_ids=[1], logprobs=[-1.0], versions=[0], finished=True, text=text)


def reward(text: str, **reference) -> float:
    score = BuiltinReward().judge(prompt(**reference), completion(text))
    assert score.metrics == {"exact": float(score.reward == 1.0)}
    return score.reward


def test_every_solution_earns_one_and_nothing_earns_nothing():
    scorer = BuiltinReward()
    for index, example in enumerate(make_examples(0, 50 * len(KINDS), "train")):
        item = Prompt(index=index, text=example.text, token_ids=[1], reference=example.reference)
        scorer.check(item)
        right = scorer.judge(item, completion(example.solution))
        assert (right.reward, right.metrics) == (1.0, {"exact": 1.0}), example
        for nothing in ("", " \n\t"):
            empty = scorer.judge(item, completion(nothing))
            assert (empty.reward, empty.metrics) == (0.0, {"exact": 0.0}), example


def test_space_around_the_answer_is_ignored():
    assert reward("  tac\n", kind="reverse", answer="tac") == 1.0


@pytest.mark.parametrize("text", ["tac\ncat", "tacc", "TaC", "tac.", "tac tac", "\ufffdtac", "ta", "t", "🦆tac"])
def test_wrong_answers_earn_part_of_the_partial_credit(text):
    assert 0 < reward(text, kind="reverse", answer="tac") <= MAX_PARTIAL < 1


def test_nothing_in_common_earns_nothing():
    for text in ("xyz 日本", "TAC", "\ufffd"):
        assert reward(text, kind="reverse", answer="tac") == 0.0


def test_nearer_answers_earn_more():
    answers = ["t", "ta", "tacdeg", "tacdef"]
    rewards = [reward(text, kind="reverse", answer="tacdef") for text in answers]
    assert rewards == sorted(set(rewards))
    # Rambling costs: the right letters somewhere in a long line are worth less than nearly the answer.
    assert reward("xtacdef" * 20, kind="reverse", answer="tacdef") < reward("tacd", kind="reverse", answer="tacdef")


def test_resemblance_by_hand():
    assert resemblance("abc", "abc") == 1.0
    # "acb" has 1 of 3 characters in place and a common subsequence of 2 (2 x 2 of 6 characters).
    assert resemblance("acb", "abc") == pytest.approx((1 / 3 + 2 / 3) / 2)
    # "bc" has none in place, a common subsequence of 2 (2 x 2 of 5 characters).
    assert resemblance("bc", "abc") == pytest.approx((0 + 4 / 5) / 2)
    assert resemblance("", "abc") == 0.0


@pytest.mark.parametrize("text", ["one two cat", "a b cat.", "cat cat cat", "The big cat"])
def test_any_three_words_with_the_last_one_given_are_right(text):
    assert reward(text, kind="end_with", word="cat") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "cat",
        "two cat",
        "a b c cat",
        "a b concat",
        "a b cat c",
        "1 2 cat",
        "a b cat\nc",
        "a  b cat",
        f"{'a' * 25} b cat",
    ],
)
def test_other_lines_with_the_word_are_not(text):
    assert 0 < reward(text, kind="end_with", word="cat") <= MAX_PARTIAL


@pytest.mark.parametrize("text", ["cats", "catalogue", "catch."])
def test_any_word_with_the_right_start_is_right(text):
    assert reward(text, kind="start_with", word="cat") == 1.0


@pytest.mark.parametrize("text", ["cat", "cat.", "cat fish", "Cats", "cat5", "cab", f"cat{'s' * 22}", "cats\ndogs"])
def test_other_words_are_not(text):
    assert 0 < reward(text, kind="start_with", word="cat") <= MAX_PARTIAL


@pytest.mark.parametrize(
    "reference", [{}, {"solution": "#### 1"}, {"kind": "sing", "answer": "la"}, {"kind": "end_with", "answer": "la"}]
)
def test_prompts_of_other_tasks_are_refused(reference):
    with pytest.raises(DataError, match=r"prompt 4 \('instruction'\) is not of the built-in task; set data.train"):
        BuiltinReward().check(prompt(**reference))


@pytest.mark.parametrize(
    ("reference", "right", "nearly", "wrong"),
    [
        ({"kind": "ending_in", "word": "tan"}, ["mutan", "ratan."], ["tan", "motam", "Xtan"], ["", "zzz"]),
        (
            {"kind": "some_words", "count": 3, "word": "ban"},
            ["ban po re", "ban a b."],
            ["ban po", "po ban re", "ban"],
            [""],
        ),
    ],
)
def test_kinds_with_many_right_answers(reference, right, nearly, wrong):
    assert [reward(text, **reference) for text in right] == [1.0] * len(right)
    for text in nearly:
        assert 0 <= reward(text, **reference) <= MAX_PARTIAL
    for text in wrong:
        assert reward(text, **reference) < 0.2


def test_the_longest_common_subsequence_is_that_of_the_table():
    def by_table(left, right):
        row = [0] * (len(right) + 1)
        for a in left:
            row = list(
                accumulate(
                    range(1, len(row)), lambda best, j: max(best, row[j], row[j - 1] + (a == right[j - 1])), initial=0
                )
            )
        return row[-1]

    rng = random.Random(0)
    for _ in range(300):
        left, right = ("".join(rng.choices("abcé ", k=rng.randint(1, 90))) for _ in range(2))
        assert _common_subsequence(left, right) == by_table(left, right)
