"""The generators' side of the loop: prompts become complete, scored groups.

    Pacer.admit ──> a sampling task per group, or per rollout ──> completions ──> rewards ──> `ready`

`generation: batch` samples a rollout together, and the held-out prompts with it when an evaluation is due;
`streaming` starts each group as soon as it is admitted and a generator has room. An evaluation holds pushes back until its
prompts are answered, so that it sees one policy version, while training prompts continue being sampled. Nothing but a checkpoint
and the end of the run waits until the answers are scored.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.errors import RewardError
from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.generator.seeds import request_seed
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.scheduler.evaluation import Evaluation
from megatron_async_rlhf.scheduler.pacing import Pacer, Ticket
from megatron_async_rlhf.scheduler.pool import GeneratorPool
from megatron_async_rlhf.scheduler.scoring import ScoredGroup, score_group
from megatron_async_rlhf.scheduler.signal import Signal
from megatron_async_rlhf.scheduler.state import ReadyGroup
from megatron_async_rlhf.telemetry.busy import ServersBusy
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Completion


class Generation:
    """Sampling tasks and what came of them.

    Attributes:
        ready: complete groups by index; the pacer says which of them are still to be trained.
        busy: when anything is being sampled.
        evaluated: the last version whose evaluation has ended, scores included.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        pacer: Pacer,
        pool: GeneratorPool,
        reward: Reward,
        prompts: PromptOrder,
        recorder: Recorder,
        changed: Signal,
        ready: Sequence[ReadyGroup] = (),
        evaluation: Evaluation | None = None,
        evaluated: int = 0,
        on_failure: Callable[[RewardError], None],
        clock: Callable[[], float] = now,
    ) -> None:
        """
        Args:
            on_failure: told of a reward that failed; what it failed on is given up.
        """
        self._config = config
        self._schedule = config.schedule
        self._pacer = pacer
        self._pool = pool
        self._reward = reward
        self._prompts = prompts
        self._recorder = recorder
        self._changed = changed
        self._evaluation = evaluation
        self.evaluated = evaluated
        self._evaluating: int | None = None  # the version whose turn it is
        self._answered = evaluated  # the last version whose held-out prompts were
        self._scoring: dict[int, asyncio.Task] = {}  # of answers, by their version
        self._evaluation_waits = False
        self._evaluation_task: asyncio.Task | None = None
        self._on_failure = on_failure
        self._clock = clock
        self._samplers: dict[int, asyncio.Task] = {}  # by group index; those of a rollout share one
        self._sampled: set[int] = set()  # groups that only wait for their rewards
        self.ready = {group.index: group for group in ready}
        self.busy = ServersBusy(clock, on_any=recorder.generators_were_busy, on_one=recorder.server_was_busy)

    def cancel(self) -> None:
        """Give up what is under way."""
        for task in (*self._samplers.values(), *self._scoring.values(), self._evaluation_task):
            if task is not None:
                task.cancel()

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Consumes prompts, starts sampling tasks; waits for admission; unblocked by pushes and finished groups."""
        self._tasks = tasks
        while True:
            await self._changed.wait_until(lambda: self._admissible() or self._may_evaluate())
            evaluating = self._may_evaluate()
            if evaluating:
                self._evaluation_waits = False
            tickets = self._pacer.admit(self._admissible())
            if self._schedule.generation == "batch":
                task = tasks.create_task(self._sample_rollout(tickets, evaluating))
                self._samplers |= {ticket.index: task for ticket in tickets}
                if evaluating:
                    self._evaluation_task = task
                continue
            for ticket in tickets:
                self._samplers[ticket.index] = tasks.create_task(self._sample_group(ticket))
            if evaluating:
                self._evaluation_task = tasks.create_task(self._evaluate())
            await asyncio.sleep(0)  # lets them take their places, so that what is left is known

    def _admissible(self) -> int:
        return self._pacer.admissible(-(-self._pool.room // self._config.algorithm.samples_per_prompt))

    def weights_arrived(self) -> None:
        """The generators hold a new version. If it is to be evaluated, no other is pushed before that is done.

        That is the first version they get after each `eval_every` steps, or the next if a generator was lost then; the
        last one is evaluated after the loop.
        """
        every, version = self._schedule.eval_every, self._pacer.pushed_version
        if self._evaluation is None or every is None or version == self._schedule.steps:
            return
        if self._evaluating is None and version // every > self._answered // every:
            self._evaluating = version
            self._pacer.begin_evaluation()
            self._evaluation_waits = True

    def _may_evaluate(self) -> bool:
        """Together with a rollout, which must not start beside it later: not before there are generators for both."""
        waits_for_rollout = self._schedule.generation == "batch" and bool(self._pacer.running)
        return self._evaluation_waits and bool(self._pool.serving) and not (waits_for_rollout or self._pacer.pushing)

    @property
    def is_scoring_evaluation(self) -> bool:
        return bool(self._scoring)

    async def _sample_rollout(self, tickets: list[Ticket], evaluating: bool) -> None:
        """A rollout, and the held-out prompts if they are due, in one go: everything starts and ends together."""
        start = self._clock()
        requests = [self._request(ticket) for ticket in tickets]
        extra = self._held_out() if evaluating else []
        scoring: dict[int, asyncio.Task[ScoredGroup]] = {}  # by place; each begins when its completions are there
        async with self._under_way(len(tickets)), _tasks() as tasks:

            def score(place: int, completions: list[Completion]) -> None:
                if place < len(tickets):
                    scoring[place] = tasks.create_task(self._score(tickets[place], completions))

            with self.busy.any:
                completions = await self._pool.sample_together([*requests, *extra], score)
            took = self._clock() - start
            scored = await asyncio.gather(*(scoring[place] for place in range(len(tickets))))
            for ticket, group in zip(tickets, scored, strict=True):
                self._arrived(ticket, group, took)
            if evaluating:
                self._held_out_answered(completions[len(requests) :], start)

    async def _sample_group(self, ticket: Ticket) -> None:
        start = self._clock()
        async with self._under_way(1):
            with self.busy.any:
                completions = await self._pool.sample(self._request(ticket))
            took = self._clock() - start
            self._sampled.add(ticket.index)
            self._arrived(ticket, await self._score(ticket, completions), took)

    async def _evaluate(self) -> None:
        start = self._clock()
        async with self._under_way(0):
            with self.busy.any:
                completions = await asyncio.gather(*(self._pool.sample(r) for r in self._held_out()))
            self._held_out_answered(completions, start)

    def _held_out(self) -> list[SamplingRequest]:
        assert self._evaluation is not None  # or none would be due
        return self._evaluation.requests()

    def _held_out_answered(self, completions: Sequence[list[Completion]], start: float) -> None:
        version, self._evaluating = self._evaluating, None
        assert self._evaluation is not None and version is not None  # since it was due
        self._pacer.end_evaluation()
        versions = {version for (completion,) in completions for version in completion.versions}
        if versions - {version}:  # a generator died with its part, and what was left met newer weights
            self._recorder.note(f"no evaluation at step {version}: a generator was lost meanwhile")
            return
        self._answered = version
        self._scoring[version] = self._tasks.create_task(self._score_evaluation(version, completions, start))

    async def _score_evaluation(self, version: int, completions: Sequence[list[Completion]], start: float) -> None:
        assert self._evaluation is not None  # whose prompts were answered
        async with self._under_way(0):
            try:
                await self._evaluation.finish(f"step {version}", completions, start, version=version)
                self.evaluated = max(self.evaluated, version)
            finally:
                del self._scoring[version]

    @asynccontextmanager
    async def _under_way(self, groups: int) -> AsyncIterator[None]:
        """Around the sampling and scoring of so many groups: keeps account of what is given up."""
        samples = groups * self._config.algorithm.samples_per_prompt
        try:
            yield
        except asyncio.CancelledError:
            self._recorder.cancelled(samples)
            raise
        except RewardError as error:
            self._recorder.cancelled(samples)
            self._on_failure(error)
        finally:
            await self._changed.notify()

    def _request(self, ticket: Ticket) -> SamplingRequest:
        config, (step, position) = self._config, divmod(ticket.index, self._schedule.prompts_per_step)
        again = (ticket.attempt,) if ticket.attempt else ()
        return SamplingRequest(
            prompt=self._prompts.at(ticket.index),
            samples=config.algorithm.samples_per_prompt,
            seed=request_seed(config.run.seed, "train", step, position, *again),
            temperature=config.generator.temperature,
            max_new_tokens=config.generator.max_new_tokens,
            order=ticket.number,
        )

    async def _score(self, ticket: Ticket, completions: list[Completion]) -> ScoredGroup:
        config, prompt = self._config, self._prompts.at(ticket.index)
        return await score_group(prompt, completions, self._reward, config.algorithm, config.generator.max_new_tokens)

    def _arrived(self, ticket: Ticket, scored: ScoredGroup, generate_s: float) -> None:
        self._pacer.arrived(ticket.index)
        del self._samplers[ticket.index]
        self._sampled.discard(ticket.index)
        self.ready[ticket.index] = ReadyGroup(
            index=ticket.index, version=ticket.version, scored=scored, generate_s=generate_s
        )
        self._recorder.generated(scored.group.completions)
        self._recorder.rewards_failed(scored.failures)

    async def resample_stragglers(self, limit_s: float) -> None:
        """Cancels groups the learner has waited for in vain, and has them sampled anew."""
        while True:
            await self._changed.wait_until(self._stragglers)
            late = self._stragglers()
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._waited_for_no_more(late)
                continue
            for index in late & self._stragglers():
                self._samplers.pop(index).cancel()
                self._pacer.sample_anew(index)
            await self._changed.notify()

    async def _waited_for_no_more(self, late: set[int]) -> None:
        await self._changed.wait_until(lambda: not late & self._stragglers())

    def _stragglers(self) -> set[int]:
        """Not those that are being scored: sampled anew they would be later still, and may have cost a judge already."""
        return self._pacer.stragglers() - self._sampled


@asynccontextmanager
async def _tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Tasks beside the body; the first of all that fails ends all, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
