"""What somebody probably meant who wrote a name that does not exist."""

import difflib
from collections.abc import Iterable, Sequence

_WORD = 4  # letters; fewer are initials
_ALIKE = 0.65  # difflib's ratio: `learning_rat` and `learning_rate` have 0.96, `bf16` and `bfloat16` 0.67, `steps` and `epochs` 0.55


def closest(given: str, names: Iterable[str]) -> str | None:
    """The name that `given` most likely stands for, None if none is near.

    Case, hyphens and underscores do not matter. The only name that continues after `given` comes first. A name's initials (`lr` for `learning_rate`) and one of its words, if no
    other name has it, stand for it too.
    """
    plain = {_plain(name): name for name in names}
    wanted = _plain(given)
    if not wanted:
        return None
    begun = [name for key, name in plain.items() if key.startswith(f"{wanted}_")]
    if len(begun) == 1 and len(wanted) >= _WORD:
        return begun[0]
    if found := difflib.get_close_matches(wanted, plain, n=1, cutoff=_ALIKE):
        return plain[found[0]]
    for alike in (
        [name for key, name in plain.items() if "_" in key and _initials(key) == wanted],
        [name for key, name in plain.items() if wanted in key.split("_")],
    ):
        if len(alike) == 1:
            return alike[0]
    return None


def did_you_mean(given: str, names: Sequence[str], *, otherwise: str = "it must be one of {names}") -> str:
    """The end of a message about a name that does not exist: the one that was meant, or all there are."""
    meant = closest(given, names)
    return f"did you mean {meant}?" if meant is not None else otherwise.format(names=", ".join(names))


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _initials(key: str) -> str:
    return "".join(word[:1] for word in key.split("_"))
