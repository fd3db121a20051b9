"""Real reward models behind real vLLM pooling servers, which are stopped or killed while something is being scored."""

import asyncio
import io
import json
import os
import signal
from pathlib import Path

import pytest
from test_hangs import descendants, stop
from tiny_reward_model import make_reward_model, scores_of
from trace_nesting import dropped, slices

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.jobs.reward_models import ServedRewards, load_reward_models
from megatron_async_rlhf.launch.layout import lay_out
from megatron_async_rlhf.launch.nodes import this_node
from megatron_async_rlhf.launch.plan import plan_reward_servers
from megatron_async_rlhf.launch.process import LocalProcess
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.run_secret import VARIABLE, secret_path, write_secret
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Completion, Message, Prompt

SHAPE = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
TEXTS = ("yes", "no <eos> no", "", "a longer answer, of several words.")


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_whose_engine_stops_is_replaced_and_every_group_scored_once(tmp_path, monkeypatch, workers):
    """Its HTTP front continues to answer, and `/health` to say 200."""
    directory = make_reward_model(tmp_path / "rm")
    section = {"type": "reward_model", "model": str(directory), "request_timeout_s": 6, "tensor_parallel": workers}
    config = RunConfig.model_validate({"run": {"dir": tmp_path}, "model": SHAPE, "reward": section})
    write_secret(tmp_path)
    monkeypatch.setenv(VARIABLE, str(secret_path(tmp_path)))
    nodes = [this_node(config, gpus=0)]
    (spec,), urls = plan_reward_servers(config, lay_out(config, nodes, replicas=1).rewards, nodes)
    started = [LocalProcess(spec, tmp_path)]

    class Supervising(Recorder):
        """Does what the supervisor of a run does when it is told that a server does nothing."""

        def unresponsive(self, name, error):
            assert name == "reward.0" and "has answered no request for 6 s" in str(error)
            started[-1].kill_group(signal.SIGKILL)
            started[-1].clean_up()
            started.append(LocalProcess(spec, tmp_path))

    reward = make_reward(config.rewards)
    load_reward_models(config, reward, directory)

    async def score(count: int) -> list[list[float]]:
        groups = (reward.score(prompt(i), [completion(text) for text in TEXTS]) for i in range(count))
        return [[score.reward for score in scores] for scores in await asyncio.gather(*groups)]

    async def go() -> tuple[list[list[float]], list[list[float]]]:
        served = ServedRewards(config, reward, urls, Supervising(config, tmp_path, EventStream(io.StringIO())))
        try:
            await served.start(tmp_path, [])
            before = await score(3)
            (engine,) = [
                p for p in descendants(started[0].pid) if "EngineCore" in Path(f"/proc/{p}/cmdline").read_text()
            ]
            os.kill(engine, signal.SIGSTOP)
            return before, await score(6)
        finally:
            await served.close()

    try:
        before, after = asyncio.run(go())
    finally:
        started[-1].kill_group(signal.SIGKILL)
        started[-1].clean_up()
    assert len(started) == 2
    assert after[:3] == before, "one conversation at a time: the same to the last bit"
    plain = [text for text in TEXTS if "<eos>" not in text]  # which Transformers would read as the token
    expected = scores_of(directory, ((f"Question {i}?", text) for i in range(6) for text in plain))
    found = [score for scores in after for text, score in zip(TEXTS, scores, strict=True) if text in plain]
    assert found == pytest.approx(expected, abs=1e-4)


def prompt(index: int) -> Prompt:
    text = f"Question {index}?"
    return Prompt(index=index, text=text, messages=[Message("user", text)], token_ids=[1], reference={})


def completion(text: str) -> Completion:
    return Completion(token_ids=[1], logprobs=[0.0], versions=[0], finished=True, text=text)


STEPS = 8
PARTS = {"engine": "VLLM::EngineCore", "worker": "VLLM::Worker_TP1"}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("how", "generation", "workers"), [("engine", "streaming", 1), ("killed", "batch", 1), ("worker", "batch", 2)]
)
def test_a_lost_reward_model_costs_a_restart_and_no_score(start, tmp_path, how, generation, workers):
    model = make_reward_model(tmp_path / "rm")
    run = start(
        f"reward={{type: reward_model, model: {model}, center_on_solutions: 8, request_timeout_s: 8}}",
        f"reward.tensor_parallel={workers}",
        f"schedule.steps={STEPS}",
        f"schedule.generation={generation}",
        "algorithm.missing_eos_reward=null",
        "launch.pin_cores=false",
    )
    run.wait_for_step(2)
    pid = run.pid("reward.0")
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
    else:
        stop(run, "reward.0", PARTS[how])
    output = run.wait()
    assert run.process.returncode == 0, output
    assert run.pid("reward.0") != pid, output
    assert "reward.0 was killed by SIGKILL; started again (1 of 3)" in output and "reward.0 is back" in output
    if how != "killed":
        assert "reward.0: has answered no request for 8 s" in output
    summary = run.summary()
    assert (summary["status"], summary["steps"], summary["samples_cancelled"]) == ("completed", STEPS, 0)
    assert summary["samples_generated"] == summary["samples_trained"] + summary["samples_not_selected"]
    assert summary["samples_generated"] == STEPS * 8 * 3
    assert 0 < summary["reward_busy_seconds"] <= summary["wall_seconds"]
    assert_scores_are_those_of_transformers(run, model)
    assert_lane_has_every_completion(run)


def assert_scores_are_those_of_transformers(run, directory: Path) -> None:
    """Of held-out completions before and after, the second ones by the server that was started again."""
    center = json.loads((run.directory / "reward_centers.json").read_text())["reward"]
    lines = run.lines("evaluations.jsonl")
    assert len(lines) == 100
    expected = scores_of(directory, ((line["prompt"], line["completion"]) for line in lines))
    assert [line["reward"] + center for line in lines] == pytest.approx(expected, abs=1e-4)


def assert_lane_has_every_completion(run) -> None:
    trace = json.loads((run.directory / "trace.json").read_text())
    assert not dropped(trace)
    scored = slices(trace)["reward.0", "reward.0"]
    # Those that were trained on or passed over, two evaluations, and the solutions that scores are centred on.
    assert sum(event["args"].get("samples", 0) for event in scored if "args" in event) == STEPS * 8 * 3 + 2 * 50 + 8
