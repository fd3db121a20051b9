"""What policies answered, of training and of evaluations, as much of it as a page can hold."""

from pathlib import Path
from typing import Any

from megatron_async_rlhf.telemetry.files import EVALUATIONS, SAMPLES, read_lines, read_steps

_CHARACTERS = 4_000_000  # of prompts and completions, of a run's training, and as many of its evaluations


def read_samples(run_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Answers to one prompt each, and what was left out of the page.

    Returns:
        Entries with `source` (`training` or `held out`), `when` (`step 7`, `before`...), `prompt`, and for each completion
        its text, reward and, where known, versions, whether it ended by itself, and scores by part.
    """
    training = [
        {
            "source": "training",
            "when": f"step {line['step']}",
            "prompt": line["prompt"],
            "completions": line["completions"],
            "rewards": line["rewards"],
            "versions": line.get("versions"),
            "finished": line.get("finished"),
            "scores": line.get("scores"),
        }
        for line in read_steps(run_dir / SAMPLES)
    ]
    held_out = [
        {
            "source": "held out",
            "when": line["when"],
            "prompt": line["prompt"],
            "completions": [line["completion"]],
            "rewards": [line["reward"]],
        }
        for line in read_lines(run_dir / EVALUATIONS)
    ]
    entries, notes = [], []
    for what, all_of_them in (("steps", training), ("evaluations", held_out)):
        kept = _thinned(all_of_them)
        entries += kept
        if len(kept) < len(all_of_them):
            notes.append(f"{run_dir}: {len(kept):,} of {len(all_of_them):,} prompts of its {what} are on this page")
    return entries, notes


def _thinned(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every n-th of them, and the same prompts of every evaluation, if there are too many."""
    characters = sum(len(entry["prompt"]) + sum(map(len, entry["completions"])) for entry in entries)
    if characters <= _CHARACTERS:
        return entries
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(entry["prompt"] for entry in entries))}
    every = -(-characters // _CHARACTERS)
    return [entry for entry in entries if prompts[entry["prompt"]] % every == 0]
