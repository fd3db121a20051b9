"""The comparison itself, on holders in memory; `tests/checkpoint` compares files."""

from math import prod

import pytest
import torch

from megatron_async_rlhf.converter import verify
from megatron_async_rlhf.converter.verify import compare
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.digest import digest
from megatron_async_rlhf.formats.holder import Box
from megatron_async_rlhf.formats.stored import DTYPES, TensorSpec

SHAPES = {"first": (9, 5), "norm": (7,), "big": (40, 8), "last": (2, 2)}


class Memory:
    """Holds tensors; with `boxes` it answers for nothing else, as a generator's workers do."""

    def __init__(
        self, label: str, tensors: dict[str, torch.Tensor], boxes: list[Box] | None = None, exact: bool = True
    ) -> None:
        self.label, self.boxes, self.exact, self._values = label, boxes, exact, tensors
        self.tensors = {
            n: TensorSpec(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()
        }

    def digest(self, box: Box, dtype: str, *, exact: bool) -> bytes:
        assert self.boxes is None or box in self.boxes
        (top, bottom), (left, right) = box.rows, box.cols
        whole = self._values[box.tensor].view(self.tensors[box.tensor].matrix)
        part = whole[top:bottom, left:right].to(DTYPES[dtype])
        return digest(part if exact else part + 0.0)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def flip(tensor: torch.Tensor, element: int, bit: int = 0) -> None:
    tensor.view(-1).view(torch.int32)[element] ^= 1 << bit


@pytest.fixture(autouse=True, params=[1, 64, 10**6], ids="staging {}".format)
def staging(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(verify, "STAGING_BYTES", request.param)


def test_equal_holders_are_equal():
    result = compare(Memory("a", weights()), Memory("b", weights()))
    assert (result.differing, result.first) == ([], "")
    assert result.tensors == len(SHAPES)
    assert result.num_bytes == 4 * sum(map(prod, SHAPES.values()))


@pytest.mark.parametrize("bit", [0, 17, 31])
@pytest.mark.parametrize("element", [0, 13, 44])
def test_one_flipped_bit_is_located(element: int, bit: int):
    other = weights()
    flip(other["first"], element, bit)
    result = compare(Memory("a", weights()), Memory("b", other))
    assert result.differing == ["first"]
    assert result.first == f"first: row {element // 5}, column {element % 5}"


def test_the_first_difference_in_model_order_is_told_and_all_are_counted():
    other = weights()
    for name, element in (("last", 3), ("big", 200), ("big", 9), ("norm", 6)):
        flip(other[name], element)
    del other["first"]
    result = compare(Memory("a", weights()), Memory("b", other))
    assert result.differing == ["first", "norm", "big", "last"]
    assert result.first == "first: is in a, but not in b"
    other["first"] = weights()["first"]
    result = compare(Memory("a", weights()), Memory("b", dict(reversed(other.items()))))
    assert result.differing == ["norm", "big", "last"]
    assert result.first == "norm: row 6, column 0"
    other["norm"] = weights()["norm"]
    assert compare(Memory("a", weights()), Memory("b", other)).first == "big: row 1, column 1"


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda t: t.pop("big"), "big: is in a, but not in b"),
        (lambda t: t.update(extra=torch.ones(1)), "extra: is in b, but not in a"),
        (lambda t: t.update(big=t["big"].view(8, 40)), "big: has shape (40, 8) in a, but (8, 40) in b"),
        (lambda t: t.update(big=t["big"].bfloat16()), "big: is float32 in a, but bfloat16 in b"),
    ],
)
def test_what_is_missing_surplus_or_of_another_kind_is_a_difference(change, first: str):
    other = weights()
    change(other)
    result = compare(Memory("a", weights()), Memory("b", other))
    assert result.first == first
    assert len(result.differing) == 1


def test_a_cast_compares_rounded_values():
    rounded = {name: tensor.bfloat16() for name, tensor in weights().items()}
    exact, coarse = Memory("a", weights()), Memory("b", rounded)
    assert len(compare(exact, coarse).differing) == len(SHAPES)
    assert not compare(exact, coarse, "bfloat16").differing
    assert compare(exact, coarse, "float32").first.startswith("first: row ")


def worker_boxes() -> list[Box]:
    """Two workers: rows of `first`, columns of `big`, `norm` on both; `last` on the second alone."""
    return [
        Box("first", (0, 4), (0, 5), "worker 0"), Box("first", (4, 9), (0, 5), "worker 1"),
        Box("norm", (0, 7), (0, 1), "worker 0"), Box("norm", (0, 7), (0, 1), "worker 1"),
        Box("big", (0, 40), (0, 4), "worker 0"), Box("big", (0, 40), (4, 8), "worker 1"),
        Box("last", (0, 2), (0, 2), "worker 1"),
    ]  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
def test_a_holder_with_pieces_of_its_own_dictates_them(turned: bool):
    def both(tensors: dict[str, torch.Tensor]):
        pair = [Memory("files", weights()), Memory("generator", tensors, worker_boxes())]
        return compare(*(reversed(pair) if turned else pair))

    result = both(weights())
    assert not result.differing
    assert result.boxes == 7
    assert result.num_bytes == 4 * (45 + 2 * 7 + 320 + 4)
    other = weights()
    flip(other["big"], 6)
    flip(other["last"], 0)
    assert both(other).first == "big: rows 0 to 39, columns 4 to 7 on worker 1"
    assert both(other).differing == ["big", "last"]


def test_pieces_that_leave_something_out_are_a_difference():
    boxes = [box for box in worker_boxes() if box.where == "worker 1"]
    result = compare(Memory("files", weights()), Memory("generator", weights(), boxes))
    assert result.differing == ["first", "big"]
    assert result.first == "first: generator has only 25 of its 45 elements"


def test_signs_of_zeros_count_only_if_both_sides_can_tell_them():
    ours, theirs = weights(), weights()
    ours["norm"][2], theirs["norm"][2] = 0.0, -0.0
    assert compare(Memory("a", ours), Memory("b", theirs)).first == "norm: row 2, column 0"
    result = compare(Memory("a", ours), Memory("b", theirs, exact=False))
    assert (result.differing, result.exact) == ([], False)
    flip(theirs["norm"], 3)
    assert compare(Memory("a", ours, exact=False), Memory("b", theirs)).first == "norm: row 3, column 0"


def test_two_holders_with_pieces_of_their_own_cannot_be_compared():
    generators = [Memory(f"generator {i}", weights(), worker_boxes()) for i in range(2)]
    with pytest.raises(CheckpointError, match="compare each with files"):
        compare(*generators)
