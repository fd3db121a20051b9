"""Writes down what a run does: metrics, samples, timeline, summary, progress events and, if asked, W&B."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import EVALUATIONS, METRICS, SAMPLES, SUMMARY, TRACE, WARM_START, replace_file
from megatron_async_rlhf.telemetry.summary import UNFINISHED, RunTotals
from megatron_async_rlhf.telemetry.trace import write_trace
from megatron_async_rlhf.telemetry.wandb_log import WandbLog
from megatron_async_rlhf.types import Completion, PushReport, RolloutGroup, Span

_log = logging.getLogger(__name__)


class Recorder:
    """One per run, in the controller. Every line is on disk as soon as it is known."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        events: EventStream,
        *,
        bytes_held_by_generators: int,
        totals: RunTotals | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`totals`: of the run so far, if this one goes on with it. `clock`: seconds; a simulation has its own."""
        self._clock = clock
        self._config = config
        self._dir = run_dir
        self._events = events
        self._minimum_bytes = bytes_held_by_generators
        self._metrics = (run_dir / METRICS).open("a", buffering=1, encoding="utf-8")
        self._samples = (run_dir / SAMPLES).open("a", buffering=1, encoding="utf-8")
        self._wandb = WandbLog(config, run_dir)
        self._spans: list[Span] = []
        self._loop_start: float | None = None
        self.totals = totals or RunTotals.of(config)

    def stage(self, name: str, **fields: Any) -> None:
        """A new stage of the run began: `starting`, `warm start`, `evaluate`, `train`, `export`."""
        _log.info("stage: %s", name)
        self._events.emit("stage", name=name, **fields)

    def activity(self, side: str, what: str) -> None:
        """What `learner` or `generators` is doing from now on."""
        self._events.emit("activity", side=side, what=what)

    def warm_start_step(self, step: int, values: dict[str, float], spans: Iterable[Span]) -> None:
        self._spans += spans
        with (self._dir / WARM_START).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": self._clock(), **values}) + "\n")
        self._events.emit("warm_start", step=step + 1, steps=self._config.warm_start.steps, loss=values["loss"])
        self._wandb.warm_start(step, values)

    def loop_started(self, startup_s: float) -> None:
        """The RL loop begins: its wall clock starts, or goes on."""
        self.totals.startup_s += startup_s
        self._loop_start = self._clock() - self.totals.wall_s

    def loop_ended(self) -> None:
        if self._loop_start is not None:
            self.totals.wall_s = self._clock() - self._loop_start
            self._loop_start = None

    def generated(self, completions: Iterable[Completion]) -> None:
        """These completions came whole."""
        for completion in completions:
            self.totals.samples_generated += 1
            self.totals.tokens_generated += len(completion.token_ids)

    def cancelled(self, samples: int) -> None:
        """So many completions were begun and given up."""
        self.totals.samples_generated += samples
        self.totals.samples_cancelled += samples

    def generators_were_busy(self, span: Span) -> None:
        """At least one completion was being sampled."""
        self.totals.generate_busy_s += span.end - span.start
        self._spans.append(span)

    def learner_was_busy(self, spans: Sequence[Span]) -> None:
        """A rollout took `spans[0]`."""
        self.totals.train_busy_s += spans[0].end - spans[0].start
        self._spans += spans

    def trained(self, samples: int, of: int, skipped: int) -> None:
        """The learner has had `samples` of the `of` completions of a mini-batch; `skipped` groups taught nothing."""
        self.totals.samples_trained += samples
        self.totals.samples_dropped += of - samples
        self.totals.pairs_skipped += skipped

    def stepped(self, ages: Counter[int], tokens: int) -> None:
        """One optimizer step on `tokens`; `ages`: how many tokens of its groups had which staleness."""
        self.totals.steps += 1
        self.totals.tokens_trained += tokens
        self.totals.staleness.update(ages)

    def step(self, step: int, values: dict[str, float]) -> None:
        """All metrics of one optimizer step: a line of metrics.jsonl, a progress event, a W&B step."""
        line = {"step": step, "time": self._clock(), **values}
        self._metrics.write(json.dumps(line) + "\n")
        self._wandb.step(step, line)
        if self._loop_start is not None:
            self.totals.wall_s = self._clock() - self._loop_start
        rate = self.totals.samples_generated / self.totals.wall_s if self.totals.wall_s else 0.0
        self._events.emit(
            "step",
            step=step + 1,
            steps=self._config.schedule.steps,
            reward=values["reward"],
            loss=values.get("loss"),
            kl=values.get("kl_to_reference"),
            staleness=values["staleness/mean"],
            samples_per_s=rate,
        )
        self.write_summary(*UNFINISHED)

    def samples(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """The first `telemetry.samples_per_step` groups of a step, readable."""
        for group in groups[: self._config.telemetry.samples_per_step]:
            line = {
                "step": step,
                "prompt": group.prompt.text,
                "completions": [c.text for c in group.completions],
                "rewards": group.rewards,
                "versions": [sorted(set(c.versions)) for c in group.completions],
                "finished": [c.finished for c in group.completions],
            }
            self._samples.write(json.dumps(line, ensure_ascii=False) + "\n")

    def evaluation_samples(self, when: str, groups: Sequence[RolloutGroup]) -> None:
        """Every completion of an evaluation, with its token ids."""
        with (self._dir / EVALUATIONS).open("a", encoding="utf-8") as file:
            for group in groups:
                for completion, reward in zip(group.completions, group.rewards, strict=True):
                    line = {
                        "when": when,
                        "prompt": group.prompt.text,
                        "prompt_token_ids": group.prompt.token_ids,
                        "completion": completion.text,
                        "token_ids": completion.token_ids,
                        "reward": reward,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def mismatched(self, compared: int, mismatches: int) -> None:
        """A push whose weights were not the learner's."""
        self.totals.digests_compared += compared
        self.totals.mismatches += mismatches

    def pushed(self, report: PushReport, spans: Sequence[Span]) -> None:
        """A push took `spans[0]`."""
        self.totals.push_bytes.add(report.wire_bytes)
        self.totals.push_bytes_minimum += self._minimum_bytes
        self.totals.push_s.add(spans[0].end - spans[0].start)
        self.totals.digests_compared += report.compared
        self.totals.pushes_verified += report.compared > 0
        self._spans += spans

    def saved(self, version: int, spans: Sequence[Span]) -> None:
        """The checkpoint of a policy version is complete."""
        self._spans += spans
        self._events.emit("checkpoint", version=version)

    def logprob_gaps(self, gaps: Sequence[float]) -> None:
        """|learner - sampler| of tokens both computed under the same version."""
        if gaps:
            self.totals.logprob_gap.add(*gaps)

    def evaluated(self, when: str, metrics: dict[str, float], span: Span) -> None:
        """Held-out metrics `before` or `after` RL, or at a `step` of it."""
        self.totals.evaluation[when] = metrics
        self._spans.append(span)
        self._events.emit("evaluated", when=when, metrics=metrics)
        self._wandb.step(self.totals.steps, {f"eval/{name}": value for name, value in metrics.items()})

    def write_summary(self, status: str, error: str | None) -> None:
        """Replace summary.json."""
        replace_file(self._dir / SUMMARY, json.dumps(self.totals.to_summary(status, error), indent=1) + "\n")

    def save_json(self, file: str, content: Any) -> Path:
        """Keep something for a later look, such as the batch of a non-finite loss."""
        path = self._dir / file
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))
        return path

    def close(self, status: str, error: str | None) -> None:
        """Final summary and timeline."""
        self.loop_ended()
        self.write_summary(status, error)
        write_trace(self._dir / TRACE, self._spans)
        self._metrics.close()
        self._samples.close()
        self._wandb.close(self.totals.to_summary(status, error), failed=status == "failed")
        self._events.emit("closed", status=status, error=error)
