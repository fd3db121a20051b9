import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.weights.buckets import TensorSpec
from megatron_async_rlhf.weights.push import receive_weights, send_weights
from megatron_async_rlhf.weights.transports.gloo import GlooGroup

STAGING_BYTES = 150  # buckets: first and norm, transposed, `big` alone and above the limit, last
NAMES = ["generator-0", "generator-1"]


def weights() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"first": (3, 5), "norm": (7,), "transposed": (6, 4), "big": (40, 3), "last": (2, 2)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["transposed"] = tensors["transposed"].t()
    tensors["norm"][0], tensors["norm"][1] = float("nan"), float("-inf")
    return list(tensors.items())


def specs_of(tensors: list[tuple[str, torch.Tensor]]) -> list[TensorSpec]:
    return [
        TensorSpec(name=name, shape=list(t.shape), dtype=str(t.dtype).removeprefix("torch."), num_bytes=t.nbytes)
        for name, t in tensors
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def with_group(world_size: int, act, timeout_s: float = 20.0) -> list:
    """`act(group)` on every rank of a real group, a thread each; the results in rank order."""
    port = free_port()

    def member(rank: int):
        return act(GlooGroup(host="127.0.0.1", port=port, rank=rank, world_size=world_size, timeout_s=timeout_s))

    with ThreadPoolExecutor(world_size) as pool:
        return [future.result(timeout=60) for future in [pool.submit(member, rank) for rank in range(world_size)]]


def push(receivers: int, *, verify: bool = True, flip: tuple[int, int, int] | None = None) -> list:
    """The sender's report, then what each receiver loaded; `flip` = (rank, bucket, bit) damages what a rank gets."""
    tensors = weights()

    def act(group: GlooGroup):
        if group.rank == 0:
            return send_weights(
                group, specs_of(tensors), iter(tensors), staging_bytes=STAGING_BYTES, verify=verify,
                receiver_names=NAMES[:receivers],
            )  # fmt: skip
        if flip and group.rank == flip[0]:
            damage(group, bucket=flip[1], bit=flip[2])
        loaded: dict[str, torch.Tensor] = {}
        receive_weights(group, specs_of(tensors), loaded.update, staging_bytes=STAGING_BYTES, verify=verify)
        return loaded

    return with_group(receivers + 1, act)


def damage(group: GlooGroup, *, bucket: int, bit: int) -> None:
    """Flip one bit of the given bucket after it arrived."""
    arrive, count = group.broadcast, iter(range(10**6))

    def broadcast(tensor: torch.Tensor, what: str) -> None:
        arrive(tensor, what)
        if next(count) == bucket:
            tensor[bit // 8] ^= 1 << bit % 8

    group.broadcast = broadcast


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("receivers", [1, 2])
@pytest.mark.parametrize("verify", [True, False])
def test_every_receiver_gets_the_same_bytes(receivers: int, verify: bool):
    report, *received = push(receivers, verify=verify)
    assert report == (5 * receivers if verify else 0, [])
    assert len(received) == receivers
    for loaded in received:
        assert list(loaded) == [name for name, _ in weights()]
        for name, tensor in weights():
            assert loaded[name].shape == tensor.shape
            assert torch.equal(bits(loaded[name]), bits(tensor))


@pytest.mark.parametrize(
    ("flip", "named"),
    [
        ((1, 0, 0), "generator-0: first"),
        ((2, 0, 8 * 87 + 7), "generator-1: norm"),
        ((1, 1, 300), "generator-0: transposed"),
        ((2, 2, 8 * 480 - 1), "generator-1: big"),
        ((2, 3, 17), "generator-1: last"),
    ],
)
def test_a_flipped_bit_is_caught_and_named(flip: tuple[int, int, int], named: str):
    report, *received = push(2, flip=flip)
    assert report == (10, [named])
    wrong = [
        f"{NAMES[i]}: {name}"
        for i, loaded in enumerate(received)
        for name, tensor in weights()
        if not torch.equal(bits(loaded[name]), bits(tensor))
    ]
    assert wrong == [named]


def test_without_verification_a_flipped_bit_goes_unnoticed():
    """Why `weights.verify` is on by default."""
    report, received = push(1, flip=(1, 0, 0), verify=False)
    assert report == (0, [])
    assert not torch.equal(received["first"], weights()[0][1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: [("other", tensors[0][1]), *tensors[1:]], r"first \[3, 5\].*gave other"),
        (lambda tensors: [("first", tensors[0][1].t()), *tensors[1:]], r"first \[3, 5\]"),
        (lambda tensors: [("first", tensors[0][1].double()), *tensors[1:]], r"first \[3, 5\]"),
        (lambda tensors: [("first", tensors[0][1].int()), *tensors[1:]], r"first \[3, 5\]"),
        (lambda tensors: tensors[:2], r"transposed \[4, 6\]"),
        (lambda tensors: [], r"first \[3, 5\]"),
    ],
    ids=["other name", "other shape", "wider dtype", "other dtype", "too few", "none"],
)
def test_a_tensor_that_is_not_the_announced_one_is_refused(change, named: str):
    def act(group: GlooGroup) -> None:
        with pytest.raises(TransferError, match=named):
            send_weights(
                group, specs_of(weights()), iter(change(weights())), staging_bytes=STAGING_BYTES, verify=True,
                receiver_names=[],
            )  # fmt: skip

    with_group(1, act)


def test_a_group_pushes_again_and_again():
    tensors = weights()

    def act(group: GlooGroup):
        reports, loaded = [], {}
        for version in range(3):
            now = [(name, tensor + version) for name, tensor in tensors]
            if group.rank == 0:
                reports.append(
                    send_weights(
                        group, specs_of(now), iter(now), staging_bytes=64, verify=version != 1, receiver_names=NAMES[:1]
                    )
                )
            else:
                receive_weights(group, specs_of(now), loaded.update, staging_bytes=64, verify=version != 1)
        return reports or loaded

    reports, loaded = with_group(2, act)
    assert reports == [(5, []), (0, []), (5, [])]
    assert torch.equal(loaded["big"], dict(tensors)["big"] + 2)


def test_a_receiver_that_went_away_is_named_in_time():
    tensors = weights()

    def act(group: GlooGroup):
        if group.rank == 0:
            start = time.monotonic()
            with pytest.raises(TransferError, match=r"digests of generator-0 from rank 1 failed on rank 0") as error:
                send_weights(
                    group, specs_of(tensors), iter(tensors), staging_bytes=10**6, verify=True, receiver_names=NAMES[:1]
                )
            assert "\n" not in str(error.value)
            return time.monotonic() - start
        receive_weights(group, specs_of(tensors), lambda named: None, staging_bytes=10**6, verify=False)
        time.sleep(3)  # keeps the connection open: silence, not a reset
        return None

    waited, _ = with_group(2, act, timeout_s=1.0)
    assert 0.5 < waited < 2.5


@pytest.mark.parametrize("rank", [0, 1], ids=["nobody comes", "nobody hosts"])
def test_a_rendezvous_that_fails_names_its_address_within_the_timeout(rank: int):
    port = free_port()
    start = time.monotonic()
    named = rf"rendezvous of 2 ranks at 127\.0\.0\.1:{port} failed on rank {rank}"
    with pytest.raises(TransferError, match=named) as error:
        GlooGroup(host="127.0.0.1", port=port, rank=rank, world_size=2, timeout_s=1.0)
    # A client's last attempt is followed by a random pause of torch's, a few seconds whatever the timeout.
    assert time.monotonic() - start < (2.0 if rank == 0 else 8.0)
    assert "\n" not in str(error.value)
