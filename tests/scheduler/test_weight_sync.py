"""A push as the controller sees it, on fakes that fail in every way a push can."""

import asyncio
import time

import pytest

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import (
    GeneratorError,
    GeneratorGoneError,
    GeneratorSilentError,
    LearnerError,
    LearnerSilentError,
    MismatchError,
    TransferError,
)
from megatron_async_rlhf.learner.protocol import (
    Answer,
    BeginPush,
    Command,
    FinishPush,
    JoinTransfer,
    PushReport,
    PushWeights,
)
from megatron_async_rlhf.scheduler import weight_sync
from megatron_async_rlhf.scheduler.weight_sync import PushError, WeightSync

SHAPE = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
REPORT = PushReport(wire_bytes=100, compared=4)


class Learner:
    """Answers from `finish`: a report or an error for each push, in order; joins from `joins`. Asked once per push.

    What it offers begins if it is not `too_late`.
    """

    def __init__(self, *finish: PushReport | Exception, joins: tuple = (), too_late: bool = False) -> None:
        self.commands: list[Command] = []
        self._finish, self._joins = list(finish), list(joins)
        self._pushes = False
        self._too_late = too_late

    async def execute(self, command: Command) -> Answer:
        self.commands.append(command)
        if isinstance(command, BeginPush):
            self._pushes = not self._too_late
            return Answer(id=0, begun=self._pushes)
        if isinstance(command, PushWeights) and command.offered:
            return Answer(id=0)
        if isinstance(command, PushWeights | FinishPush):
            assert self._pushes == isinstance(command, FinishPush)
            self._pushes = not self._pushes
        answers = {FinishPush: self._finish, JoinTransfer: self._joins}.get(type(command))
        answer = answers.pop(0) if answers else None
        if isinstance(answer, Exception):
            raise answer
        return Answer(id=0, push=answer)

    def sent(self, kind: type) -> list[Command]:
        return [command for command in self.commands if isinstance(command, kind)]


class Receiver:
    """`fates`: what happens at each push: None arrives, an exception is raised, `hang` never returns."""

    def __init__(self, name: str, *fates, alive: bool = True, takes_s: float = 0.0) -> None:
        self.name, self.version, self.alive, self.takes_s = name, -1, alive, takes_s
        self.joined: list[dict] = []
        self.verified: list[bool] = []
        self._fates = list(fates)

    async def probe(self) -> None:
        if not self.alive:
            raise GeneratorGoneError(f"{self.name}: /collective_rpc failed, the server is gone")

    async def pause(self, how: str = "keep", *, clear_cache: bool = True) -> None:
        assert self.alive

    async def join_transfer(self, info: dict, *, timeout_s: float) -> None:
        self.joined.append(info)

    async def receive_weights(self, *, version: int, verify: bool, recompute: bool = True) -> None:
        self.verified.append(verify)
        await asyncio.sleep(self.takes_s)
        fate = self._fates.pop(0) if self._fates else None
        if fate == "hang":
            await asyncio.sleep(3600)
        if fate:
            raise fate
        self.version = version


def make(learner: Learner, **weights) -> WeightSync:
    config = RunConfig.model_validate({"model": SHAPE, "weights": {"timeout_s": 0.3, **weights}})
    return WeightSync(learner, config, ("127.0.0.1", 7))


def push(sync: WeightSync, receivers: list[Receiver], *versions: int):
    async def all_of_them():
        async with asyncio.timeout(10):
            return [await sync.push(version, receivers) for version in versions]

    return asyncio.run(all_of_them())


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(weight_sync, "_GRACE_S", 0.1)


def test_pushes_share_one_rendezvous():
    learner, receivers = Learner(REPORT, REPORT), [Receiver("generator.0"), Receiver("generator.1")]
    results = push(make(learner), receivers, 0, 1)
    assert [report for report, _ in results] == [REPORT, REPORT]
    assert [spans[0].name for _, spans in results] == ["push 0", "push 1"]
    (join,) = learner.sent(JoinTransfer)
    assert join.generators == ["generator.0", "generator.1"]
    assert [r.joined[0]["replica"] for r in receivers] == [0, 1]
    assert {r.joined[0]["session"] for r in receivers} == {join.session}
    assert [command.version for command in learner.sent(PushWeights)] == [0, 1]
    assert [receiver.version for receiver in receivers] == [1, 1]


def test_only_the_first_push_over_a_connection_is_verified():
    """A generator that was started again gets its weights over a new one."""
    learner, receivers = Learner(*[REPORT] * 5), [Receiver("generator.0"), Receiver("generator.1")]
    sync = make(learner, verify="first")
    push(sync, receivers, 0, 1)
    sync.disconnect()
    push(sync, receivers, 2, 3)
    assert [receiver.verified for receiver in receivers] == [[True, False, True, False]] * 2


