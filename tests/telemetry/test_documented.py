"""What docs/run_directory.md says of the files of a run, against what is in them: both have the same names.

Those of the learner are in tests/learner/test_algorithms.py, which trains all algorithms.
"""

import asyncio
import json
from pathlib import Path

import pytest
from documented_keys import DOCS, documented
from msgspec.structs import replace
from trace_nesting import slices

from megatron_async_rlhf.config.judge import JudgeRewardSection
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.metrics import possible_metrics
from megatron_async_rlhf.config.rewards import FunctionRewardSection
from megatron_async_rlhf.rewards.builtin import BuiltinReward
from megatron_async_rlhf.rewards.function import FunctionReward
from megatron_async_rlhf.rewards.gsm8k import Gsm8kReward
from megatron_async_rlhf.rewards.ifeval import Ifeval
from megatron_async_rlhf.rewards.judge.reward import JudgeReward
from megatron_async_rlhf.rewards.math_answer import MathAnswer
from megatron_async_rlhf.rewards.verifier import Task
from megatron_async_rlhf.simulate.scenario import Scenario
from megatron_async_rlhf.simulate.simulation import Simulation
from megatron_async_rlhf.simulate.virtual_time import run_in_virtual_time
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Completion, Prompt

METRICS = possible_metrics()
MODEL = "model={layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96}"
BY_NAME = {
    "status",
    "versions",
    "eval",
    "staleness.histogram",
    "data.dropped",
}  # what is below these is named by what it is about


def metrics_of(source: str) -> set[str]:
    return {key.name for key in METRICS if key.source == source}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a simulated run with an evaluation."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.yaml").write_text("{}")
    settings = [MODEL, "schedule={steps: 4, prompts_per_step: 4, eval_every: 2}", "data={eval_prompts: 8}"]
    config = load_config(directory / "config.yaml", settings)

    async def whole() -> None:
        simulation = Simulation(config, Scenario(), directory)
        await simulation.run()
        simulation.recorder.close("completed", None)
        Recorder.write_summary(simulation.recorder, "completed", None)

    run_in_virtual_time(whole())
    return directory


def lines(run: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def flat(content: dict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in content.items():
        whole = prefix + name
        below = isinstance(value, dict) and whole not in BY_NAME
        found |= flat(value, whole + ".") if below else {whole}
    return found


def test_the_docs_have_the_metrics_as_those_who_report_them_declare_them():
    rows = [f"| `{key.name}` | {key.unit} | {key.meaning} |" for key in METRICS]
    table = "\n".join(["| key | unit | meaning |", "| --- | --- | --- |", *rows])
    assert table in DOCS.read_text(encoding="utf-8"), f"{DOCS} lacks this table, or has an older one:\n{table}"
    assert len({key.name for key in METRICS}) == len(METRICS)
    assert all(key.unit and key.meaning for key in METRICS)


def test_metrics_of_the_controller(run):
    reported = {name for line in lines(run, "metrics.jsonl") for name in line}
    of_the_learner = {"loss"}  # all that the simulated one reports
    assert reported - of_the_learner == metrics_of("controller")


def test_metrics_of_the_rewards(tmp_path):
    prompt = Prompt(index=0, text="", token_ids=[1], reference={"kind": "copy", "answer": "1", "solution": "#### 1"})
    completion = Completion(token_ids=[1], logprobs=[0.0], versions=[0], finished=True, text="#### 1")
    reported = {
        name for reward in (BuiltinReward(), Gsm8kReward(0.0)) for name in reward.judge(prompt, completion).metrics
    }
    section = FunctionRewardSection(function="nowhere.py:score", on_error="zero")
    (score,) = asyncio.run(FunctionReward(section).score(prompt, [completion]))
    reported |= MathAnswer().judge(Task("", {"solution": "1"}), "1")[1].keys()
    instruction = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    reported |= Ifeval(mode="strict", aggregate="all").judge(Task("", instruction), "1")[1].keys()
    for form in ("pairwise", "pointwise"):  # that nobody answers
        keys = {"form": form, "on_error": "zero", "timeout_s": 0.1, "give_up_s": 0.1}
        section = JudgeRewardSection(url="http://127.0.0.1:9/v1", model="m", **keys)
        (failed, _) = asyncio.run(
            JudgeReward(section, tmp_path).score(prompt, [completion, replace(completion, text="2")])
        )
        reported |= failed.metrics.keys()
    assert reported | set(score.metrics) == metrics_of("reward")


def test_summary(run):
    assert flat(json.loads((run / "summary.json").read_text())) | {"log_tail"} == set(documented("summary.json"))


@pytest.mark.parametrize("file", ["samples.jsonl", "evaluations.jsonl"])
def test_lines(run, file):
    assert {name for line in lines(run, file) for name in line} == set(documented(file))


def test_arguments_of_slices(run):
    found = slices(json.loads((run / "trace.json").read_text()))
    assert {name for events in found.values() for event in events for name in event.get("args", {})} == set(
        documented("trace.json")
    )


def test_step_n_is_the_nth(run):
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [1, 2, 3, 4]
    assert sorted({line["step"] for line in lines(run, "samples.jsonl")}) == [1, 2, 3, 4]
    assert {line["when"] for line in lines(run, "evaluations.jsonl")} == {"step 2"}
    found = slices(json.loads((run / "trace.json").read_text()))
    assert [event["name"] for event in found["learner", "learner"]] == [f"step {n}" for n in (1, 2, 3, 4)]
