"""Run directories written by the recorder of real runs, with made-up figures: short ones, and ones of any length."""

import math
from pathlib import Path
from typing import Any

from small_config import small_config

from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Completion, Prompt, PushReport, RolloutGroup, Span


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...


def leave_reported_run(
    directory: Path,
    *,
    steps: int = 8,
    generators: int = 1,
    step_s: float = 1.0,
    generate_share: float = 0.9,
    train_share: float = 0.8,
    finished: float = 1.0,
    status: str = "completed",
    closed: bool = True,
    seed: int = 0,
    **sections: dict[str, Any],
) -> Path:
    """Of every step generators are busy for one share of the time and the learner for another.

    Args:
        closed: it said how it ended.
    """
    config = small_config(directory, seed, sections, {"schedule": {"steps": steps}})
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))
    now = [1e9]
    recorder = Recorder(config, directory, EventStream(_Nowhere()), generator_bytes=1000, clock=lambda: now[0])
    recorder.evaluated("before", _held_out(0.25), now[0], now[0] + 2, version=0, samples=4)
    recorder.evaluation_samples("before", [_group(0, 0, "one answer of the first policy", 0.0, samples=1)])
    now[0] += 2
    recorder.loop_started(9.0)
    for step in range(1, steps + 1):
        start = now[0]
        now[0] += step_s
        sampling = Span(name="generate", start=start, end=start + generate_share * step_s)
        recorder.generators_were_busy(sampling)
        for number in range(generators):
            span = Span(
                name="generate", start=start, end=sampling.end, process=f"generator.{number}", args={"samples": 4}
            )
            recorder.server_was_busy(span)
        train = Span(
            name=f"step {step}",
            start=start,
            end=start + train_share * step_s,
            process="learner",
            args={"version": step},
        )
        parts = [
            Span(name=name, start=start + begin * step_s, end=start + end * step_s, process="learner.0", lane="train")
            for name, begin, end in (("reference", 0.0, 0.1), ("forward-backward", 0.1, 0.6), ("optimizer", 0.6, 0.7))
        ]
        recorder.learner_was_busy(train, parts)
        push = Span(name=f"push {step}", start=sampling.end, end=now[0], process="weights", args={"version": step})
        report = PushReport(wire_bytes=1000, compared=3, generators=generators)
        recorder.pushed(report, [push])
        group = _group(step, step, f"answer of step {step}", step % 3 - 1.0)
        recorder.generated(group.completions)
        recorder.trained(2, 2, 0)
        recorder.stepped({1: 8, 0: 4}, 12)  # type: ignore[arg-type]
        wave = math.sin(step / 50)
        values = {
            "reward": 0.5 + 0.3 * wave, "kl_to_reference": 0.01 * step, "response_length": 12 + wave, "entropy": 2 - wave / 2,
            "loss": 0.7 - 0.1 * wave, "reward_margin": 1.0, "finished": finished, "staleness/mean": 0.67, "staleness/max": 1,
            "grad_norm": 1.0 + wave, "tokens_per_s": 1000.0, "padding": 0.1, "pairs_skipped_share": 0.0,
        }  # fmt: skip
        recorder.step(step, values)
        recorder.samples(step, [(group, [{"reward": reward, "exact": max(0.0, reward)} for reward in group.rewards])])
    recorder.loop_ended()
    recorder.evaluated("after", _held_out(0.5), now[0], now[0] + 2, version=steps, samples=4)
    recorder.evaluation_samples("after", [_group(0, steps, "one better answer of the last policy", 1.0, samples=1)])
    if closed:
        recorder.close(status, None if status == "completed" else "learner.0: was killed by SIGKILL")
    return directory


def _held_out(reward: float) -> dict[str, float]:
    return {"reward": reward, "response_length": 12.0}


def _group(prompt: int, version: int, text: str, reward: float, samples: int = 2) -> RolloutGroup:
    completions = [
        Completion(token_ids=[1, 2], logprobs=[-1.0, -2.0], versions=[version] * 2, finished=True, text=f"{text}, {n}")
        for n in range(samples)
    ]
    asked = Prompt(index=prompt, text=f"<b>question</b> & {prompt}", token_ids=[3], reference={})
    return RolloutGroup(prompt=asked, completions=completions, rewards=[reward, reward / 2][:samples])