@pytest.mark.parametrize(
    ("verify", "expected"), [("every", [True, True, True]), ("first", [True, False, False]), ("off", [False] * 3)]
)
def test_both_sides_know_which_pushes_are_verified(verify, expected):
    learner, receiver = Learner(REPORT, REPORT, REPORT), Receiver("generator.0")
    push(make(learner, verify=verify), [receiver], 0, 1, 2)
    assert receiver.verified == expected == [command.verify for command in learner.sent(PushWeights)]


def test_first_means_first_over_each_connection():
    """A generator that was started again has proven nothing yet, and neither has the way to it."""
    learner, receiver = Learner(*[REPORT] * 4), Receiver("generator.0")
    sync = make(learner, verify="first")
    push(sync, [receiver], 0, 1)
    sync.disconnect()
    push(sync, [receiver], 2, 3)
    assert receiver.verified == [True, False, True, False] == [c.verify for c in learner.sent(PushWeights)]


def test_after_a_push_that_failed_the_next_one_is_a_first_one():
    """It is made once more, over a new connection, for nobody was to blame."""
    learner = Learner(REPORT, TransferError("send failed on learner rank 0"), REPORT, REPORT)
    receiver = Receiver("generator.0", None, GeneratorError("generator.0: answered 500"))
    sync = make(learner, verify="first")
    push(sync, [receiver], 0, 1, 2)
    assert receiver.verified == [True, False, True, False]
    assert [command.version for command in learner.sent(PushWeights)] == [0, 1, 1, 2]
    assert len({join.session for join in learner.sent(JoinTransfer)}) == 2


def test_a_push_that_fails_twice_is_an_error():
    lost = TransferError("send failed on learner rank 0")
    receiver = Receiver("generator.0", *[GeneratorError("generator.0: answered 500")] * 2)
    with pytest.raises(PushError, match="push of version 4 failed") as error:
        push(make(Learner(lost, lost)), [receiver], 4)
    assert not error.value.gone and error.value.moved


def test_a_mismatch_is_an_error_that_carries_its_counts():
    bad = PushReport(
        wire_bytes=1, compared=9, mismatches=["generator.0 rank 1: lm_head.weight[0:4, 0:8] from learner rank 2"]
    )
    learner = Learner(bad)
    receiver = Receiver(
        "generator.0", GeneratorError("generator.0: /async_rlhf/weights answered 500: verify: 1 of 9 ...")
    )
    with pytest.raises(
        MismatchError, match="version 3: 1 of 9 digests differ, first generator.0 rank 1: lm_head"
    ) as error:
        push(make(learner), [receiver], 3)
    assert (error.value.compared, error.value.mismatches) == (9, bad.mismatches)


def test_who_is_gone_is_named_and_the_next_push_meets_anew():
    learner = Learner(
        TransferError("receive of the digests from generator.1 rank 0 failed on learner rank 0: ..."), REPORT
    )
    first = Receiver("generator.0", GeneratorError("generator.0: answered 500: the connection is gone"))
    second = Receiver("generator.1", GeneratorGoneError("generator.1: /async_rlhf/weights failed, the server is gone"))
    sync = make(learner)
    with pytest.raises(
        PushError, match="push of version 0 failed: generator.1: /async_rlhf/weights failed, the server is gone"
    ) as error:
        push(sync, [first, second], 0)
    assert (list(error.value.gone), error.value.moved) == ([second], True)
    push(sync, [first], 1)
    assert [join.generators for join in learner.sent(JoinTransfer)] == [["generator.0", "generator.1"], ["generator.0"]]
    sessions = [join.session for join in learner.sent(JoinTransfer)]
    assert len(set(sessions)) == 2
    assert first.version == 1


def test_a_generator_that_hangs_is_found_out_through_the_learner():
    silence = "receive of the digests from generator.1 rank 0 failed on learner rank 0: nothing moved for 0.3 s"
    learner = Learner(TransferError(silence), REPORT)
    first, second = Receiver("generator.0", "hang"), Receiver("generator.1", "hang")
    sync = make(learner)
    start = time.monotonic()
    with pytest.raises(PushError, match="generator.1 rank 0 failed on learner rank 0: nothing moved") as error:
        push(sync, [first, second], 0)
    assert time.monotonic() - start < 2
    assert set(error.value.gone) == {first, second}
    with pytest.raises(GeneratorError, match="no generator is alive"):
        push(sync, [], 1)


def test_a_push_may_take_longer_than_the_timeout_while_it_moves():
    learner, slow = Learner(REPORT), Receiver("generator.0", takes_s=0.45)
    ((report, _),) = push(make(learner), [slow], 0)
    assert report == REPORT and slow.version == 0
    assert len(learner.sent(FinishPush)) == 1


