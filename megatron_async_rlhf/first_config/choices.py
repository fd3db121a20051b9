"""What a first configuration sets, and why: sizes from the data, rates from the size of the model, layouts from the planner."""

from typing import Any

from msgspec import Struct

from megatron_async_rlhf.first_config.task import Task

_ROUND = 32  # tokens
_MOST_NEW = {"cpu": 256, "cuda": 2048}
_WITHOUT_SOLUTIONS = {"cpu": 64, "cuda": 512}
# Learning rates of RL by parameters: of the recipes in examples, and of the paper from 0.4 to 2.8 billion on.
_RATES = ((10e6, 1e-4), (300e6, 1e-5), (3e9, 3e-6))
_LARGEST_RATE = 1e-6
_IFEVAL = ("instruction_id_list", "kwargs")


class Choices(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        tree: the configuration.
        why: by key, in place of what the key means in general.
        writes_reward: the reward is a function that has still to be written.
    """

    tree: dict[str, dict[str, Any]]
    why: dict[str, str]
    writes_reward: bool


def choose(
    task: Task, *, name: str, model: str, train: str, held_out: str | None, reward: dict[str, Any] | None, gpus: int
) -> Choices:
    """
    Args:
        name: of the run.
        reward: the section; None: what the data suggest.
        gpus: 0 for CPUs.
    """
    device, why = "cuda" if gpus else "cpu", {}
    longest, usual = task.prompts[-1], _rounded(_percentile(task.prompts, 95))
    new = _rounded(_percentile(task.solutions, 95)) if task.solutions else _WITHOUT_SOLUTIONS[device]
    new = max(_ROUND, min(new, _MOST_NEW[device], task.architecture.context_length // 2))
    room = task.architecture.context_length - new
    prompt = min(room, usual if usual >= _ROUND else _ROUND)
    why["generator.max_new_tokens"] = _why_new(task)
    why["data.max_prompt_tokens"] = f"of {len(task.prompts):,} prompts that were looked at the longest has {longest}"
    why["data.train"] = task.said or ""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "device": device},
        "model": {"hf": model, "context_length": prompt + new},
        "data": {"train": train, "max_prompt_tokens": prompt},
    }
    if held_out is not None:
        tree["data"]["eval"] = held_out
    else:
        tree["data"]["eval_prompts"] = max(1, min(64 if device == "cpu" else 256, len(task.prompts) // 5))
    if longest > prompt:
        tree["data"]["long_prompts"] = "drop"
    if task.bad:
        tree["data"]["bad_records"] = "drop"
        why["data.bad_records"] = f"{task.bad} of {task.looked_at:,} records cannot be used"
    own = reward is None and _suggested(task) is None
    tree["reward"] = reward or _suggested(task) or {"type": "function", "function": "reward.py:score"}
    why["reward.type"] = "" if reward else _why_reward(task)
    if own and task.others:
        tree["data"]["reference_fields"] = task.others
    tree["algorithm"] = {"type": "online_dpo", "samples_per_prompt": 4, "beta": 0.1}
    tree["schedule"] = {
        "mode": "async",
        "max_staleness": 1,
        "steps": 32,
        "prompts_per_step": 8 if device == "cpu" else 64,
    }
    tree["learner"] = {
        "learning_rate": _rate(task),
        "micro_batch_tokens": max(1024 if device == "cpu" else 8192, 2 * (prompt + new)),  # a pair is in one of them
    }
    why["learner.learning_rate"] = f"usual for {_count(task.architecture.num_parameters)} parameters"
    tree["generator"] = {"temperature": 0.7, "max_new_tokens": new, "max_concurrent": 32 if device == "cpu" else 256}
    tree["checkpoint"] = {"every_steps": 16}
    if gpus:
        tree["learner"]["precision"], tree["generator"]["dtype"] = "bf16", "bfloat16"
        tree["weights"] = {"transport": "nccl" if gpus > 1 else "ipc"}
        if gpus == 1:
            why["weights.transport"] = "learner and generator share the one GPU; nccl if each has its own"
        tree["launch"] = {"gpus_per_node": gpus}
    return Choices(tree=tree, why=why, writes_reward=own)


def _suggested(task: Task) -> dict[str, Any] | None:
    if set(_IFEVAL) <= set(task.others):
        return {"type": "ifeval"}
    return {"number": {"type": "gsm8k"}, "boxed": {"type": "math"}, None: None}[task.answers]


def _why_reward(task: Task) -> str:
    if set(_IFEVAL) <= set(task.others):
        return f"the data have the columns {' and '.join(_IFEVAL)}"
    ends = {"number": "have a line `#### <number>`", "boxed": "have a \\boxed{} answer"}
    return f"all solutions {ends[task.answers]}" if task.answers else "a function of your own"


def _why_new(task: Task) -> str:
    if not task.solutions:
        return "most tokens of a completion; the data have no solutions to tell how long it should be"
    return f"most tokens of a completion; of the solutions 95 % have at most {_percentile(task.solutions, 95)}"


def _rate(task: Task) -> float:
    size = task.architecture.num_parameters
    return next((rate for most, rate in _RATES if size <= most), _LARGEST_RATE)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.0f} million"


def _percentile(sizes: list[int], share: int) -> int:
    """Of sorted sizes."""
    return sizes[min(len(sizes) - 1, len(sizes) * share // 100)]


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND
