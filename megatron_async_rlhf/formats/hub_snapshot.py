"""Models named as at the Hugging Face hub (`org/name`, `org/name@revision`): where its cache has them on this machine."""

import re
from functools import lru_cache
from pathlib import Path

from megatron_async_rlhf.config.algorithms import PPOSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.formats.directory import HF_FILES
from megatron_async_rlhf.formats.safetensors_files import INDEX, SINGLE
from megatron_async_rlhf.hub import described, hub_problem

_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[^\s@]+))?")
# What is read of a model: repositories have its weights in other formats too.
_DESCRIPTION = (*HF_FILES, "additional_chat_templates/*.jinja", "adapter_config.json")
_WEIGHTS = (SINGLE, INDEX, "model-*-of-*.safetensors")


def with_local_models(config: RunConfig, *, weights: bool = True) -> RunConfig:
    """The configuration with directories in place of names at the hub, downloaded into the hub's own cache.

    A directory that is called like one is that directory.

    Args:
        weights: or only what describes the model, if nothing is to be started.

    Raises:
        ConfigError: one line on why a model cannot be had.
    """
    changes: dict[str, object] = {}
    if config.model.hf is not None:
        hf = local_model(config.model.hf, "model.hf", weights=weights)
        changes["model"] = config.model.model_copy(update={"hf": hf})
    if isinstance(config.algorithm, PPOSection) and config.algorithm.value_hf is not None:
        value_hf = local_model(config.algorithm.value_hf, "algorithm.value_hf", weights=weights)
        changes["algorithm"] = config.algorithm.model_copy(update={"value_hf": value_hf})
    return config.model_copy(update=changes)


def local_model(given: Path, key: str, *, weights: bool = True) -> Path:
    """The directory that is meant; the given one, if it is there or no name at the hub.

    Raises:
        ConfigError: one line naming `key`.
    """
    if given.exists() or (named := _NAME.fullmatch(str(given))) is None:
        return given
    return _download(named["repository"], named["revision"], f"{key} = {given}", weights)


def is_snapshot(directory: Path) -> bool:
    """Whether it is a model in the hub's cache."""
    return directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")


@lru_cache  # the points of a sweep have the same one
def _download(repository: str, revision: str | None, where: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    files = [*_DESCRIPTION, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # the library and what is below it raise dozens of types
        problem = hub_problem(error, "model", repository) or f"cannot be downloaded ({described(error)})"
        raise ConfigError(f"{where}: no such directory; {problem}") from None
