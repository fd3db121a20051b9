"""Whole pushes between threads over real gloo: bytes, flipped bits, vanished and silent peers."""

import random
import time

import pytest
import torch
from transfer_group import TransferGroup, assert_holds, learner_parameters, random_weights

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.models.hf_mapping import elements_held
from megatron_async_rlhf.models.layout import LearnerLayout
from megatron_async_rlhf.types import PushReport

LAYOUTS = [
    pytest.param(LearnerLayout(), 1, 1, id="tp1-to-tp1"),
    pytest.param(LearnerLayout(tensor_parallel=2, pipeline_parallel=2), 2, 1, id="tp2-pp2-to-tp2"),
    pytest.param(LearnerLayout(tensor_parallel=2), 1, 1, id="tp2-to-tp1"),
    pytest.param(LearnerLayout(pipeline_parallel=2), 2, 1, id="pp2-to-tp2"),
    pytest.param(LearnerLayout(data_parallel=2), 1, 2, id="dp2-to-two-replicas"),
    pytest.param(LearnerLayout(tensor_parallel=4), 2, 3, id="tp4-to-three-replicas-of-tp2"),
    pytest.param(LearnerLayout(tensor_parallel=2), 4, 1, id="tp2-to-tp4"),
]
MODELS = [
    pytest.param({"family": "llama", "kv_heads": 2}, id="llama"),
    pytest.param(
        {"family": "llama", "kv_heads": 1, "tie_embeddings": True, "vocab_size": 67}, id="llama-tied-one-kv-head"
    ),
    pytest.param({"family": "qwen2", "kv_heads": 2}, id="qwen2"),
    pytest.param({"family": "qwen3", "kv_heads": 4, "head_dim": 12}, id="qwen3"),
]


@pytest.fixture(params=[True, False], ids=["shared memory", "sockets"])
def connect(make_arch, request: pytest.FixtureRequest):
    groups: list[TransferGroup] = []

    def connect(
        layout: LearnerLayout, tensor_parallel: int = 1, replicas: int = 1, sizes=None, **options
    ) -> TransferGroup:
        group = TransferGroup(
            make_arch(**(sizes or {"kv_heads": 2})),
            layout,
            tensor_parallel=tensor_parallel,
            replicas=replicas,
            shared=request.param,
            **options,
        )
        groups.append(group)
        return group

    yield connect
    for group in groups:
        group.close()


@pytest.mark.parametrize("sizes", MODELS)
@pytest.mark.parametrize(("layout", "tensor_parallel", "replicas"), LAYOUTS)
def test_every_worker_gets_the_learners_bytes(connect, layout, tensor_parallel, replicas, sizes):
    group = connect(layout, tensor_parallel, replicas, sizes, staging_bytes=2048)
    assert len(group.plan.incoming(0)) > 2
    for version in range(2):
        weights = random_weights(group.arch, torch.float32, seed=version)
        targets = group.targets(weights)
        verdict, *others = group.push(weights, targets)
        assert all(other == verdict for other in others)
        assert verdict.mismatches == []
        workers = [rank for rank in targets]
        assert verdict.compared == sum(len(group.plan.received_by(group.roster.place(rank)[1])) for rank in workers)
        # Counted from the model's shape: nothing is sent twice, nothing is missing.
        assert verdict.wire_bytes == 4 * replicas * elements_held(group.arch, tensor_parallel)
        assert verdict.generators == replicas
        assert_holds(targets, weights, group)


@pytest.mark.parametrize("staging_bytes", [1024, 2**20])
def test_staging_and_dtype_change_nothing(connect, staging_bytes: int):
    group = connect(LearnerLayout(tensor_parallel=2), 2, dtype=torch.bfloat16, staging_bytes=staging_bytes)
    weights = random_weights(group.arch, torch.bfloat16)
    targets = group.targets(weights)
    assert group.push(weights, targets)[0].mismatches == []
    assert_holds(targets, weights, group)


def test_master_weights_are_pushed_in_the_generators_precision(connect, make_arch):
    group = connect(LearnerLayout(tensor_parallel=2), 1, dtype=torch.bfloat16)
    master = {name: torch.randn(t.shape) for name, t in random_weights(group.arch, torch.float32).items()}
    rounded = {name: tensor.bfloat16() for name, tensor in master.items()}
    targets = group.targets(rounded)
    assert group.push(master, targets)[0].mismatches == []
    assert_holds(targets, rounded, group)


def test_an_unverified_push_moves_the_same_bytes(connect):
    group = connect(LearnerLayout(tensor_parallel=2, pipeline_parallel=2), 2, 2)
    weights = random_weights(group.arch, torch.float32)
    targets = group.targets(weights)
    verdict = group.push(weights, targets, verify=False)[0]
    assert (verdict.compared, verdict.mismatches) == (0, [])
    assert verdict.wire_bytes == 4 * 2 * elements_held(group.arch, 2)
    assert verdict.generators == 2
    assert_holds(targets, weights, group)