def test_a_long_push_that_fails_in_the_end_says_what_happened():
    gone = GeneratorGoneError("generator.1: /async_rlhf/weights failed, the server is gone")
    receivers = [Receiver("generator.0"), Receiver("generator.1", gone, takes_s=0.45)]
    with pytest.raises(PushError, match="push of version 0 failed: generator.1: .* the server is gone") as error:
        push(make(Learner(REPORT)), receivers, 0)
    assert list(error.value.gone) == receivers[1:]

    bad = PushReport(wire_bytes=1, compared=9, mismatches=["generator.0 rank 1: lm_head.weight[0:4, 0:8]"])
    slow = Receiver("generator.0", GeneratorError("generator.0: /async_rlhf/weights answered 500"), takes_s=0.45)
    with pytest.raises(MismatchError, match="1 of 9 digests differ, first generator.0 rank 1: lm_head"):
        push(make(Learner(bad)), [slow], 0)


def test_a_generator_that_never_confirms_is_an_error_too():
    learner = Learner(REPORT)
    with pytest.raises(TransferError, match="generator.0 did not confirm the weights within 0.3 s"):
        push(make(learner), [Receiver("generator.0", "hang")], 0)


def test_who_does_not_answer_the_rendezvous_is_named():
    class Deaf(Receiver):
        async def join_transfer(self, info: dict, *, timeout_s: float) -> None:
            raise GeneratorGoneError(f"{self.name}: no answer to /init_weight_transfer_engine within 5.6 s")

    learner = Learner(REPORT, joins=(TransferError("rendezvous: generator.1 rank 0 did not come within 0.3 s"),))
    sync, receiver, deaf = make(learner), Receiver("generator.0"), Deaf("generator.1")
    with pytest.raises(PushError, match="rendezvous: generator.1 rank 0 did not come") as error:
        push(sync, [receiver, deaf], 0)
    assert list(error.value.gone) == [deaf]
    push(sync, [receiver], 0)
    assert receiver.version == 0


def test_dead_generators_are_not_waited_for():
    learner = Learner(REPORT)
    dead, other = Receiver("generator.0", alive=False), Receiver("generator.1")
    sync = make(learner)
    with pytest.raises(PushError, match="generator.0: /collective_rpc failed") as error:
        push(sync, [dead, other], 0)
    assert (list(error.value.gone), error.value.moved) == ([dead], False)
    assert learner.commands == []
    push(sync, [other], 0)
    assert [join.generators for join in learner.sent(JoinTransfer)] == [["generator.1"]]


def connect(sync: WeightSync, receivers: list[Receiver], newcomers: list[Receiver]) -> None:
    async def bounded():
        async with asyncio.timeout(10):
            await sync.connect(receivers, newcomers)

    asyncio.run(bounded())


def sessions(learner: Learner) -> list[list[str]]:
    return [join.generators for join in learner.sent(JoinTransfer)]


def test_a_newcomer_meets_the_learner_alone_before_the_others_are_troubled():
    learner, old, new = Learner(REPORT), Receiver("generator.0"), Receiver("generator.1")
    sync = make(learner)
    connect(sync, [old, new], [new])
    assert sessions(learner) == [["generator.1"], ["generator.0", "generator.1"]]
    connect(sync, [old, new], [])
    assert len(sessions(learner)) == 2, "they have met already"


def test_a_newcomer_that_cannot_meet_costs_nobody_else_anything():
    learner = Learner(REPORT, joins=(TransferError("rendezvous: generator.1 rank 0 did not come within 0.3 s"),))
    old, new = Receiver("generator.0"), Receiver("generator.1")
    sync = make(learner)
    with pytest.raises(
        PushError, match="generator.1: it cannot meet the learner: rendezvous: .* did not come"
    ) as error:
        connect(sync, [old, new], [new])
    assert (list(error.value.gone), error.value.moved) == ([new], False)
    assert isinstance(error.value.gone[new], GeneratorSilentError)
    assert sessions(learner) == [["generator.1"]] and old.joined == []


def test_who_cannot_meet_is_found_out_when_nobody_is_gone():
    refused = TransferError("rendezvous: generator.1 rank 0 did not come within 0.3 s")
    learner = Learner(REPORT, joins=(refused, None, refused))
    first, second, third = (Receiver(f"generator.{i}") for i in range(3))
    sync = make(learner)
    with pytest.raises(PushError, match="generator.1: it cannot meet the learner") as error:
        connect(sync, [first, second, third], [])
    assert (list(error.value.gone), error.value.moved) == ([second], False)


