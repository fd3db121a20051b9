"""Configurations and data that nobody meant: one line for each problem and exit code 2, or a plan; never a traceback, never a hang."""

import random
import re
from pathlib import Path

import pytest

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.usage import run_command_line

EXAMPLES = 250  # of each kind
CONFIG = """\
run: {name: fuzzed, seed: 0}
model: {layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96}
learner: {learning_rate: 1.0e-4, micro_batch_tokens: 512}
generator: {max_new_tokens: 12, temperature: 0.7}
schedule:
  mode: async
  max_staleness: 1
  steps: 4
  prompts_per_step: 2
algorithm: {type: online_dpo, samples_per_prompt: 2, beta: 0.1}
data: {train: data.jsonl, eval_prompts: 1, solution_field: answer}
reward: {type: gsm8k}
checkpoint: {every_steps: 2}
"""
DATA = "".join(f'{{"prompt": "{n} + 1?", "answer": "One more.\\n#### {n + 1}"}}\n' for n in range(6))
PIECES = (
    "\t", "\n", ":", "{", "}", "[", "]", ",", "#", "'", '"', "&a", "*a", "!x", "|", ">", "%", "@", "`", "\0", "\u2028", "\ud83d\ude00",
    "null", "true", "1e400", "-1", ".nan", "0x", "1_0", "<<: ", "---\n", "...\n", "\r", "\ufeff", "é", "\\", "\\u12", "  ", "a" * 5000, "9" * 400,
)  # fmt: skip


def damaged(text: str, dice: random.Random) -> bytes:
    """A few accidents."""
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        place, length = dice.randrange(len(text) + 1), dice.choice([0, 1, 1, 3, 20])
        match dice.randrange(5):
            case 0:
                text = text[:place] + text[place + max(1, length) :]
            case 1:
                text = text[:place] + dice.choice(PIECES) + text[place:]
            case 2:
                text = text[:place] + dice.choice(PIECES) + text[place + length :]
            case 3:
                lines = text.splitlines(keepends=True)
                dice.shuffle(lines)
                text = "".join(lines)
            case 4:
                text = text[:place] + text[place : place + 40] * 2 + text[place + 40 :]
    content = text.encode("utf-8", "surrogatepass")
    if dice.random() < 0.2:
        place = dice.randrange(len(content) + 1)
        content = content[:place] + dice.randbytes(dice.randint(1, 3)) + content[place:]
    return content


@pytest.mark.usefixtures("starts_nothing")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["configuration", "data"])
def test_nothing_but_a_plan_or_a_line(kind: str, capsys: pytest.CaptureFixture[str]):
    codes = []
    for seed in range(EXAMPLES):
        dice = random.Random(f"{kind}/{seed}")
        Path("c.yaml").write_bytes(damaged(CONFIG, dice) if kind == "configuration" else CONFIG.encode())
        Path("data.jsonl").write_bytes(damaged(DATA, dice) if kind == "data" else DATA.encode())
        codes.append(run_command_line(app, ["train", "c.yaml", "--dry-run"]))
        said = capsys.readouterr()
        assert codes[-1] in (0, 2), (seed, said.err)
        assert "Traceback" not in said.err
        if codes[-1] == 2:
            lines = said.err.splitlines()
            assert lines and all(re.match(r"(error|warning|note): \S", line) for line in lines), (seed, said.err[:2000])
            assert any(line.startswith("error: ") for line in lines)
            assert max(map(len, lines)) < 2000, (seed, said.err[:500])
    assert set(codes) == {0, 2}, "some are harmless, and some are not"
