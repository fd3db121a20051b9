"""An evaluation as a page: estimates with their intervals, and the answers of both sides."""

import json
from pathlib import Path
from typing import Any

from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.launch.evaluation_table import sections
from megatron_async_rlhf.pages.rendering import packed, render
from megatron_async_rlhf.telemetry.files import ANSWERS, EVALUATION, read_lines

_SIDES = ("policy", "against")


def evaluation_page(directory: Path, name: str) -> str:
    """
    Raises:
        DataError: `eval.json` or `answers.jsonl` is broken.
    """
    path = directory / EVALUATION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = [(title, [_row(metric, value) for metric, value in rows]) for title, rows in sections(content)]
        facts = [(key, content[key]) for key in ("policy", "against", "judged_by", "kl_to") if content[key] is not None]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not what async-rlhf eval writes ({error!r}); evaluate again") from None
    samples = [_entry(line, side) for line in read_lines(directory / ANSWERS) for side in _SIDES if side in line]
    return render(
        "report/evaluation.html.jinja",
        title=f"{name}: evaluation",
        content=content,
        facts=facts,
        parts=parts,
        win=content.get("wins", {}),
        versions=list(content["versions"].items()),
        data=packed({"runs": [{"name": name, "samples": samples}]}),
    )


def _row(metric: str, interval: dict[str, float]) -> list[str]:
    return [metric, *(f"{interval[key]:.4g}" for key in ("mean", "low", "high"))]


def _entry(line: dict[str, Any], side: str) -> dict[str, Any]:
    answers = line[side]
    return {
        "source": "held out",
        "when": side,
        "prompt": line["prompt"],
        "completions": [answer["text"] for answer in answers],
        "rewards": [answer["reward"] for answer in answers],
        "scores": [answer["scores"] for answer in answers],
        "finished": [answer["finished"] for answer in answers],
    }