def test_a_rendezvous_that_fails_by_nobodys_fault_is_tried_once_more():
    lost = TransferError("rendezvous: no route to host")
    learner, receivers = Learner(REPORT, joins=(lost,)), [Receiver(f"generator.{i}") for i in range(2)]
    push(make(learner), receivers, 0)
    assert [receiver.version for receiver in receivers] == [0, 0]
    together = [join for join in learner.sent(JoinTransfer) if len(join.generators) == 2]
    assert len(together) == 2
    learner = Learner(joins=(lost, None, None, lost))
    with pytest.raises(PushError, match="no route to host") as error:
        push(make(learner), receivers, 1)
    assert not error.value.gone and not error.value.moved
    learner = Learner(REPORT, joins=(lost,))
    push(make(learner), receivers[:1], 2)
    assert len(learner.sent(JoinTransfer)) == 2, "who has met the learner alone has met it"


def test_who_cannot_meet_did_nothing_no_longer_than_that_took():
    """What says how long may be older than its process, and the supervisor ends none that was started since."""
    learner = Learner(joins=(TransferError("out of memory"), TransferError("out of memory")))
    with pytest.raises(PushError) as error:
        connect(make(learner, timeout_s=30.0), [Receiver("generator.0")], [])
    (why,) = error.value.gone.values()
    assert why.silent_s < 10


def test_a_learner_that_says_nothing_is_waited_for_once():
    silent = LearnerSilentError("learner: did not answer", silent_s=9.0)
    learner = Learner(silent)
    with pytest.raises(LearnerSilentError):
        push(make(learner), [Receiver("generator.0", "hang")], 0)
    assert len(learner.sent(FinishPush)) == 1


def test_an_engine_that_cannot_be_paused_costs_the_others_no_weights():
    class Deaf(Receiver):
        async def pause(self, how: str = "keep", *, clear_cache: bool = True) -> None:
            raise GeneratorSilentError(f"{self.name}: no answer to /async_rlhf/pause within 3 s", silent_s=3.0)

    learner, deaf = Learner(REPORT), Deaf("generator.1")
    with pytest.raises(PushError, match="generator.1: no answer to /async_rlhf/pause") as error:
        push(make(learner), [Receiver("generator.0"), deaf], 0)
    assert (list(error.value.gone), error.value.moved) == ([deaf], False)
    assert learner.sent(PushWeights) == []


def test_what_the_learner_says_of_itself_is_nobodys_fault():
    learner = Learner(joins=(LearnerError("learner.1: did not answer"),))
    with pytest.raises(LearnerError, match="learner.1: did not answer"):
        push(make(learner), [Receiver("generator.0"), Receiver("generator.1")], 0)


@pytest.mark.parametrize("too_late", [False, True])
def test_a_push_that_was_offered_is_begun_or_nothing_happens(too_late):
    learner, receiver = Learner(REPORT, REPORT, too_late=too_late), Receiver("generator.0")
    sync = make(learner)

    async def whole() -> bool:
        async with asyncio.timeout(10):
            assert not sync.is_connected([receiver])
            await sync.push(0, [receiver])
            assert sync.is_connected([receiver])
            await sync.offer(1)
            started = await sync.start(1, [receiver], offered=True)
            if started:
                await sync.arrived()
                await sync.report()
            return started

    assert asyncio.run(whole()) == (not too_late)
    assert receiver.version == (0 if too_late else 1)
    assert [(command.version, command.offered) for command in learner.sent(PushWeights)] == [(0, False), (1, True)]
    assert len(receiver.verified) == (1 if too_late else 2)


class Slow(Learner):
    """Whoever tells it to push hears of it late, or never."""

    def __init__(self, on_push, *finish: PushReport) -> None:
        super().__init__(*finish)
        self._on_push = on_push

    async def execute(self, command: Command) -> Answer:
        if isinstance(command, PushWeights):
            await asyncio.sleep(0.05)
            self._on_push()
        return await super().execute(command)


def test_generators_are_told_while_the_learner_is():
    receiver = Receiver("generator.0")
    told = []
    push(make(Slow(lambda: told.append(list(receiver.verified)), REPORT)), [receiver], 0)
    assert told == [[True]]


def test_no_generator_waits_for_a_learner_that_could_not_be_told():
    def refuse() -> None:
        raise LearnerError("PushWeights came before JoinTransfer")

    cancelled = []

    class Waiting(Receiver):
        async def receive_weights(self, *, version: int, verify: bool, recompute: bool = True) -> None:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.append(self.name)
                raise

    async def told() -> list[str]:
        with pytest.raises(LearnerError, match="before JoinTransfer"):
            await make(Slow(refuse)).push(0, [Waiting("generator.0"), Waiting("generator.1")])
        return sorted(cancelled)

    assert asyncio.run(told()) == ["generator.0", "generator.1"]
