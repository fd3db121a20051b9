"""Answers compared as mathematics: what people and models write for the same number or formula."""

import asyncio
import json
from pathlib import Path

import pytest

from megatron_async_rlhf.config.rewards import MathRewardSection
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.rewards.math_answer import MathAnswer
from megatron_async_rlhf.rewards.preflight import check_entry
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.rewards.verifier import Task
from megatron_async_rlhf.types import Completion, Prompt

GSM8K = Path(__file__).parents[2].parent / "shared/data/gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"the GSM8K files are not at {GSM8K}")


def judged(solution: str, text: str) -> tuple[float, float, float]:
    """Reward, exact, parsed."""
    task = Task("How much?", {"solution": solution})
    assert MathAnswer().check(task) is None
    reward, metrics = MathAnswer().judge(task, text)
    assert metrics.keys() == {"exact", "parsed"}
    return reward, metrics["exact"], metrics["parsed"]


RIGHT = [
    (r"\frac{1}{2}", r"So it is \boxed{\frac{1}{2}}."),
    (r"\frac{1}{2}", "The answer is 1/2."),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"$\frac{1}{2}$", r"\(\dfrac{2}{4}\)"),
    ("0.5", r"$\frac12$"),
    (r"\sqrt{2}", r"$\sqrt{2}$"),
    ("x^2+1", r"\boxed{1 + x^2}"),
    (r"(-\infty, 3]", r"\boxed{(-\infty,3]}"),
    (r"Then we have \boxed{\frac{3\pi}{4}}.", r"It is $\frac{3}{4}\pi$."),
    ("18", "18"),
    ("1000", "1,000"),
    ("Half of 36 is <<36/2=18>>18.\n#### 18", "36 / 2 = 18\n#### 18"),
    ("Half of 36 is 18.\n#### 18", r"\boxed{18}"),
    ("2 + 2 = 4\n#### 2,125", "#### $2125\nwhich took 3 steps"),
    ("18", r"\boxed{18\text{ cm}}"),
    ("18", r"\boxed{18\ \text{km/h}}"),
    ("18", "It takes 18 km."),
    ("$18", "She has $18."),
    ("50%", r"\boxed{50\%}"),
    ("4", r"First I thought \boxed{3}. That was wrong, it must be \boxed{4}."),
    ("4", "$\\boxed{3}$ or so.\n\nNo: $x = \\boxed{4}$"),
    (r"$\{3, 4\}$", r"$\boxed{5}$? No, $x = \boxed{3}$ or $\boxed{4}$"),
    (r"x is $\boxed{3}$ or $\boxed{4}$", r"\boxed{4}, \boxed{3}"),
    ("4", r"The final answer is $3$. I hope it is correct. No: \boxed{4}"),
    ("4", "#### Step 2: Solve\n2x = 8\n\\boxed{4}"),
    ("4", "#### 2. Solve\nso that x is 4"),
    ("4", "#### Final Answer\n\\boxed{4}"),
    ("7", "#### (a) Total\nSo the answer is 7."),
    ("7", "#### a) Add 3 and 4\nThe answer is 7."),
    ("7", "#### 步骤 2：计算\n所以答案是 7。"),
    ("7", "#### Étape 2\nLa réponse est 7."),
    ("x", "#### x"),
    (r"\pi", "#### \\pi"),
    ("4", "#### Final answer: 4\nwith 2 left"),
    ("4", "#### Answer:\n4"),
    ("4", "##### 3 parts\n4"),
    ("4", "Write it after #### 5 or so, I am told.\n#### 4"),
    ("4", "#### \\boxed{4}"),
    ("4", "#### $4$\n"),
]
WRONG = [
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
    ("x^2+1", r"\boxed{x^2-1}"),
    ("3", r"First I thought \boxed{3}. That was wrong, it must be \boxed{4}."),
    ("3", r"\boxed{3}, \boxed{4}"),  # two answers are not the one that was asked for
    ("18", "#### 19"),
    ("2", "#### Step 2:\n\\boxed{3}"),
    ("2", "#### 2\nNo, \\boxed{3}"),
    ("Half of 36 is 18.\n#### 18", "18 of 36.\n#### 36"),
]


@pytest.mark.parametrize(("solution", "text"), RIGHT)
def test_equal_in_value(solution: str, text: str):
    assert judged(solution, text) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("solution", "text"), WRONG)
def test_different_in_value(solution: str, text: str):
    assert judged(solution, text) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("text", ["", "I do not know.", "####", "\n"])
def test_no_answer(text: str):
    assert judged("18", text) == (0.0, 0.0, 0.0)


@needs_gsm8k
def test_gsm8k_solutions_are_their_own_answers():
    lines = (GSM8K / "test.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    for number, line in enumerate(lines):
        solution = json.loads(line)["answer"]
        answer = solution.rpartition("####")[2].strip()
        for text in (solution, rf"\boxed{{{answer}}}", f"The answer is {answer}."):
            assert judged(solution, text)[0] == 1.0, (number, text)
        assert judged(solution, f"#### {answer}1")[0] == 0.0


@pytest.mark.slow
def test_it_runs_in_workers_and_a_solution_without_an_answer_is_refused_before_the_run():
    def prompt(solution: str) -> Prompt:
        return Prompt(index=0, text="?", token_ids=[1], reference={"solution": solution}, origin="train.jsonl:7")

    section = MathRewardSection(workers=1)
    check_entry("reward", section, [prompt("#### 3")])
    with pytest.raises(
        DataError, match=r"train.jsonl:7 \('\?'\): no answer can be read from its solution 'I give up.'"
    ):
        check_entry("reward", section, [prompt("#### 3"), prompt("I give up.")])

    async def go() -> list[float]:
        reward = make_reward([section])
        # The second would be a number of 10^10 digits: math-verify gives up after five seconds.
        texts = [r"\boxed{3}", r"\boxed{10^{10^{10}}}"]
        completions = [Completion(token_ids=[1], logprobs=[0.0], versions=[0], finished=True, text=t) for t in texts]
        try:
            return [score.reward for score in await reward.score(prompt("#### 3"), completions)]
        finally:
            reward.close()

    assert asyncio.run(go()) == [1.0, 0.0]
