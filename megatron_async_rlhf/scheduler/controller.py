"""The RL loop: groups of completions flow to the learner, policy versions flow back to the generators.

    prompts ──> generation loop ──> complete groups, scored ──> learning loop ──> optimizer steps ──┐
                     ▲                                               │                              │
                     └────────────── weights, version v+1 <──────────┴──────── version v+1 <────────┘

- generation loop: consumes prompts, starts a sampling task per group (`generation: streaming`) or per rollout
  (`batch`), whose completions are scored and become ready; waits for `Pacer.admissible`, which a push, a group's end or
  room on a generator unblock.
- learning loop: consumes ready groups, produces policy versions; starts pushing them whenever the generators can take
  them, trains otherwise, also while a push is under way; waits for either to be possible. Where the generators are not
  ready for a version when its training step begins, its push is on offer until that step changes the weights.
- beside them: lost generators are watched for, stragglers are cancelled and sampled anew.

Between two rollouts the state is small: the version, the groups that are ready, the numbers of those under way. When a
checkpoint is due the learning loop freezes it there and continues; writing it ends in the background.

Synchronous training is the same loop with a staleness bound of 0, which leaves the two sides no room to overlap.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import fmean

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.errors import AsyncRLHFError, GeneratorError, NonFiniteLossError, RewardError
from megatron_async_rlhf.learner.protocol import Learner, TrainRollout, rollout_span
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.scheduler.evaluation import Evaluation
from megatron_async_rlhf.scheduler.generation import Generation
from megatron_async_rlhf.scheduler.pacing import Pacer
from megatron_async_rlhf.scheduler.pool import GeneratorPool
from megatron_async_rlhf.scheduler.pushes import Pushes
from megatron_async_rlhf.scheduler.recording import RecordedRollout, RolloutSink
from megatron_async_rlhf.scheduler.scoring import logprob_gaps, mean_entropy, mean_facts
from megatron_async_rlhf.scheduler.signal import Signal
from megatron_async_rlhf.scheduler.state import BEGINNING, Checkpoints, ControllerState, ReadyGroup
from megatron_async_rlhf.scheduler.training_batch import TrainingBatch, select_training_samples
from megatron_async_rlhf.scheduler.weight_sync import WeightSync
from megatron_async_rlhf.telemetry.files import FAILED_BATCH, FAILED_ROLLOUT
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.telemetry.summary import staleness_figures


class Controller:
    """Runs up to `schedule.steps` optimizer steps on generators that already hold the version of `state`."""

    def __init__(
        self,
        config: RunConfig,
        *,
        learner: Learner,
        pool: GeneratorPool,
        weight_sync: WeightSync,
        reward: Reward,
        prompts: PromptOrder,
        recorder: Recorder,
        checkpoints: Checkpoints,
        evaluation: Evaluation | None = None,
        rollouts: RolloutSink | None = None,
        state: ControllerState = BEGINNING,
        clock: Callable[[], float] = now,
    ) -> None:
        """
        Args:
            evaluation: of held-out prompts, every `schedule.eval_every` steps.
            rollouts: told of each one before it is trained.
            clock: seconds; a simulation has its own.
        """
        self._config = config
        self._schedule = config.schedule
        self._learner = learner
        self._pool = pool
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._rollouts = rollouts
        self._clock = clock
        self._pacer = Pacer(config.schedule, state.version, state.admitted)
        self._pacer.restore([(group.index, group.version) for group in state.ready], state.unfinished)
        self._changed = Signal()
        pool.on_change = self._changed.notify
        self._generation = Generation(
            config,
            pacer=self._pacer,
            pool=pool,
            reward=reward,
            prompts=prompts,
            recorder=recorder,
            changed=self._changed,
            ready=state.ready,
            evaluation=evaluation,
            evaluated=state.version if state.evaluated is None else state.evaluated,
            on_failure=self._give_up,
            clock=clock,
        )
        pool.busy = self._generation.busy
        self._pushes = Pushes(
            config.schedule, self._pacer, pool, weight_sync, self._generation, recorder, self._changed
        )
        self._evaluation = evaluation
        self._rewards = state.rewards
        self._save: asyncio.Task | None = None
        self._stopping = False
        self._failure: RewardError | GeneratorError | None = None

    async def run(self) -> None:
        """Until the last step is trained and pushed, or `stop` was called.

        Raises:
            RewardError, GeneratorError: a reward failed, or no generator is left. The rollout under way was finished first, so
                that `state` can be saved.
            ExceptionGroup: of whatever learner, generators or pacing raised first.
        """
        if self._stopping:
            return
        async with asyncio.TaskGroup() as tasks:
            self._tasks = self._pushes.tasks = tasks
            self._generation.weights_arrived()  # an evaluation that was due when the state was saved
            await self._pool.resume()
            beside = [
                tasks.create_task(self._generation.run(tasks)),
                tasks.create_task(self._watch()),
            ]
            if self._schedule.straggler_s is not None:
                beside.append(tasks.create_task(self._generation.resample_stragglers(self._schedule.straggler_s)))
            await self._learning_loop()
            await self._evaluation_scored()
            for task in beside:
                task.cancel()
            self._generation.cancel()
        if self._failure is not None:
            raise self._failure

    async def evaluate(self, when: str) -> None:
        """Record held-out metrics of the version that learner and generators are at, before or after `run`.

        Raises:
            ExceptionGroup: of whatever learner, generators or rewards raised first.
        """
        assert self._evaluation is not None  # whoever calls this gave one
        async with asyncio.TaskGroup() as tasks:
            self._tasks = self._pushes.tasks = tasks
            beside = [tasks.create_task(self._pool.watch(self._pushes.returned)), tasks.create_task(self._restore())]
            self._pacer.begin_evaluation()
            start = self._clock()
            completions = await self._pool.sample_together(self._evaluation.requests())
            await self._evaluation.finish(when, completions, start, version=self.version, learner=self._learner)
            self._pacer.end_evaluation()
            for task in beside:
                task.cancel()

    async def _restore(self) -> None:
        """Give the version once more to generators that came back, whenever no other is left."""
        while True:
            await self._changed.wait_until(self._pushes.may_start)
            await self._pushes.start()

    async def stop(self) -> None:
        """Finish the rollout and push under way, then let `run` return."""
        self._stopping = True
        await self._changed.notify()

    async def _watch(self) -> None:
        try:
            await self._pool.watch(self._pushes.returned)
        except GeneratorError as error:  # the learner is well, and what it has is worth saving
            self._give_up(error)
            await self._changed.notify()

    def _give_up(self, error: RewardError | GeneratorError) -> None:
        """End as `stop` does, and say why. Whoever calls it notifies."""
        self._stopping, self._failure = True, self._failure or error

    @property
    def version(self) -> int:
        return self._pacer.trained_version

    @property
    def state(self) -> ControllerState:
        """What another controller can continue from; between rollouts, or after `run`."""
        return ControllerState(
            version=self._pacer.trained_version,
            admitted=self._pacer.admitted,
            ready=[self._generation.ready[index] for index in self._pacer.ready],
            unfinished=self._pacer.unfinished,
            rewards=self._rewards,
            evaluated=self._generation.evaluated,
        )

    async def _learning_loop(self) -> None:
        """Consumes ready groups, produces versions; waits for a rollout or for generators that can take weights."""
        while True:
            await self._changed.wait_until(
                lambda: self._is_over() or self._pushes.may_start() or self._pacer.next_rollout()
            )
            if self._is_over():
                return
            if self._pushes.may_start():
                await self._pushes.start()
                continue
            tickets, arrivals, before = self._pacer.next_rollout(), list(self._pacer.ready), self.state
            assert tickets is not None  # which was waited for
            self._pacer.begin_training(tickets)
            await self._train([self._generation.ready.pop(ticket.index) for ticket in tickets], arrivals, before)
            if self._checkpoints.is_due(self.version):
                await self._start_save()
            self._pacer.end_training()
            await self._changed.notify()

    async def _evaluation_scored(self) -> None:
        """Unless the run is to stop: what is evaluated then is evaluated when it continues."""
        await self._changed.wait_until(lambda: self._stopping or not self._generation.is_scoring_evaluation)

    def _is_over(self) -> bool:
        if self._pacer.pushing:
            return False
        return self._stopping or self._pacer.trained_version == self._pacer.pushed_version == self._schedule.steps

    async def _train(self, rollout: list[ReadyGroup], arrivals: list[int], before: ControllerState) -> None:
        """One rollout, chosen when the groups of `arrivals` were complete.

        Raises:
            NonFiniteLossError: and the rollout is kept, with the state `before` it.
        """
        version, schedule = self._pacer.trained_version, self._schedule
        size = schedule.prompts_per_step
        parts = [rollout[i : i + size] for i in range(0, len(rollout), size)]
        batches = [self._mini_batch(part) for part in parts]
        versions = [_versions(part) for part in parts]
        ages = [
            self._pacer.staleness(versions[update % len(parts)], update)
            for update in range(schedule.updates_per_rollout)
        ]
        self._recorder.activity("learner", f"step {version + 1}")
        command = TrainRollout(
            version=version, mini_batches=[batch.groups for batch in batches], epochs=schedule.epochs
        )
        if self._rollouts is not None:
            self._rollouts.write(command, rollout, arrivals)
        await self._pushes.offer()
        start = self._clock()
        try:
            answer = await self._learner.execute(command)
        except NonFiniteLossError as error:
            told = await self._keep_failed(RecordedRollout.of(command, rollout, arrivals), rollout, before)
            raise NonFiniteLossError("; ".join([str(error), *told])) from None
        end = self._clock()
        self._recorder.activity("learner", "idle")
        await self._pushes.end_offer()
        # Generators get the version before this one first, however the two race: schedules do not depend on speed.
        await self._changed.wait_until(lambda: not self._pacer.pushing)
        self._pacer.trained()
        self._recorder.learner_was_busy(rollout_span(command, start, end), answer.spans)
        gaps = logprob_gaps(batches[0].completions, answer.logprobs, version)
        self._recorder.logprob_gaps(gaps)
        for update, step in enumerate(answer.steps):
            part = update % len(parts)
            values = {"time/train_s": (end - start) / len(answer.steps), **step.values}
            if gaps and not update:
                values |= {"logprob_gap/mean_abs": fmean(gaps), "logprob_gap/max_abs": max(gaps)}
            self._report(version + update + 1, parts[part], batches[part], ages[update], values)
            if update < len(parts):
                self._recorder.trained(len(batches[part].completions), _samples(parts[part]), batches[part].skipped)

    async def _keep_failed(
        self, record: RecordedRollout, rollout: list[ReadyGroup], before: ControllerState
    ) -> list[str]:
        """Save a rollout that could not be trained on and, if no update of it was made, the state before it; what to say."""
        try:
            told = [f"the batch is in {self._recorder.save_json(FAILED_BATCH, [g.scored.group for g in rollout])}"]
            if self._schedule.updates_per_rollout == 1:
                self._recorder.save_packed(FAILED_ROLLOUT, record)
                if self._save is not None:
                    await self._save
                if not self._checkpoints.is_saved(before.version):
                    await self._checkpoints.start(before)
                    await self._checkpoints.complete(deletes=False)  # older ones, from which it may go better
                told.append(f"async-rlhf replay {self._config.run.path} --failed makes it come again")
        except AsyncRLHFError as error:
            return [str(error)]
        return told

    def _report(
        self, version: int, groups: list[ReadyGroup], batch: TrainingBatch, ages: Counter[int], values: dict[str, float]
    ) -> None:
        """The optimizer step that took the learner to `version`."""
        self._recorder.stepped(ages, batch.tokens)
        staleness, scored = staleness_figures(ages), [group.scored for group in groups]
        entropy = mean_entropy(scored)
        metrics = {
            **mean_facts(scored),
            **({} if entropy is None else {"entropy": entropy}),
            **values,
            "reward_margin": batch.margin,
            "pairs_skipped_share": batch.skipped / len(groups),
            "staleness/mean": staleness["mean"],
            "staleness/max": staleness["max"],
            "time/generate_s": max(group.generate_s for group in groups),
        }
        self._recorder.step(version, metrics)
        self._recorder.samples(version, [(group.group, group.scores) for group in scored])
        self._checkpoints.observe(metrics)

    def _mini_batch(self, groups: list[ReadyGroup]) -> TrainingBatch:
        rollouts = [group.scored.group for group in groups]
        batch, self._rewards = select_training_samples(rollouts, self._config.algorithm, self._rewards)
        return batch

    async def _start_save(self) -> None:
        """Freeze the state after a rollout; its files are written while the loop continues."""
        await self._pushes.ended()  # the totals should have it in them
        await self._evaluation_scored()  # or who continues from there would make it again, of other weights
        if self._save is not None:
            await self._save
        await self._checkpoints.start(self.state)
        self._save = self._tasks.create_task(self._checkpoints.complete())
        if not self._config.checkpoint.async_save:
            await self._save


def _versions(groups: Iterable[ReadyGroup]) -> Counter[int]:
    """How many tokens each version sampled."""
    versions: Counter[int] = Counter()
    for group in groups:
        for completion in group.scored.group.completions:
            versions.update(completion.versions)
    return versions


def _samples(groups: Iterable[ReadyGroup]) -> int:
    return sum(len(group.scored.group.completions) for group in groups)
