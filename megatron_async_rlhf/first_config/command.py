"""`async-rlhf init`: from a model and data to a configuration that runs."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.telemetry.files import writing

_HEADER = """\
# Asynchronous RL of {model} on {data}. All keys: docs/configuration.md
#   async-rlhf train {file} --dry-run     checks everything, and estimates memory and time
#   async-rlhf train {file}
"""
_REWARD = '''\
"""The reward of {config}: what RL makes more of."""


def score(prompt: str, completions: list[str]{parameters}) -> list[float]:
    """One number for each completion of a prompt, the higher the better.

    This one prefers short answers that end with a full stop, to have a run that shows something: put what you want in its
    place. Columns of the data are given by name, if `data.reference_fields` in {config} lists them.
    """
    return [0.5 * text.rstrip().endswith(".") - min(1.0, len(text) / 1000) for text in completions]
'''


def init(
    config: Annotated[Path, typer.Argument(help="The YAML file to write; a reward.py comes beside it where needed.")],
    model: Annotated[str, typer.Option(help="Hugging Face directory, or org/name at the hub.")],
    data: Annotated[str, typer.Option(help="As data.train: a file, a directory, or hf:name:split.")],
    held_out: Annotated[
        str | None, typer.Option("--eval", help="As data.eval; default: some prompts of --data are held out.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="gsm8k, math, ifeval, a function FILE.py:NAME, or the directory of a reward model; default: what the data "
            "suggest, or a function to write."
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="To run on, 0: CPUs; default: those of this machine.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write a first configuration for a model and data, with a comment on every key.

    Lengths come from the data, the reward from what their solutions look like, the layout on GPUs from the planner.

    Example: async-rlhf init run.yaml --model models/SmolLM2-135M-Instruct --data chats.jsonl --reward own.py:score
    """
    from megatron_async_rlhf.config.load import check_tree
    from megatron_async_rlhf.devices import gpus_here
    from megatron_async_rlhf.first_config.choices import choose
    from megatron_async_rlhf.first_config.commented import commented
    from megatron_async_rlhf.first_config.task import read_task
    from megatron_async_rlhf.formats.hub_snapshot import with_local_models

    own = config.parent / "reward.py"
    _refuse_existing(config, force)
    keys = {"train": data} | ({"eval": held_out} if held_out else {})
    looked = {"model": {"hf": model}, "data": keys, "reward": {"type": "length", "per_token": 0.001}}
    task = read_task(with_local_models(check_tree(looked), weights=False))
    section = _reward_section(reward)
    count = gpus_here() if gpus is None else gpus
    choices = choose(
        task, name=_name_of(config), model=model, train=data, held_out=held_out, reward=section, gpus=count
    )
    tree = choices.tree
    if choices.writes_reward:
        _refuse_existing(own, force)
        tree["reward"]["function"] = f"{own}:score"
    elif section is not None and section["type"] == "function":
        tree["data"] |= _columns_of(section["function"], task.others)
    checked = with_local_models(check_tree(tree), weights=False)
    why = dict(choices.why)
    if count > 1:
        why |= _planned(checked, tree)
    header = _HEADER.format(model=model, data=data, file=config)
    with writing(config):
        config.write_text(f"{header}\n{commented(tree, why)}", encoding="utf-8")
    typer.echo(f"wrote {config}")
    if choices.writes_reward:
        given = "".join(f", {name}" for name in task.others)
        with writing(own):
            own.write_text(_REWARD.format(config=config, parameters=given), encoding="utf-8")
        typer.echo(f"wrote {own}: the reward, an example; put your own in its place")
    typer.echo(f"next: async-rlhf train {config} --dry-run")


def _name_of(config: Path) -> str:
    """A name for the run, after the file's."""
    return re.sub(r"[^A-Za-z0-9._-]|^[._-]+", "", config.stem) or "run"


def _refuse_existing(file: Path, force: bool) -> None:
    if file.exists() and not force:
        raise ConfigError(f"{file} is there already; give another name, or --force to overwrite it")


def _reward_section(reward: str | None) -> dict[str, Any] | None:
    from megatron_async_rlhf.config.rewards import REWARDS
    from megatron_async_rlhf.suggestions import did_you_mean

    if reward is None:
        return None
    if reward in ("gsm8k", "math", "ifeval"):
        return {"type": reward}
    if ".py:" in reward:
        return {"type": "function", "function": reward}
    if Path(reward).is_dir():
        return {"type": "reward_model", "model": reward}
    if reward in REWARDS:
        raise ConfigError(f"--reward {reward} has keys of its own; write the file without it, then see docs/rewards.md")
    names = ("gsm8k", "math", "ifeval")
    way_out = did_you_mean(reward, names, otherwise="give gsm8k, math, ifeval, FILE.py:NAME, or a directory")
    raise ConfigError(f"--reward {reward}: no reward is called so, and there is no such directory; {way_out}")


def _columns_of(function: str, columns: list[str]) -> dict[str, Any]:
    """The columns that a function has parameters for."""
    from megatron_async_rlhf.rewards.function import inspect_function
    from megatron_async_rlhf.rewards.workers import TimeLimit

    parameters = inspect_function(f"--reward {function}", function, TimeLimit("--reward", 60.0))
    wanted = [name for name in columns if name in parameters.names]
    return {"reference_fields": wanted} if wanted else {}


def _planned(task: RunConfig, tree: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The planner's layout, put into `tree`; what it says of it by key."""
    from megatron_async_rlhf.plan.report import settings_of
    from megatron_async_rlhf.plan.search import fastest, find_plans, step_seconds
    from megatron_async_rlhf.simulate.prediction import shape_of

    best = fastest(find_plans(task, shape_of(task), best=1))
    before = settings_of(task)
    for section, keys in settings_of(best.config).items():
        changed = {key: value for key, value in keys.items() if value != before[section][key]}
        tree[section] = tree[section] | changed
    return {"schedule.mode": f"the planner's choice, with the layout: {step_seconds(best):.1f} s a step are predicted"}
