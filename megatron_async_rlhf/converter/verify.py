"""Proves that two holders of a model have the same bytes, by digests of the same rectangles on both sides.

A holder that reads files can digest any rectangle. One that is far away, such as the workers of a generator, offers
digests of the rectangles it has, and the other side follows.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.holder import Box, WeightHolder
from megatron_async_rlhf.formats.stored import DTYPES, STAGING_BYTES


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared, and how it came out.

    Attributes:
        tensors: on either side.
        boxes, num_bytes: whose digests were compared; what several workers hold counts each time.
        differing: tensors that are not the same on both sides, in the order of the model.
        first: where the first of them differs, in one line; empty if none does.
        exact: False if one side could not tell negative zeros from positive ones.
    """

    tensors: int
    boxes: int
    num_bytes: int
    differing: list[str]
    first: str
    exact: bool


def compare(ours: WeightHolder, theirs: WeightHolder, cast: str | None = None) -> Comparison:
    """Compare every tensor of both holders.

    Args:
        cast: dtype to round both sides to first; without it a different dtype is a difference.

    Raises:
        CheckpointError: a holder cannot be read, or neither can follow the other's rectangles.
    """
    names = [*ours.tensors, *(name for name in theirs.tensors if name not in ours.tensors)]
    unlike = {name: line for name in names if (line := _unlike(name, ours, theirs, cast))}
    dtypes = {name: cast or ours.tensors[name].dtype for name in names if name not in unlike}
    boxes = _boxes_to_compare(ours, theirs, dtypes)
    unlike |= _incomplete(boxes, ours, theirs, dtypes)
    wrong: dict[str, Box] = {}
    with ThreadPoolExecutor(1) as pool:
        agree = _Agreement(ours, theirs, pool)
        for box in boxes:
            if box.tensor not in wrong and not agree(box, dtypes[box.tensor]):
                wrong[box.tensor] = box
        differing = [name for name in names if name in unlike or name in wrong]
        first = ""
        if differing and (name := differing[0]) in wrong:
            fixed = ours.boxes is not None or theirs.boxes is not None
            first = str(wrong[name] if fixed else _narrow(wrong[name], dtypes[name], agree))
        elif differing:
            first = unlike[differing[0]]
    return Comparison(
        tensors=len(names),
        boxes=len(boxes),
        num_bytes=sum(box.size * DTYPES[dtypes[box.tensor]].itemsize for box in boxes),
        differing=differing,
        first=first,
        exact=agree.exact,
    )


class _Agreement:
    """Whether both holders have the same bytes in a rectangle; one digests on a thread of its own."""

    def __init__(self, ours: WeightHolder, theirs: WeightHolder, pool: ThreadPoolExecutor) -> None:
        self._ours, self._theirs, self._pool = ours, theirs, pool
        self.exact = ours.exact and theirs.exact

    def __call__(self, box: Box, dtype: str) -> bool:
        theirs = self._pool.submit(self._theirs.digest, box, dtype, exact=self.exact)
        return self._ours.digest(box, dtype, exact=self.exact) == theirs.result()


def _unlike(name: str, ours: WeightHolder, theirs: WeightHolder, cast: str | None) -> str:
    """Why the values of a tensor need not be looked at; empty if they do."""
    for holder, other in ((ours, theirs), (theirs, ours)):
        if name not in holder.tensors:
            return f"{name}: is in {other.label}, but not in {holder.label}"
    a, b = ours.tensors[name], theirs.tensors[name]
    if a.shape != b.shape:
        return f"{name}: has shape {a.shape} in {ours.label}, but {b.shape} in {theirs.label}"
    if a.dtype != b.dtype and cast is None:
        return f"{name}: is {a.dtype} in {ours.label}, but {b.dtype} in {theirs.label}"
    return ""


def _boxes_to_compare(ours: WeightHolder, theirs: WeightHolder, dtypes: Mapping[str, str]) -> list[Box]:
    """The rectangles one side dictates, or blocks of rows of a few megabytes."""
    if ours.boxes is not None and theirs.boxes is not None:
        raise CheckpointError(f"{ours.label} and {theirs.label} both have pieces of their own; compare each with files")
    dictated = theirs.boxes if ours.boxes is None else ours.boxes
    if dictated is not None:
        return [box for box in dictated if box.tensor in dtypes]
    boxes = []
    for name, dtype in dtypes.items():
        rows, cols = ours.tensors[name].matrix
        step = max(1, STAGING_BYTES // max(cols * DTYPES[dtype].itemsize, 1))
        boxes += [Box(name, (row, min(row + step, rows)), (0, cols)) for row in range(0, rows, step)]
    return boxes


def _incomplete(
    boxes: Sequence[Box], ours: WeightHolder, theirs: WeightHolder, dtypes: Mapping[str, str]
) -> dict[str, str]:
    """Tensors of which the rectangles leave something out. Rectangles are equal or apart, never half over another."""
    sizes = {(box.tensor, box.rows, box.cols): box.size for box in boxes}
    held = dict.fromkeys(dtypes, 0)
    for (name, _, _), size in sizes.items():
        held[name] += size
    holder = theirs if ours.boxes is None else ours
    return {
        name: f"{name}: {holder.label} has only {size} of its {prod(ours.tensors[name].shape)} elements"
        for name, size in held.items()
        if size != prod(ours.tensors[name].shape)
    }


def _narrow(box: Box, dtype: str, agree: _Agreement) -> Box:
    """The first element, row by row, in which a rectangle differs."""
    row = box._replace(rows=_first_unlike(box.rows, lambda rows: agree(box._replace(rows=rows), dtype)))
    return row._replace(cols=_first_unlike(row.cols, lambda cols: agree(row._replace(cols=cols), dtype)))


def _first_unlike(extent: tuple[int, int], agrees: Callable[[tuple[int, int]], bool]) -> tuple[int, int]:
    """The first place of a range where the sides do not agree, `[place, place + 1)`; there is one."""
    begin, end = extent
    while end - begin > 1:
        middle = (begin + end) // 2
        if agrees((begin, middle)):
            begin = middle
        else:
            end = middle
    return begin, end
