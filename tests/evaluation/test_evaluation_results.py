"""From answers to `eval.json`, `answers.jsonl` and the table: every number by hand."""

import io
import json
import math
import re
from pathlib import Path

import pytest
from msgspec import structs
from rich.console import Console

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.pairs import load_pairs
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.jobs.evaluation_results import (
    Answers,
    EvaluatedPrompt,
    answer_lines,
    evaluation_of,
    means,
    pair_lines,
)
from megatron_async_rlhf.jobs.kept_answers import KeptAnswers
from megatron_async_rlhf.launch.evaluation_table import print_table
from megatron_async_rlhf.rewards.base import Score
from megatron_async_rlhf.types import Completion, Message, Prompt

DOCS = Path(__file__).parents[2] / "docs/evaluation.md"
TWO_REWARDS = "reward=[{type: gsm8k, weight: 2}, {type: function, name: short, function: r.py:f}]"


def config_of(tmp_path: Path, *settings: str) -> RunConfig:
    (tmp_path / "c.yaml").write_text("model: {hf: policy}\ndata: {train: t.jsonl, solution_field: answer}\n")
    return load_config(tmp_path / "c.yaml", ["reward={type: gsm8k}", "eval.bootstrap=200", *settings])


def answer(text: str, *logprobs: float) -> Completion:
    tokens = [1] * len(logprobs)
    return Completion(token_ids=tokens, logprobs=list(logprobs), versions=[0] * len(tokens), finished=True, text=text)


def answers(*scored: tuple[Completion, float, bool]) -> Answers:
    scores = [Score(reward=reward, metrics={"exact": float(exact)}) for _, reward, exact in scored]
    return Answers(completions=[completion for completion, _, _ in scored], scores=scores)


def prompt(index: int, tokens: int = 3) -> Prompt:
    return Prompt(index=index, text=f"p{index}", token_ids=[2] * tokens, reference={}, solution="s")


LN2 = math.log(2)


@pytest.fixture
def evaluated() -> list[EvaluatedPrompt]:
    """Two prompts with two answers each, against one reference each."""
    return [
        EvaluatedPrompt(
            prompt=prompt(0),
            ours=answers((answer("aa", -LN2, -LN2), 1.0, True), (answer("b", -LN2), 0.0, False)),
            theirs=answers((answer("cccc", -1.0), 0.5, False)),
            reference=[[-LN2, -2 * LN2], [-LN2]],
        ),
        EvaluatedPrompt(
            prompt=prompt(4, tokens=1),
            ours=answers((answer("d", -LN2), 0.5, True), (answer("e", -LN2), 0.5, True)),
            theirs=answers((answer("f", -1.0), 0.5, True)),
            reference=[[-2 * LN2], [0.0]],
        ),
    ]


def test_answers_scored_before_failures_were_allowed_count_as_not_failed(tmp_path, evaluated):
    """The advice after a failure is `reward.on_error=zero` and `--resume`; what was scored before has no such metric."""
    failed = Score(reward=0.0, metrics={"exact": 0.0, "reward_failed": 1.0})
    late = structs.replace(evaluated[1].ours, scores=[failed, failed])
    content = evaluation_of(config_of(tmp_path, *SETTINGS), [evaluated[0], structs.replace(evaluated[1], ours=late)])
    assert content["metrics"]["reward_failed"]["mean"] == content["difference"]["reward_failed"]["mean"] == 0.5
    assert content["against_metrics"]["reward_failed"]["mean"] == 0.0
    first = structs.replace(evaluated[0], ours=structs.replace(evaluated[0].ours, scores=[failed, failed]))
    assert (
        evaluation_of(config_of(tmp_path, *SETTINGS), [first, evaluated[1]])["metrics"]["reward_failed"]["mean"] == 0.5
    )


SETTINGS = ("eval.against=references", "eval.kl_to=sft", "eval.samples=2", "eval.temperature=1", "eval.k=[1, 2]")


