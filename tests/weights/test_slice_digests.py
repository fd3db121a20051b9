"""Digests of slices: xxh3-128 on CPUs; on GPUs keyed sums, which are the same arithmetic wherever they are computed."""

from random import Random

import numpy
import pytest
import torch
import xxhash

from megatron_async_rlhf.weights import slice_digests
from megatron_async_rlhf.weights.plan import Slice
from megatron_async_rlhf.weights.slice_digests import DIGEST_BYTES, SliceDigests, keyed_sums

PIECE = 16  # words


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(slice_digests, "_PIECE_WORDS", PIECE)
    slice_digests._keys.cache_clear()
    yield
    slice_digests._keys.cache_clear()


def by_hand(values: torch.Tensor) -> list[int]:
    """In Python's integers."""
    rows = max(1, 4 * PIECE // (values.shape[1] * values.element_size()))
    keys = [int(key) | 1 for key in numpy.random.Philox(key=0).random_raw(2 * PIECE)]
    sums = [0, 0]
    for begin in range(0, len(values), rows):
        raw = values[begin : begin + rows].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        width = 2 if len(raw) % 4 else 4
        words = [int.from_bytes(raw[i : i + width], "little", signed=True) for i in range(0, len(raw), width)]
        for first in range(0, len(words), PIECE):
            piece = words[first : first + PIECE]
            for number in range(2):
                own = keys[number * PIECE :]
                total = sums[number] * 0x9E3779B97F4A7C15 + sum(w * k for w, k in zip(piece, own, strict=False))
                sums[number] = total % 2**64
    return sums


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3, 5), (7, 16), (40, 3), (2, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sums_are_those_computed_by_hand(shape, dtype):
    values = torch.randn(shape).to(dtype)
    assert [value % 2**64 for value in keyed_sums(values, dtype).tolist()] == by_hand(values)


def test_a_view_has_the_sums_of_its_copy_and_a_wider_type_those_of_what_was_sent():
    whole = torch.randn(40, 30)
    view = whole[3:20, 5:17]
    assert torch.equal(keyed_sums(view, torch.float32), keyed_sums(view.clone(), torch.float32))
    assert torch.equal(keyed_sums(view, torch.bfloat16), keyed_sums(view.bfloat16(), torch.bfloat16))
    rows = torch.randn(9, 5).bfloat16()[1:7]  # contiguous, and begins between two words
    assert torch.equal(keyed_sums(rows, torch.bfloat16), keyed_sums(rows.clone(), torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
@pytest.mark.parametrize("shape", [(1, 1), (7, 16), (40, 3), (2, 100)])
def test_a_gpu_has_the_sums_of_the_cpu(shape):
    values = torch.randn(shape).bfloat16()
    assert torch.equal(keyed_sums(values.cuda(), torch.bfloat16).cpu(), keyed_sums(values, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_flipped_bit_and_every_exchange_changes_both_sums(dtype):
    values = torch.randn(6, 11).to(dtype)
    before = keyed_sums(values, dtype)
    flat = values.view(-1).view(torch.uint8)
    for position in range(len(flat)):
        for bit in range(8):
            flat[position] ^= 1 << bit
            assert (keyed_sums(values, dtype) != before).all()
            flat[position] ^= 1 << bit
    dice, elements = Random(0), values.view(-1)
    for _ in range(200):
        a, b = dice.sample(range(len(elements)), 2)
        exchanged = elements.clone()
        exchanged[a], exchanged[b] = elements[b], elements[a]
        if not torch.equal(exchanged, elements):
            assert (keyed_sums(exchanged.view(6, 11), dtype) != before).all()


class OnGpu(torch.Tensor):
    """A tensor of a CPU that says it is on a GPU."""

    is_cuda = True


def test_digests_are_joined_in_the_order_asked_for_whatever_made_them():
    slices = [
        Slice(tensor=name, rows=(0, 4), cols=(0, 6), source=name, source_row=0, source_col=0,
              target=name, target_row=0, target_col=0)
        for name in ("a", "b", "c")
    ]  # fmt: skip
    held = {moved: torch.randn(4, 6) for moved in slices}
    on_cpu, on_gpu = SliceDigests(torch.float32), SliceDigests(torch.float32)
    for moved in reversed(slices):
        on_cpu.add(moved, held[moved])
        on_gpu.add(moved, held[moved].as_subclass(OnGpu))
    assert on_cpu.joined(slices) == b"".join(xxhash.xxh3_128_digest(held[s].numpy()) for s in slices)
    sums = [keyed_sums(held[s], torch.float32).numpy().tobytes() for s in slices]
    assert on_gpu.joined(slices) == b"".join(sums)
    assert {len(each) for each in sums} == {DIGEST_BYTES}
    assert SliceDigests(torch.float32).joined([]) == b""
