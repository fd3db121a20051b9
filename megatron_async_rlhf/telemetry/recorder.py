"""Writes down what a run does: metrics, samples, timeline, summary, progress events and, if asked, W&B and other sinks."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import GeneratorSilentError, LearnerSilentError, WriteError
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import (
    EVALUATIONS,
    METRICS,
    SAMPLES,
    SPANS,
    SUMMARY,
    TRACE,
    WARM_START,
    replace_file,
    writing,
)
from megatron_async_rlhf.telemetry.sinks.ending import end_sink
from megatron_async_rlhf.telemetry.sinks.opening import open_sinks
from megatron_async_rlhf.telemetry.sinks.sink import Sink
from megatron_async_rlhf.telemetry.span_log import SpanLog
from megatron_async_rlhf.telemetry.summary import UNFINISHED, RunTotals
from megatron_async_rlhf.telemetry.trace import write_trace
from megatron_async_rlhf.types import Completion, PushReport, RolloutGroup, Span

_log = logging.getLogger(__name__)


class Recorder:
    """One per run, in the controller. Every line is on disk as soon as it is known, or WriteError is raised."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        events: EventStream,
        *,
        generator_bytes: int = 0,
        totals: RunTotals | None = None,
        clock: Callable[[], float] = now,
    ) -> None:
        """
        Args:
            generator_bytes: of the weights that the workers of one generator hold together.
            totals: of the run so far, if this one continues with it.
            clock: seconds; a simulation has its own.
        """
        self._clock = clock
        self._config = config
        self._dir = run_dir
        self._events = events
        self._generator_bytes = generator_bytes
        self._lines: dict[str, IO[str]] = {}
        for name in (METRICS, SAMPLES):
            with writing(run_dir / name):
                self._lines[name] = (run_dir / name).open("a", buffering=1, encoding="utf-8")
        self._sinks = open_sinks(config, run_dir)
        self._lost_sinks: list[Sink] = []  # they failed, and are told the end alone
        self._spans = SpanLog(run_dir / SPANS)
        self._loop_start: float | None = None
        self.totals = totals or RunTotals.of(config)

    def phase(self, name: str, **fields: Any) -> None:
        """A new phase of the run began: `start`, `warm start`, `evaluate`, `train`, `export`."""
        _log.info("phase: %s", name)
        self._events.emit("phase", name=name, **fields)

    def note(self, text: str) -> None:
        """Something happened that whoever watches the run should know."""
        _log.info("%s", text)
        self._events.emit("note", text=text)

    def activity(self, side: str, what: str) -> None:
        """What `learner` or `generators` is doing from now on."""
        self._events.emit("activity", side=side, what=what)

    def request_servers(self, name: str) -> None:
        """Whoever supervises is to start the servers of this model, in the place of those there are."""
        self._events.emit("serve", name=name)

    def unresponsive(self, name: str, error: GeneratorSilentError | LearnerSilentError) -> None:
        """A server, or the learner, does nothing; its processes may be alive. Whoever supervises is to end them."""
        since = time.monotonic() - error.silent_s  # all processes of a machine share this clock, and nobody can set it
        self._events.emit("unresponsive", name=name, since=since, why=str(error))

    def warm_start_step(self, step: int, values: dict[str, float], spans: Iterable[Span]) -> None:
        self._spans.add(spans)
        path = self._dir / WARM_START
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": self._clock(), **values}) + "\n")
        self._events.emit("warm_start", step=step, steps=self._config.warm_start.steps, loss=values["loss"])
        self._tell_sinks(lambda sink: sink.warm_start(step, values))

    def supervised_step(self, step: int, steps: int, values: dict[str, float], sequences: int, spans: Iterable[Span]):
        """One of supervised fine-tuning, on so many sequences: a line of metrics.jsonl, an event, a step of each sink."""
        self._spans.add(spans)
        line = {"step": step, "time": self._clock(), "num_sequences": sequences, **values}
        self._write_line(METRICS, json.dumps(line))
        self._tell_sinks(lambda sink: sink.step(step, line))
        self.totals.steps += 1
        self.totals.samples_trained += sequences
        if self._loop_start is not None:
            self.totals.wall_s = self.totals.train_busy_s = self._clock() - self._loop_start
        self._events.emit("supervised_step", step=step, steps=steps, loss=values["loss"])
        self.write_summary(*UNFINISHED)

    def loop_started(self, startup_s: float) -> None:
        """The RL loop begins: its wall clock starts, or continues."""
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

    def rewards_failed(self, failures: Sequence[str]) -> None:
        """So many completions earned 0 because a reward failed, which said this."""
        if failures and not self.totals.rewards_failed:
            self.note(f"a reward failed, and its completions earn 0 (the first of such failures): {failures[0]}")
        self.totals.rewards_failed += len(failures)

    def generators_were_busy(self, span: Span) -> None:
        """At least one completion was being sampled."""
        self.totals.generate_busy_s += span.end - span.start

    def reward_models_were_busy(self, span: Span) -> None:
        """At least one completion was being scored by a server."""
        if self._loop_start is not None:  # evaluations before and after are no part of the loop
            self.totals.reward_busy_s += span.end - span.start

    def server_was_busy(self, span: Span) -> None:
        """A generator was sampling, or a reward model's server scoring."""
        self._spans.add([span])

    def learner_was_busy(self, rollout: Span, parts: Sequence[Span]) -> None:
        """A rollout was trained."""
        self.totals.train_busy_s += rollout.end - rollout.start
        self._spans.add((rollout, *parts))

    def trained(self, samples: int, total: int, skipped: int) -> None:
        """The learner has had `samples` of the `total` completions of a mini-batch; `skipped` groups taught nothing."""
        self.totals.samples_trained += samples
        self.totals.samples_not_selected += total - samples
        self.totals.pairs_skipped += skipped

    def stepped(self, ages: Counter[int], tokens: int) -> None:
        """One optimizer step on `tokens`; `ages`: how many tokens of its groups had which staleness."""
        self.totals.steps += 1
        self.totals.tokens_trained += tokens
        self.totals.staleness.update(ages)

    def step(self, step: int, values: dict[str, float]) -> None:
        """All metrics of the `step`-th optimizer step: a line of metrics.jsonl, a progress event, a step of each sink."""
        if self._loop_start is not None:
            self.totals.wall_s = self._clock() - self._loop_start
        line = {"step": step, "time": self._clock(), "time/elapsed_s": self.totals.wall_s, **values}
        self._write_line(METRICS, json.dumps(line))
        self._tell_sinks(lambda sink: sink.step(step, line))
        rate = self.totals.samples_generated / self.totals.wall_s if self.totals.wall_s else 0.0
        self._events.emit(
            "step",
            step=step,
            steps=self._config.schedule.steps,
            reward=values["reward"],
            loss=values.get("loss"),
            kl=values.get("kl_to_reference"),
            staleness=values["staleness/mean"],
            samples_per_s=rate,
        )
        self.write_summary(*UNFINISHED)

    def samples(self, step: int, groups: Sequence[tuple[RolloutGroup, list[dict[str, float]]]]) -> None:
        """The first `telemetry.samples_per_step` groups of a step, readable; with what the reward said of each completion."""
        for group, scores in groups[: self._config.telemetry.samples_per_step]:
            line = {
                "step": step,
                "prompt": group.prompt.text,
                "completions": [c.text for c in group.completions],
                "rewards": group.rewards,
                "scores": scores,
                "versions": [sorted(set(c.versions)) for c in group.completions],
                "finished": [c.finished for c in group.completions],
            }
            self._write_line(SAMPLES, json.dumps(line, ensure_ascii=False))

    def evaluation_samples(self, when: str, groups: Sequence[RolloutGroup]) -> None:
        """Every completion of an evaluation, with its token ids."""
        path = self._dir / EVALUATIONS
        with writing(path), path.open("a", encoding="utf-8") as file:
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
        whole, *parts = spans
        args = whole.args | {"bytes": report.wire_bytes, "digests": report.compared}
        self._spans.add((msgspec.structs.replace(whole, args=args), *parts))
        self.totals.push_bytes.add(report.wire_bytes)
        self.totals.push_bytes_minimum += self._generator_bytes * report.generators
        self.totals.push_s.add(whole.end - whole.start)
        self.totals.digests_compared += report.compared
        self.totals.pushes_verified += report.compared > 0

    def saved(self, version: int, spans: Sequence[Span]) -> None:
        """The checkpoint of a policy version is complete."""
        self._spans.add(spans)
        self._events.emit("checkpoint", version=version)

    def logprob_gaps(self, gaps: Sequence[float]) -> None:
        """|learner - sampler| of tokens both computed under the same version."""
        if gaps:
            self.totals.logprob_gap.add(*gaps)

    def evaluated(
        self,
        when: str,
        metrics: dict[str, float],
        start: float,
        end: float,
        *,
        version: int,
        samples: int,
        tokens: int | None = None,
    ) -> None:
        """Held-out metrics `before` or `after` training, or at a `step` of it, of one policy version.

        Args:
            samples: completions, or answers of the data.
            tokens: of these; default: as the metrics say.
        """
        self.totals.evaluation[when] = metrics
        if tokens is None:
            tokens = round(metrics["response_length"] * samples)
        args: dict[str, int | float] = {"version": version, "samples": samples, "tokens": tokens}
        self._spans.add([Span(name=f"evaluate {when}", start=start, end=end, process="evaluation", args=args)])
        self._events.emit("evaluated", when=when, metrics=metrics)
        values = {f"eval/{name}": value for name, value in metrics.items()}
        self._tell_sinks(lambda sink: sink.evaluation(version, self.totals.steps, values))

    def _tell_sinks(self, tell: Callable[[Sink], None]) -> None:
        """One that fails is told no more: a run outlives the services that show it, and its own files have everything."""
        for sink in list(self._sinks):
            try:
                tell(sink)
            except WriteError:  # of the run's own directory
                raise
            except Exception as error:
                self._sinks.remove(sink)
                self._lost_sinks.append(sink)
                _log.exception("%s failed", type(sink).__name__)
                self.note(f"{type(sink).__name__} failed and gets no more steps, which {METRICS} has: {error!r}")

    def write_summary(self, status: str, error: str | None) -> None:
        """Replace summary.json."""
        path = self._dir / SUMMARY
        with writing(path):
            replace_file(path, json.dumps(self.totals.to_summary(status, error), indent=1) + "\n")

    def save_json(self, file: str, content: Any) -> Path:
        """Keep something for a later look, such as the batch of a non-finite loss."""
        path = self._dir / file
        with writing(path):
            path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))
        return path

    def save_packed(self, file: str, content: object) -> None:
        """A file of its own in the run directory, for programs.

        Raises:
            WriteError: one line.
        """
        with writing(self._dir / file):
            (self._dir / file).write_bytes(msgspec.msgpack.encode(content))

    def close(self, status: str, error: str | None, *, explained: bool = False) -> bool:
        """Final timeline and summary; what cannot be written on a full disk keeps nothing else from being written or told.

        Args:
            explained: the error says all there is to know, so nobody need look into a log.

        Returns:
            Whether everything was written. If not, the run has failed, whatever `status` says.
        """
        self.loop_ended()
        failures = []
        for name, file in self._lines.items():
            failures += self._tried(name, file.close)
        failures += self._tried(TRACE, lambda: write_trace(self._dir / TRACE, self._spans.read()))
        failures += self._tried(SPANS, self._spans.close)
        if failures and status != "failed":
            status, error, explained = "failed", failures[0], True
        unwritten = self._tried(SUMMARY, lambda: self.write_summary(status, error))
        if unwritten and status != "failed":
            status, error, explained = "failed", unwritten[0], True
        summary = self.totals.to_summary(status, error)
        for sink in [*self._sinks, *self._lost_sinks]:
            limit = self._config.telemetry.close_timeout_s
            if not end_sink(sink, summary, failed=status == "failed", timeout_s=limit):
                self.note(
                    f"{type(sink).__name__} was not done within telemetry.close_timeout_s = {limit:g}, and is left; the run's "
                    "own files have everything (for W&B: wandb sync RUN_DIR/wandb/latest-run)"
                )
        # Who supervises has kept room for it.
        passed_on = {"summary": summary} if unwritten else {}
        self._events.emit("closed", status=status, error=error, explained=explained, **passed_on)
        return not failures and not unwritten

    def _write_line(self, name: str, line: str) -> None:
        with writing(self._dir / name):
            self._lines[name].write(line + "\n")

    def _tried(self, name: str, write: Callable[[], object]) -> list[str]:
        """Write a file; what was wrong with it, if anything was."""
        try:
            with writing(self._dir / name):
                write()
        except WriteError as error:
            _log.error("%s", error)
            return [str(error)]
        return []
