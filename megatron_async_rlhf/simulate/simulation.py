"""The real controller, pacer, pool and weight sync among simulated machines, in virtual time.

RunConfig + Scenario ──> Controller <──> GeneratorPool, WeightSync <──> simulated generators, learner
                            │                                                  │
                            ▼                                                  ▼
                    Recorder's totals ─────────> invariants <───────────── ledger
"""

import asyncio
import io
import tempfile
from pathlib import Path
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import ScheduleSection
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.errors import GeneratorSilentError
from megatron_async_rlhf.generator.protocol import Generator
from megatron_async_rlhf.rewards.base import Score, Verifier
from megatron_async_rlhf.scheduler.controller import Controller
from megatron_async_rlhf.scheduler.pool import GeneratorPool
from megatron_async_rlhf.scheduler.state import BEGINNING, ControllerState
from megatron_async_rlhf.scheduler.weight_sync import WeightSync
from megatron_async_rlhf.simulate.exchange import Exchange
from megatron_async_rlhf.simulate.faults import inject_faults
from megatron_async_rlhf.simulate.generator import SimulatedGenerator, utilisation
from megatron_async_rlhf.simulate.invariants import HELD_OUT, CheckedEvaluation, Ledger
from megatron_async_rlhf.simulate.learner import SimulatedLearner
from megatron_async_rlhf.simulate.scenario import Scenario
from megatron_async_rlhf.simulate.virtual_time import run_in_virtual_time
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.telemetry.summary import RunTotals
from megatron_async_rlhf.types import Completion, Prompt


class Outcome(Struct, frozen=True, kw_only=True):
    """Of a simulated run that kept all promises.

    Attributes:
        decoding: share of their time that engines decoded, on average; `frozen`: were kept from it by a push.
        at_once: sequences an engine decoded together.
        step_s: from one optimizer step to the next, without the first rollouts, which began together.
    """

    totals: RunTotals
    decoding: float
    frozen: float
    at_once: float
    step_s: float


class HashReward(Verifier):
    """No two samples are alike."""

    def check(self, prompt: Prompt) -> None:
        pass

    def judge(self, prompt: Prompt, completion: Completion) -> Score:
        number = completion.token_ids[0] if completion.token_ids else 0
        return Score(reward=(number * 2654435761 % 2**32) / 2**32, metrics={})


class NoCheckpoints:
    """Nothing is saved."""

    def observe(self, metrics: dict[str, float]) -> None:
        pass

    def is_due(self, version: int) -> bool:
        return False

    def is_saved(self, version: int) -> bool:
        return True

    async def start(self, state: ControllerState) -> None: ...

    async def complete(self, *, deletes: bool = True) -> None: ...


class Simulation:
    """Everything of one simulated run, or of the part of it after `state`; made inside its event loop."""

    def __init__(
        self,
        config: RunConfig,
        scenario: Scenario,
        directory: Path,
        *,
        ledger: Ledger | None = None,
        state: ControllerState = BEGINNING,
        totals: RunTotals | None = None,
        forgets: bool = True,
    ) -> None:
        """
        Args:
            directory: for files.
            ledger, totals: of the run so far.
            forgets: the learner does not keep what it was given.
        """
        clock = asyncio.get_running_loop().time
        self.config, self.scenario = config, scenario
        self.ledger = ledger or Ledger(config)
        exchange = Exchange(scenario.speeds.push_s, config.weights.timeout_s)
        self.learner = SimulatedLearner(scenario.speeds, self.ledger, exchange, version=state.version, forgets=forgets)
        self.generators = [
            SimulatedGenerator(
                f"generator.{i}",
                scenario,
                self.ledger,
                exchange,
                config.generator,
                version=state.version,
                slowness=scenario.slowness.get(i, 1.0),
            )
            for i in range(scenario.generators)
        ]
        self.recorder = _Recorder(config, directory, EventStream(_Nowhere()), totals=totals, clock=clock)
        self.pool = GeneratorPool(
            self.generators,
            max_concurrent=config.generator.max_concurrent,
            return_timeout_s=config.generator.start_timeout_s,
            silence_limit_s=config.generator.probe_timeout_s + config.weights.timeout_s,
            on_lost=lambda generator, samples: self.recorder.cancelled(samples),
            on_silent=_kill,
        )
        self.controller = Controller(
            config,
            learner=self.learner,
            pool=self.pool,
            weight_sync=WeightSync(self.learner, config, ("learner", 0), clock),
            reward=HashReward(),
            prompts=_Prompts(scenario.prompt_tokens),
            recorder=self.recorder,
            checkpoints=NoCheckpoints(),
            evaluation=self._evaluation(),
            rollouts=self.ledger,
            state=state,
            clock=clock,
        )

    async def run(self) -> None:
        """The RL loop, and what befalls the generators meanwhile."""
        faults = asyncio.create_task(inject_faults(self.scenario, self.generators))
        self.recorder.loop_started(0.0)
        try:
            await self.controller.run()
        finally:
            faults.cancel()
            self.recorder.loop_ended()
        if faults.done() and not faults.cancelled():
            faults.result()

    def outcome(self) -> Outcome:
        """After a whole run.

        Raises:
            InvariantError: something is missing or does not add up.
        """
        self.ledger.check_end(self.recorder.totals)
        decoding, frozen, at_once = utilisation(self.generators, self.recorder.totals.wall_s)
        totals, step_s = self.recorder.totals, self.recorder.step_s(steps_under_way(self.config.schedule))
        return Outcome(totals=totals, decoding=decoding, frozen=frozen, at_once=at_once, step_s=step_s)

    def _evaluation(self) -> CheckedEvaluation | None:
        if self.config.schedule.eval_every is None:
            return None
        size = self.scenario.prompt_tokens
        prompts = [_prompt(HELD_OUT + i, size) for i in range(self.config.data.eval_prompts)]
        evaluation = CheckedEvaluation(
            self.config, prompts, HashReward(), self.recorder, asyncio.get_running_loop().time
        )
        evaluation.ledger = self.ledger
        return evaluation