def test_every_number_by_hand(tmp_path, evaluated):
    content = evaluation_of(config_of(tmp_path, *SETTINGS), evaluated)
    found = {part: {name: value["mean"] for name, value in content[part].items() if isinstance(value, dict)}
             for part in ("metrics", "against_metrics", "difference", "wins", "kl")}  # fmt: skip
    assert found["metrics"] == pytest.approx({
        "reward": 0.5, "reward/gsm8k": 0.5, "exact": 0.75, "response_length": 1.25, "response_characters": 1.25,
        "finished": 1.0, "pass@1": 0.75, "pass@2": 1.0,
    })  # fmt: skip
    assert found["against_metrics"]["response_characters"] == 2.5
    assert found["difference"]["exact"] == 0.25
    assert found["wins"]["win_rate"] == 0.5  # a win, a loss and two ties
    assert {name: content["wins"][name] for name in ("won", "tied", "lost")} == {"won": 1, "tied": 2, "lost": 1}
    r = [LN2 / 2, 0.0]  # k1 of the prompts: (log 2 + 0) / 2, (log 2 - log 2) / 2
    assert found["kl"]["kl_k1"] == pytest.approx(sum(r) / 2)
    assert found["kl"]["kl_k1_per_token"] == pytest.approx(sum(r) / 2.5)
    half, double = 0.5 - 1 + LN2, 2 - 1 - LN2  # k3 of a token that the reference gives half, and twice the chance
    assert found["kl"]["kl_k3"] == pytest.approx((half / 2 + (half + double) / 2) / 2)
    # Perplexities of the four answers: 2^(3/2), 2; 4, 1. Over prompt and response: 2^(3/5), 2^(1/4); 2^(2/2), 1.
    assert found["kl"]["perplexity_per_response_token"] == pytest.approx((2**1.5 + 2 + 4 + 1) / 4)
    assert found["kl"]["perplexity_over_prompt_and_response"] == pytest.approx((2**0.6 + 2**0.25 + 2 + 1) / 4)
    assert {value["n"] for part in found for value in content[part].values() if isinstance(value, dict)} == {2}
    assert all(v["low"] <= v["mean"] + 1e-9 and v["mean"] <= v["high"] + 1e-9
               for part in found for v in content[part].values() if isinstance(v, dict))  # fmt: skip
    assert (content["policy"], content["against"], content["kl_to"]) == ("policy", "references", "sft")
    assert "python" in content["versions"]
    json.dumps(content, allow_nan=False)
    assert means(content)["wins"]["win_rate"] == 0.5


def test_one_entry_of_the_reward_can_decide(tmp_path):
    """The weighted sum says that we win, `short` that we lose."""

    def scored(total: float, short: float) -> Answers:
        score = Score(reward=total, metrics={"reward/gsm8k": 1.0, "gsm8k/exact": 1.0, "reward/short": short})
        return Answers(completions=[answer("a", -1.0)], scores=[score])

    prompts = [EvaluatedPrompt(prompt=prompt(0), ours=scored(3.0, 0.1), theirs=scored(2.0, 0.9))]
    settings = (TWO_REWARDS, "eval.against=references")
    content = evaluation_of(config_of(tmp_path, *settings), prompts)
    assert (content["wins"]["won"], content["judged_by"]) == (1, "weighted sum of reward")
    assert content["metrics"]["gsm8k/pass@1"]["mean"] == 1
    content = evaluation_of(config_of(tmp_path, *settings, "eval.judged_by=short"), prompts)
    assert (content["wins"]["lost"], content["judged_by"]) == (1, "short")


def test_alone_it_is_compared_with_nothing(tmp_path, evaluated):
    (one, _) = evaluated
    alone = EvaluatedPrompt(prompt=one.prompt, ours=one.ours)
    settings = ("eval.samples=2", "eval.temperature=1")
    content = evaluation_of(config_of(tmp_path, *settings), [alone])
    assert {"wins", "against_metrics", "difference", "kl"}.isdisjoint(content)
    assert content["against"] is content["judged_by"] is content["kl_to"] is None
    (line,) = answer_lines(config_of(tmp_path, *settings), [alone])
    assert line.keys() == {"prompt", "index", "policy"}


def test_lines_have_all_that_was_answered(tmp_path, evaluated):
    first, second = answer_lines(config_of(tmp_path, *SETTINGS), evaluated)
    assert (first["prompt"], first["index"], second["index"]) == ("p0", 0, 4)
    assert first["policy"][0] == {
        "text": "aa", "finished": True, "response_length": 2, "reward": 1.0,
        "scores": {"reward/gsm8k": 1.0, "exact": 1.0}, "logprob": -2 * LN2, "kl_to_logprob": -3 * LN2,
    }  # fmt: skip
    assert len(first["policy"]) == 2 and len(first["against"]) == 1


def test_the_docs_name_all_that_is_written(tmp_path, evaluated):
    config = config_of(tmp_path, *SETTINGS)
    content, (line, _) = evaluation_of(config, evaluated), answer_lines(config, evaluated)
    names = {*content, *content["wins"], *content["kl"], *line, *line["policy"][0], *content["metrics"]["reward"]}
    documented = set(re.findall(r"`([\w@]+)`", DOCS.read_text(encoding="utf-8")))
    assert names - documented == set()