def test_a_round_starts_when_the_one_before_has_left(connect):
    group = connect(LearnerLayout(tensor_parallel=2), 2, staging_bytes=2048)
    under_way, started = set(), []

    class Noted:
        def __init__(self, pending) -> None:
            self.pending = pending
            under_way.add(self)

        def wait(self) -> None:
            self.pending.wait()
            under_way.discard(self)

        def finish(self) -> None:
            self.pending.finish()

    def spied(*, sends=(), receives=(), start=group.transports[0].start):
        pending = start(sends=sends, receives=receives)
        if not sends:
            return pending
        started.append(len(under_way))
        return Noted(pending)

    group.transports[0].start = spied
    weights = random_weights(group.arch, torch.float32)
    group.push(weights, group.targets(weights))
    assert len(started) > 3 and set(started) == {0}


class BitFlips:
    """Flips one random bit per push: in a sender's buffer after packing, in a receiver's after arrival, or in a
    worker's parameter after loading; knows which slice that bit belongs to."""

    def __init__(self, group: TransferGroup, rng: random.Random) -> None:
        self.group, self.rng = group, rng
        self.expected: set[str] = set()
        self._where = None
        for rank, transport in enumerate(group.transports):
            self._spy(rank, transport)

    def arm(self) -> None:
        plan, roster = self.group.plan, self.group.roster
        (sender, receiver), messages = self.rng.choice(sorted(plan.streams.items()))
        index = self.rng.randrange(len(messages))
        self.moved = self.rng.choice(messages[index])
        offset = sum(s.size for s in messages[index][: messages[index].index(self.moved)])
        self.bit = self.rng.randrange(8 * plan.item_bytes * self.moved.size)
        self._position = 8 * plan.item_bytes * offset + self.bit
        self._stream, self._round = (sender, receiver), index
        self._where = self.rng.choice(["sender", "wire", "parameter"])
        first = self.rng.randrange(len(roster.generators)) if self._where == "parameter" else 0
        self._victim = roster.worker_rank(first, receiver)
        # What the first replica got damaged it hands on; a spoilt parameter stays where it is.
        hit = range(len(roster.generators)) if self._where != "parameter" else [first]
        self.expected = {
            f"{roster.name(roster.worker_rank(replica, receiver))}: {self.moved} from learner rank {sender}"
            for replica in hit
        }

    def damage_parameter(self, rank: int, parameter: str, tensor: torch.Tensor) -> None:
        if self._where == "parameter" and rank == self._victim and parameter == self.moved.target:
            element, bit = divmod(self.bit, 8 * self.group.plan.item_bytes)
            row, col = divmod(element, self.moved.width)
            matrix = tensor.view(tensor.shape[0], -1)
            one = matrix[self.moved.target_row + row, self.moved.target_col + col : self.moved.target_col + col + 1]
            flip(one.view(torch.uint8), bit)

    def _spy(self, rank: int, transport) -> None:
        start = transport.start

        def spied(*, sends=(), receives=()):
            for parcel in sends:
                if self._where == "sender" and self._is_it(rank, parcel.peer, parcel.what, sends=True):
                    flip(parcel.buffer, self._position)
            pending = start(sends=sends, receives=receives)
            hit = [
                index for index, parcel in enumerate(receives)
                if self._where == "wire" and self._is_it(rank, parcel.peer, parcel.what, sends=False)
            ]  # fmt: skip
            return Damaged(pending, hit[0], self._position) if hit else pending

        transport.start = spied

    def _is_it(self, rank: int, peer: int, what: str, *, sends: bool) -> bool:
        sender, receiver = self._stream
        pair = (sender, self.group.roster.worker_rank(0, receiver))
        return what.startswith(f"round {self._round} ") and ((rank, peer) if sends else (peer, rank)) == pair


class Damaged:
    def __init__(self, pending, index: int, bit: int) -> None:
        self._pending, self._index, self._bit = pending, index, bit
        self.finish = pending.finish

    def wait(self) -> None:
        self._pending.wait()
        self.received = self._pending.received
        flip(self.received[self._index], self._bit)


