"""Two real systems on the same 252 instructions, with human answers as references (Self-Instruct's evaluation).

A strong model must win, and by more than how much longer its answers are; samples of these prompts must agree with all.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_async_rlhf.evaluation.bootstrap import Resampling
from megatron_async_rlhf.evaluation.length_control import length_controlled_win_rate
from megatron_async_rlhf.evaluation.wins import win_rate, wins

DATA = Path(__file__).parents[2].parent / "shared/data/self_instruct"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the answers of Self-Instruct's evaluation are not here")


def answers(system: str) -> dict[str, tuple[str, str]]:
    """Answer and reference by prompt."""
    path = DATA / f"{system}_predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return {line["prompt"]: (line["response"], line["target"]) for line in lines}


def overlap(answer: str, reference: str) -> float:
    """F1 of the words: a longer answer gains nothing by its length."""
    left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, reference))
    common = (left & right).total()
    return 2 * common / (left.total() + right.total()) if common else 0.0


@pytest.fixture(scope="module")
def scored() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores of the strong and of the weak model, and how long their answers are, [prompts] each."""
    strong, weak = answers("text-davinci-003"), answers("davinci-t0-ft")
    prompts = sorted(strong.keys() & weak.keys())
    assert len(prompts) > 200
    sides = [[side[prompt] for prompt in prompts] for side in (strong, weak)]
    scores = [np.array([overlap(*pair) for pair in side]) for side in sides]
    lengths = [np.array([float(len(answer)) for answer, _ in side]) for side in sides]
    return *scores, *lengths


def test_the_strong_model_wins(scored):
    strong, weak, longer, shorter = scored
    found = win_rate(strong, weak, Resampling())
    assert 0.55 < found.low < found.mean < found.high < 0.95
    assert found.mean + win_rate(weak, strong, Resampling()).mean == pytest.approx(1)
    controlled = length_controlled_win_rate(wins(strong, weak), longer, shorter, Resampling(resamples=500))
    assert controlled.low > 0.5
    assert Resampling().difference(strong, weak).low > 0


def test_a_model_is_no_better_than_itself(scored):
    found = win_rate(scored[0], scored[0], Resampling(resamples=100))
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_intervals_of_samples_cover_the_win_rate_of_all(scored):
    strong, weak, *_ = scored
    truth, draw = wins(strong, weak).mean(), np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        drawn = draw.integers(len(strong), size=80)
        found = win_rate(strong[drawn], weak[drawn], Resampling(confidence=0.9, resamples=300))
        covered += found.low <= truth <= found.high
    assert covered / 200 == pytest.approx(0.9, abs=0.1)  # 5 standard errors