def simulate(config: RunConfig, scenario: Scenario, trace: Path | None = None) -> Outcome:
    """One run from its first step to its last.

    Args:
        trace: file for the timeline, in virtual time.

    Raises:
        DeadlockError, InvariantError, StaleSampleError: a bug, here or in the scheduler.
        GeneratorError: what befell the generators was too much.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:

        async def whole() -> Outcome:
            simulation = Simulation(config, scenario, Path(directory))
            await simulation.run()
            simulation.recorder.close("completed", None)
            return simulation.outcome()

        try:
            outcome = run_in_virtual_time(whole(), patience_s=_patience(config, scenario))
        except BaseExceptionGroup as group:
            raise _first_of(group) from group
        if trace is not None:
            trace.write_bytes((Path(directory) / "trace.json").read_bytes())
        return outcome


def _patience(config: RunConfig, scenario: Scenario) -> float:
    """Longer than any wait that the configuration limits."""
    waits = (config.generator.start_timeout_s, config.generator.request_timeout_s, config.weights.timeout_s)
    return 10 * (sum(waits) + config.learner.timeout_s + scenario.back_s)


def _first_of(group: BaseExceptionGroup) -> BaseException:
    error = group.exceptions[0]
    return _first_of(error) if isinstance(error, BaseExceptionGroup) else error


def _kill(generator: Generator, error: GeneratorSilentError) -> None:
    """As the supervisor does, which owns the process."""
    assert isinstance(generator, SimulatedGenerator)
    generator.kill(since=asyncio.get_running_loop().time() - error.silent_s)


class _Prompts(PromptOrder):
    """Prompts without end; the first token is the group's number."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def at(self, position: int) -> Prompt:
        return _prompt(position, self._tokens)


def _prompt(number: int, tokens: int) -> Prompt:
    return Prompt(index=number, text="", token_ids=[number] + [0] * (tokens - 1), reference={})


def steps_under_way(schedule: ScheduleSection) -> int:
    """Of the rollouts that are sampled at once when a run begins: they end together, as no later ones do."""
    bound = schedule.staleness_bound if schedule.generation == "streaming" else None
    return schedule.updates_per_rollout + (bound or 0)


class _Recorder(Recorder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stepped: list[float] = []

    def step(self, step: int, values: dict[str, float]) -> None:
        super().step(step, values)
        self._stepped.append(self._clock())

    def step_s(self, first: int) -> float:
        """Mean time of a step after the `first` ones, or half of them if there are so few; of all, if there is one."""
        first = min(first, max(1, len(self._stepped) // 2))
        later = len(self._stepped) - first
        if later <= 0:
            return self.totals.wall_s / max(1, self.totals.steps)
        return (self._stepped[-1] - self._stepped[first - 1]) / later

    def write_summary(self, status: str, error: str | None) -> None:
        """Nobody looks at it while the simulation goes."""


class _Nowhere(io.StringIO):
    """Takes every line."""

    def write(self, text: str) -> int:
        return len(text)