def flip(buffer: torch.Tensor, bit: int) -> None:
    buffer[bit // 8] ^= 1 << bit % 8


def test_every_flipped_bit_is_caught_and_named(connect):
    check_flips(connect(LearnerLayout(tensor_parallel=2, pipeline_parallel=2), 2, 2, staging_bytes=2048), 40)


@pytest.mark.slow
@pytest.mark.parametrize("flips", [20, pytest.param(250, marks=pytest.mark.thorough)])
def test_flipped_bits_are_caught_and_named(connect, flips: int):
    """In each of four layouts."""
    for seed, (layout, tensor_parallel, replicas) in enumerate(
        [
            (LearnerLayout(tensor_parallel=2, pipeline_parallel=2), 2, 1),
            (LearnerLayout(data_parallel=2), 1, 2),
            (LearnerLayout(tensor_parallel=4), 2, 2),
            (LearnerLayout(pipeline_parallel=2), 4, 1),
        ]
    ):
        check_flips(connect(layout, tensor_parallel, replicas, staging_bytes=2048), flips, seed)


def check_flips(group: TransferGroup, count: int, seed: int = 0) -> None:
    weights = random_weights(group.arch, torch.float32)
    flips = BitFlips(group, random.Random(seed))
    places = set()
    for _ in range(count):
        flips.arm()
        places.add(flips._where)
        targets = group.targets(weights, flips.damage_parameter)
        # A mismatch is no broken connection: receivers raise, and the group may push again.
        answers = group.push(weights, targets)
        verdict = answers[0]
        assert set(verdict.mismatches) == flips.expected, flips._where
        for answer in answers[group.roster.senders :]:
            assert isinstance(answer, TransferError)
            assert verdict.mismatches[0] in str(answer)
    assert places == {"sender", "wire", "parameter"}
    flips._where = None
    assert group.push(weights, group.targets(weights))[0].mismatches == []


def test_without_verification_a_flipped_bit_goes_unnoticed(connect):
    """Why `weights.verify` is on by default."""
    group = connect(LearnerLayout(), 1)
    flips = BitFlips(group, random.Random(1))
    weights = random_weights(group.arch, torch.float32)
    flips.arm()
    targets = group.targets(weights, flips.damage_parameter)
    assert group.push(weights, targets, verify=False)[0].mismatches == []
    with pytest.raises(AssertionError):
        assert_holds(targets, weights, group)


@pytest.mark.parametrize("silent", [0, 2, 4, 5], ids=["learner 0", "learner 2", "first replica", "second replica"])
def test_a_silent_rank_fails_the_push_on_all_others_within_the_timeout(connect, silent: int):
    group = connect(LearnerLayout(tensor_parallel=2, pipeline_parallel=2), 1, 2, timeout_s=2.0, staging_bytes=4096)
    weights = random_weights(group.arch, torch.float32)
    start = time.monotonic()
    answers = group.push(weights, group.targets(weights), without=(silent,))
    assert time.monotonic() - start < 6
    assert answers[silent] is None
    failures = [answer for rank, answer in enumerate(answers) if rank != silent]
    assert all(isinstance(answer, TransferError) for answer in failures), answers
    assert all("\n" not in str(answer) for answer in failures)
    silence = [str(answer) for answer in failures if "nothing moved for 2 s" in str(answer)]
    assert any(group.roster.name(silent) in line for line in silence), failures
    assert any("model." in line or "digests" in line for line in silence)


def test_a_vanished_worker_is_noticed_at_once(connect):
    group = connect(LearnerLayout(tensor_parallel=2), 1, 2, timeout_s=30.0, staging_bytes=1024)
    weights = random_weights(group.arch, torch.float32)
    targets = group.targets(weights)
    count = iter(range(10**6))

    def vanish(parameter: str, check) -> None:
        if next(count) == 3:
            raise TransferError("load: gone")

    targets[2].complete = vanish
    start = time.monotonic()
    answers = group.push(weights, targets)
    assert time.monotonic() - start < 10
    assert all(isinstance(answer, TransferError) for answer in answers)
    parameters = learner_parameters(weights, group.arch, group.layout, 0)
    with pytest.raises(TransferError, match="connect again"):
        group._ends[0].push(parameters.__getitem__, verify=False)


def test_a_parameter_that_is_not_the_planned_one_is_refused_by_name(connect):
    group = connect(LearnerLayout(), 1, timeout_s=5.0)
    weights = random_weights(group.arch, torch.float32)
    targets = group.targets(weights)
    targets[1].parameters["model.layers.2.mlp.down_proj.weight"] = torch.zeros(16, 4)
    answers = group.push(weights, targets)
    assert "load: model.layers.2.mlp.down_proj.weight[0:16, 0:24]" in str(answers[1])
    assert isinstance(answers[0], TransferError)

    group = connect(LearnerLayout(), 1, timeout_s=5.0)
    targets = group.targets(weights)
    weights["model.norm.weight"] = torch.zeros(3)
    answers = group.push(weights, targets)
    assert "pack: model.norm.weight[0:16, 0:1]" in str(answers[0])
    assert isinstance(answers[1], TransferError)


def test_the_verdict_is_a_plain_message(connect):
    group = connect(LearnerLayout(), 1)
    weights = random_weights(group.arch, torch.float32)
    assert isinstance(group.push(weights, group.targets(weights))[1], PushReport)
