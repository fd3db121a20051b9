"""What became of the records of a run's data: how many there were, are used, and are left out for which reason."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from msgspec import Struct, field

from megatron_async_rlhf.data.rows import Row
from megatron_async_rlhf.errors import DataError, RecordError

_Item = TypeVar("_Item")


class DataReport(Struct):
    """Counts over all sources of a run: `read` is `used` and all that is `dropped`, together.

    Attributes:
        dropped: records that are not used, by reason.
        notes: lines for the user, in the order in which they came up.
    """

    read: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, count: int) -> None:
        """So many of the records that were used so far are not."""
        if count:
            self.dropped[reason] += count
            self.used -= count

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


def keep_good(
    rows: Iterable[Row],
    make: Callable[[Mapping[str, Any], str], _Item],
    *,
    source: str,
    bad_records: Literal["refuse", "drop"],
    report: DataReport,
) -> list[_Item]:
    """What `make` makes of each row, given its record and where it is; those of which it can make nothing are counted.

    Args:
        source: key and value of the configuration, for messages about the whole.

    Raises:
        DataError: rows are bad and may not be dropped, naming the first; or all are; or there are none.
    """
    good: list[_Item] = []
    bad: Counter[str] = Counter()
    first: dict[str, RecordError] = {}
    for row in rows:
        try:
            if isinstance(row.record, RecordError):
                raise row.record
            good.append(make(row.record, row.where))
        except RecordError as error:
            bad[error.reason] += 1
            first.setdefault(error.reason, error)
    total = len(good) + bad.total()
    if not total:
        raise DataError(f"{source}: has no prompts; give a source with at least one record")
    if not good:
        every = "" if total == 1 else f" (all {total} records are bad: {_by_reason(bad)})"
        raise DataError(f"{next(iter(first.values()))}{every}")
    if bad and bad_records == "refuse":
        raise DataError(
            f"{next(iter(first.values()))} (bad are {bad.total()} of {total} records: {_by_reason(bad)}; data.bad_records = "
            "drop leaves them out)"
        )
    for reason, fault in first.items():
        report.note(f"{source}: {bad[reason]} of {total} records are left out for {reason}; the first: {fault}")
    report.read += total
    report.used += len(good)
    report.dropped.update(bad)
    return good


def _by_reason(bad: Counter[str]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in bad.items())
