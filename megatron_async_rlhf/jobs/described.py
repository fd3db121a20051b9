"""Models of which only the description is here, `config.json` and perhaps a tokenizer: a dry run can plan with them."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from msgspec import Struct

from megatron_async_rlhf.config.algorithms import PPOSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.files import find_local, is_local
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.formats.directory import hf_files_of, is_checkpoint
from megatron_async_rlhf.formats.hub_snapshot import is_snapshot
from megatron_async_rlhf.formats.safetensors_files import SINGLE, weight_files

NOT_CHECKED = "not checked, and needed for a start: "  # before each of the lines
_TOKENIZER = "tokenizer.json"


class Missing(Struct, frozen=True, kw_only=True):
    """What a start on this machine would lack, and how to get it, a line each."""

    tokenizers: list[str] = []
    weights: list[str] = []
    prompts: list[str] = []

    @property
    def lines(self) -> list[str]:
        return [*self.tokenizers, *self.weights, *self.prompts]

    @property
    def hides_data(self) -> bool:
        """Whether nothing is known of the rows of this stage."""
        return bool(self.tokenizers or self.prompts)


def only_described(directory: Path) -> bool:
    """Whether no file there looks like weights, or they are a checkpoint's, which takes torch to read."""
    return find_spec("torch") is None if is_checkpoint(directory) else not weight_files(directory)


def has_tokenizer(directory: Path) -> bool:
    return (hf_files_of(directory) / _TOKENIZER).is_file()


def missing_inputs(
    config: RunConfig,
    *,
    policies: Mapping[str, Path] | None = None,
    rewards: bool = True,
    coming: Mapping[Path, str] | None = None,
) -> Missing:
    """What a dry run does without. It then plans for the machine that has it.

    Of a model of which any weight is here everything is checked, so nothing of it is missing in this sense. Data may be
    missing beside a model that is only described.

    Args:
        policies: language models by their keys in the configuration; default: `model.hf`.
        rewards: whether completions are scored, so that the reward models that are served are needed too.
        coming: models and files of data that will be there by a start: `which the stage sft makes`.
    """
    coming = coming or {}
    models = dict(policies) if policies is not None else {"model.hf": config.model.hf} if config.model.hf else {}
    if rewards:
        models |= {f"{key}.model": section.model for key, section in config.served_reward_models.items()}
    read_as_text = set(models)
    if policies is None and rewards and isinstance(config.algorithm, PPOSection) and config.algorithm.value_hf:
        models["algorithm.value_hf"] = config.algorithm.value_hf
    planned = {key: source for key, source in models.items() if only_described(source)}
    tokenizers = [
        _tokenizer_line(key, source, coming)
        for key, source in planned.items()
        if key in read_as_text and not has_tokenizer(source)
    ]
    weights = [_weights_line(key, source, coming) for key, source in planned.items()]
    prompts = _missing_data(config, coming, is_planned=bool(weights))
    return Missing(tokenizers=tokenizers, weights=weights, prompts=prompts)


def _tokenizer_line(key: str, source: Path, coming: Mapping[Path, str]) -> str:
    if come := coming.get(source):
        return f"tokenizer: that of {key} = {source}, {come}"
    return f"tokenizer: no {_TOKENIZER} in {key} = {source}; get the whole model and name its directory"


def _weights_line(key: str, source: Path, coming: Mapping[Path, str]) -> str:
    if is_checkpoint(source):
        return f"weights: torch, without which those in the checkpoint {key} = {source} cannot be read"
    if come := coming.get(source) or ("which a start downloads" if is_snapshot(source) else None):
        return f"weights: those of {key} = {source}, {come}"
    return f"weights: no {SINGLE} in {key} = {source}; get the whole model and name its directory"


def _missing_data(config: RunConfig, coming: Mapping[Path, str], *, is_planned: bool) -> list[str]:
    """
    Args:
        is_planned: for another machine, which may have files that this one has not.
    """
    lines = []
    for key, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if source is None or not is_local(source):
            continue
        if come := coming.get(Path(source)):
            lines.append(f"prompts: {key} = {source}, {come}")
        elif is_planned:
            try:
                find_local(source, key, beside=config.data.train if key == "data.eval" else None)
            except DataError as error:
                lines.append(f"prompts: {error}")
    return lines
