"""Numbers that somebody wrote with a unit, as the key wants them: keys have their unit in their name and take numbers alone."""

import re

_FORM = re.compile(r"([-+]?\d+(?:\.\d+)?)\s*([A-Za-z%]+)")
_TIMES = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "seconds": 1.0, "m": 60.0, "min": 60.0, "minutes": 60.0, "h": 3600.0}
_TIMES |= {"hours": 3600.0, "d": 86400.0, "days": 86400.0}
_BYTES: dict[str, float] = {
    "k": 2**10,
    "kb": 10**3,
    "kib": 2**10,
    "m": 2**20,
    "mb": 10**6,
    "mib": 2**20,
    "g": 2**30,
    "gb": 10**9,
}
_BYTES |= {"gib": 2**30, "t": 2**40, "tb": 10**12, "tib": 2**40}
_COUNTS = {"%": 0.01, "k": 1e3, "m": 1e6, "b": 1e9}
# Of what is counted, by the ends of the keys' names.
UNITS = {
    "_s": "s", "_seconds": "s", "_mib": "MiB", "_gib": "GiB", "_gbit_s": "Gbit/s", "_tflops": "TFLOP/s", "_tokens": "tokens",
    "_steps": "steps",
}  # fmt: skip
_OF_KEYS: tuple[tuple[tuple[str, ...], dict[str, float], float], ...] = (
    (("_s", "_seconds"), _TIMES, 1.0),
    (("_mib",), _BYTES, 2.0**20),
    (("_gib",), _BYTES, 2.0**30),
)


def unit_of(key: str) -> str | None:
    """What a key counts, if its name says so."""
    longest = max((end for end in UNITS if key.endswith(end)), key=len, default=None)
    return None if longest is None else UNITS[longest]


def as_number(key: str, text: str) -> float | None:
    """
    Args:
        key: whose name ends in its unit, if it has one.

    Returns:
        The number alone; None if `text` is no number with a unit that fits the key.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        return None
    sizes, unit = next(((sizes, unit) for ends, sizes, unit in _OF_KEYS if key.endswith(ends)), (_COUNTS, 1.0))
    size = sizes.get(found[2].lower())
    return None if size is None else float(found[1]) * size / unit