def test_the_table_fits_80_columns(tmp_path, evaluated):
    content = evaluation_of(config_of(tmp_path, *SETTINGS), evaluated)
    content["metrics"]["a_metric_with_a_name_so_long_that_nobody_would_want_to_write_it_down/pass@1"] = {
        "mean": -1.23456789e-12, "low": -1.23456789e-12, "high": 1e9, "n": 2,
    }  # fmt: skip
    (tmp_path / "eval.json").write_text(json.dumps(content))
    output = io.StringIO()
    print_table(tmp_path / "eval.json", Console(file=output, width=80))
    table = [line for line in output.getvalue().splitlines() if line[:1] in "┏┃┡│├└"]
    assert max(map(len, output.getvalue().splitlines()[: len(table) + 1])) <= 80
    row = next(line for line in table if "win_rate" in line and "length" not in line)
    assert row.split()[3::2] == [
        "0.5",
        f"{content['wins']['win_rate']['low']:.4g}",
        f"{content['wins']['win_rate']['high']:.4g}",
    ]


def test_answers_are_kept_but_for_half_a_line(tmp_path):
    path = tmp_path / "kept/policy.jsonl"
    kept: KeptAnswers = KeptAnswers(path, list[Completion])
    kept.add(3, [answer("ä\u2028b", -1.0)])
    kept.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"prompt": 4, "val')
    again: KeptAnswers = KeptAnswers(path, list[Completion])
    assert again.found == {3: [answer("ä\u2028b", -1.0)]}
    again.add(4, [])
    again.close()
    assert KeptAnswers(path, list[Completion]).found.keys() == {3, 4}
    path.write_text('{"prompt": 3, "value": [{"text": 1}]}\n{"prompt": 4, "value": []}\n')
    with pytest.raises(DataError, match=r"policy\.jsonl:1: no evaluation wrote this line"):
        KeptAnswers(path, list[Completion])


def test_the_best_and_the_worst_sample_that_ended_make_a_pair(tmp_path):
    asked = structs.replace(prompt(0), messages=[Message("system", "s"), Message("user", "p0")])
    cut = structs.replace(answer("cut", -1.0), finished=False)
    some = [
        EvaluatedPrompt(
            prompt=asked,
            ours=answers(
                (cut, 9.0, False),
                (answer("b", -1.0), 0.5, False),
                (answer("c", -1.0), 2.0, False),
                (answer("d", -1.0), 0.25, False),
            ),
        ),
        EvaluatedPrompt(prompt=prompt(1), ours=answers((answer("e", -1.0), 1.0, True), (answer("f", -1.0), 1.0, True))),
        EvaluatedPrompt(prompt=prompt(2), ours=answers((cut, 1.0, True), (cut, 2.0, True))),
        # Such pairs a reward model's stage refuses.
        EvaluatedPrompt(prompt=prompt(3), ours=answers((answer(" ", -1.0), 1.0, True), (answer("g", -1.0), 2.0, True))),
        EvaluatedPrompt(
            prompt=prompt(4), ours=answers((answer("h", -1.0), 1.0, True), (answer("h ", -1.0), 2.0, True))
        ),
    ]
    # Nobody judged the first of these.
    unjudged = answers((answer("i", -1.0), 0.0, False), (answer("j", -1.0), -2.0, False))
    unjudged.scores[0] = structs.replace(unjudged.scores[0], failure="too long for the reward model")
    some.append(EvaluatedPrompt(prompt=prompt(5), ours=unjudged))
    config = config_of(tmp_path, "eval.samples=4", "eval.temperature=1", "eval.pairs=true")
    lines = pair_lines(config, some)
    asked_as = [{"role": "system", "content": "s"}, {"role": "user", "content": "p0"}]
    assert lines == [{"prompt": asked_as, "chosen": "c", "rejected": "d", "margin": 1.75}]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, lines[0] | {"prompt": "p1"}])
    )
    pairs = load_pairs(DataSection(train=str(tmp_path / "pairs.jsonl"), eval_prompts=1), "train", 0)
    pairs += load_pairs(DataSection(train=str(tmp_path / "pairs.jsonl"), eval_prompts=1), "eval", 0)
    (read,) = [pair for pair in pairs if pair.messages == asked.messages]
    assert (read.chosen, read.rejected, read.margin) == ("c", "d", 1.75)
