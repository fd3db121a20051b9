import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.rewards.gsm8k import Gsm8kReward, find_answer, is_well_formed
from megatron_async_rlhf.types import Completion, Prompt

GSM8K = Path(__file__).parents[2].parent / "shared/data/gsm8k"
FORMAT_REWARD = 0.25

needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"the GSM8K files are not at {GSM8K}")


def prompt(solution: str, index: int = 0) -> Prompt:
    return Prompt(index=index, text="How many?", token_ids=[1], reference={"solution": solution}, solution=solution)


def score(text: str, solution: str = "1 + 1 = 2\n#### 2") -> tuple[float, float, float]:
    """Reward, exact, well_formed."""
    completion = Completion(token_ids=[1], logprobs=[-1.0], versions=[0], finished=True, text=text)
    scored = Gsm8kReward(FORMAT_REWARD).judge(prompt(solution), completion)
    assert scored.metrics.keys() == {"exact", "well_formed"}
    return scored.reward, scored.metrics["exact"], scored.metrics["well_formed"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 1 = 2\n#### 2", (1.0, 1, 1)),
        ("#### 2", (1.0, 1, 1)),
        ("#### 2.\n \n", (1.0, 1, 1)),
        ("#### 3\n#### 2", (1.0, 1, 1)),
        ("#### $2.00", (1.0, 1, 1)),
        ("#### 2\nso two", (1.0, 1, 0)),
        ("####2", (1.0, 1, 0)),
        ("#### 2\n#### 3", (FORMAT_REWARD, 0, 1)),
        ("#### -2", (FORMAT_REWARD, 0, 1)),
        ("#### 3\r\n", (FORMAT_REWARD, 0, 1)),
        ("#### 3\nso three", (0.0, 0, 0)),
        ("2", (0.0, 0, 0)),
        ("", (0.0, 0, 0)),
        ("\n", (0.0, 0, 0)),
        ("#### two", (0.0, 0, 0)),
        ("#### 2 apples", (0.0, 0, 0)),
        ("so #### 2", (0.0, 0, 0)),
        ("#### ", (0.0, 0, 0)),
        ("#### --2", (0.0, 0, 0)),
        ("#### \u0662", (0.0, 0, 0)),
        ("\ufffd\x00#### 2", (0.0, 0, 0)),
        ("####\n2", (0.0, 0, 0)),
        ("#### +-2", (0.0, 0, 0)),
        ("#### - - 2", (0.0, 0, 0)),
        ("#### -  2", (0.0, 0, 0)),
        ("#### %2", (0.0, 0, 0)),
        ("#### 2%%", (0.0, 0, 0)),
        ("#### 1 2", (0.0, 0, 0)),
        ("#### 2 000 00", (0.0, 0, 0)),
        ("#### 1-2", (0.0, 0, 0)),
        ("#### \u22122", (FORMAT_REWARD, 0, 1)),
        ("#### +2", (1.0, 1, 1)),
    ],
)
def test_rewards(text, expected):
    assert score(text) == expected


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1,234,567", "1234567"),
        ("$1,200", "1200"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("-0", "0"),
        ("007", "7"),
        (".5", "0.5"),
        ("0.50", "0.5"),
        ("12.", "12"),
        ("12.0.", "12"),
        ("9" * 400, "9" * 400),
        ("+5", "5"),
        ("5%", "5"),
        ("5 %", "5"),
        ("- 5", "-5"),
        ("\u22125", "-5"),
        ("\u2212 $1,200", "-1200"),
        ("\u20135", "-5"),
        ("\u20115.", "-5"),
        ("\uff0d5", "-5"),
        ("$ 5", "5"),
        ("$ -5", "-5"),
        ("+$5", "5"),
        ("-$ 5", "-5"),
        ("5$", "5"),
        ("12.5%.", "12.5"),
        ("1 000", "1000"),
        ("1\u00a0234\u202f567.5", "1234567.5"),
    ],
)
def test_numbers_are_normalised(written, number):
    assert find_answer(f"steps\n#### {written}") == Decimal(number)
    assert score(f"#### {written}", solution=f"#### {number}") == (1.0, 1, 1)
    assert score(f"#### {number}", solution=f"#### {written}") == (1.0, 1, 1)


def test_decimals_are_compared_exactly():
    assert score("#### 0.1", solution="#### 0.10000000000000001")[0] == FORMAT_REWARD
    assert score(f"#### {'9' * 400}", solution=f"#### {'9' * 399}8")[0] == FORMAT_REWARD


def test_format_reward_is_the_configured_one():
    completion = Completion(token_ids=[], logprobs=[], versions=[], finished=False, text="#### 9")
    assert Gsm8kReward(0.0).judge(prompt("#### 2"), completion).reward == 0.0
    assert Gsm8kReward(0.1).judge(prompt("#### 2"), completion).reward == 0.1


@pytest.mark.parametrize("solution", ["", "the answer is 2", "#### two"])
def test_reference_without_a_number_is_refused(solution):
    with pytest.raises(DataError, match=r"prompt 8 \('How many\?'\): its solution has no line `#### <number>`"):
        Gsm8kReward(0.1).check(prompt(solution, index=8))
    with pytest.raises(DataError):
        score("#### 2", solution=solution)


def test_prompt_without_a_solution_is_refused():
    with pytest.raises(DataError, match="no solution, which reward.type = gsm8k needs: set data.solution_field"):
        Gsm8kReward(0.1).check(Prompt(index=0, text="q", token_ids=[1], reference={}))


@pytest.mark.parametrize(
    "text", ["####  1", "### 1", " #### 1", "##### 1", "#### 1 2", "#### +-1", "#### 1%%", "####1", "#### 1\n1"]
)
def test_well_formed_needs_the_exact_form(text):
    assert is_well_formed("x\n#### 1,000 \n\n")
    assert not is_well_formed(text)


@needs_gsm8k
@pytest.mark.parametrize("file", ["train.jsonl", "test.jsonl"])
def test_every_reference_solution_of_gsm8k_scores_one(file):
    solutions = [json.loads(line)["answer"] for line in (GSM8K / file).read_text().splitlines()]
    assert len(solutions) > 1000
    for solution in solutions:
        assert score(solution, solution) == (1.0, 1, 1), solution[-40:]


@needs_gsm8k
def test_verdicts_are_those_of_the_authors_on_their_models_solutions():
    """The file marks answers with `A:` where the data set has `####`."""

    def marked(text: str) -> str:
        return re.sub(r"^A:", "####", text, flags=re.MULTILINE)

    verdicts = []
    for line in (GSM8K / "example_model_solutions.jsonl").read_text().splitlines():
        record = json.loads(line)
        for entry in record.values():
            if isinstance(entry, dict):
                exact = score(marked(entry["solution"]), marked(record["ground_truth"]))[1]
                verdicts.append((bool(exact), entry["is_correct"]))
    assert len(verdicts) == 4 * 1319
    assert {right for _, right in verdicts} == {True, False}
    assert [ours for ours, _ in verdicts] == [theirs for _, theirs in verdicts]
