"""When weights change hands: pushes are started, or offered to the generators for as long as the learner trains.

    learning loop, between two steps ──> start ─┐
    before a step: offer ──> generators ready ──┴─> pause, send, receive ──> engines continue with the new version
                        └──> the step is over: nothing happens

A generator that fails a push is left out of the next; `weight_sync` has one push, and what each side does in it.
"""

import asyncio
from collections.abc import Sequence

from megatron_async_rlhf.config.sections import ScheduleSection
from megatron_async_rlhf.generator.protocol import Generator, Pause, Receiver
from megatron_async_rlhf.scheduler.generation import Generation
from megatron_async_rlhf.scheduler.pacing import Pacer
from megatron_async_rlhf.scheduler.pool import GeneratorPool
from megatron_async_rlhf.scheduler.signal import Signal
from megatron_async_rlhf.scheduler.weight_sync import PushError, WeightSync
from megatron_async_rlhf.telemetry.recorder import Recorder

_PAUSES: dict[str, Pause] = {"none": "keep", "keep": "keep", "recompute": "keep", "resubmit": "abort"}


class Pushes:
    """One after the other.

    Attributes:
        tasks: where a push continues once it has begun; set before the first.
    """

    tasks: asyncio.TaskGroup

    def __init__(
        self,
        schedule: ScheduleSection,
        pacer: Pacer,
        pool: GeneratorPool,
        weight_sync: WeightSync,
        generation: Generation,
        recorder: Recorder,
        changed: Signal,
    ) -> None:
        self._schedule = schedule
        self._pacer = pacer
        self._pool = pool
        self._weight_sync = weight_sync
        self._generation = generation
        self._recorder = recorder
        self._changed = changed
        self._under_way: asyncio.Task | None = None
        self._lost_one = False  # the last push failed, and nobody was to blame

    def may_start(self) -> bool:
        """Newer weights exist, and there are generators that can take them."""
        serving, waiting = bool(self._pool.serving), self._pool.without_weights
        somebody = serving or waiting  # else wait for a generator to come back
        return somebody and self._pacer.may_push(waiting=waiting, abandoned=not serving)

    async def start(self) -> None:
        """The learner has begun to send when this returns, so that a training command finds it at the next version."""
        if self._under_way is not None and not self._under_way.done():
            await self._under_way  # the learner gives its account of one push before it begins another
            return  # to look again who there is to push to
        receivers = self._pool.alive
        try:
            await self._weight_sync.connect(receivers, newcomers=self._pool.returned)
        except PushError as error:
            await self._push_failed(error)
            return
        if receivers == self._pool.alive and self.may_start():  # or things have changed meanwhile
            await self._begin_push(receivers)

    async def offer(self) -> None:
        """Before a training step: the generators may still get the version that it starts from."""
        if self._pacer.trained_version == self._pacer.pushed_version or self._pacer.pushing:
            return
        await self.ended()  # the learner gives its account of one push before it offers another
        if self._weight_sync.is_connected(self._pool.alive):
            await self._weight_sync.offer(self._pacer.trained_version)
            self._pacer.begin_offer()
            self.tasks.create_task(self._take_offer())

    async def end_offer(self) -> None:
        """The learner has trained."""
        if self._pacer.offering:
            self._pacer.end_offer()
            await self._changed.notify()

    async def ended(self) -> None:
        """Return once the last push that began has been accounted for."""
        if self._under_way is not None:
            await self._under_way

    async def _take_offer(self) -> None:
        """Start the push as soon as the generators can take it, unless the learner has trained before."""
        await self._changed.wait_until(lambda: not self._pacer.offering or self.may_start())
        receivers = self._pool.alive
        if self._pacer.offering and self._weight_sync.is_connected(receivers):
            await self._begin_push(receivers, offered=True)

    async def _begin_push(self, receivers: Sequence[Receiver], *, offered: bool = False) -> None:
        version, how = self._pacer.trained_version, self._schedule.in_flight_updates
        self._pacer.begin_push()
        self._pool.hold()
        self._recorder.activity("learner", f"push {version}")
        self._recorder.activity("generators", f"receive version {version}")
        try:
            started = await self._weight_sync.start(
                version,
                receivers,
                offered=offered,
                how=_PAUSES[how],
                recompute=how != "keep",
                on_paused=self._generation.busy.freeze,
            )
        except PushError as error:
            await self._push_failed(error)
            return
        if started:
            self._under_way = self.tasks.create_task(self._finish_push(version, receivers))
        else:
            await self._let_engines_go_on()

    async def _finish_push(self, version: int, receivers: Sequence[Receiver]) -> None:
        try:
            await self._weight_sync.arrived()
        except PushError as error:
            await self._push_failed(error)
            return
        self._lost_one = False
        await self._pool.mark_updated(receivers)
        self._pacer.push_arrived(version)
        self._generation.weights_arrived()
        self._recorder.activity("generators", f"sample with version {version}")
        await self._let_engines_go_on()
        self._recorder.pushed(*await self._weight_sync.report())

    async def _let_engines_go_on(self) -> None:
        # A batch resumes its engines itself, once all its requests are there; one that waits for a generator does not yet.
        if self._schedule.generation == "streaming" or self._pacer.running or self._pacer.evaluating:
            await self._pool.resume()
        else:
            await self._pool.release()
        self._pacer.end_push()  # not before: nobody may pause engines that are about to be told to continue
        self._generation.busy.thaw()
        await self._changed.notify()

    async def _push_failed(self, error: PushError) -> None:
        """Continue without the generators that caused it; if none did, try once more with all.

        The others serve on, unless weights were under way.
        """
        if not error.gone and self._lost_one:
            raise error
        self._lost_one = not error.gone
        names = ", ".join(receiver.name for receiver in error.gone)
        self._recorder.note(f"push failed, {f'continuing without {names}' if names else 'trying once more'}: {error}")
        for receiver, why in error.gone.items():
            await self._pool.mark_lost(receiver, why)
        if error.moved:
            await self._pool.mark_stale()
            await self._pool.release()
        elif self._pacer.pushing:
            await self._pool.resume()
            self._generation.busy.thaw()
        self._pacer.end_push()
        await self._changed.notify()

    def returned(self, generator: Generator) -> None:
        """A generator that was lost is back: another process, which has met nobody."""
        self._weight_sync.disconnect()
        self._recorder.activity("generators", f"{generator.name} is back")
        self.tasks.create_task(self._changed.notify())
