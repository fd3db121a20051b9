"""What stages that have not been made yet will leave, as far as later stages can be planned with it.

A model is put into a scratch directory as a description: `config.json` and, if it is known, the tokenizer. Data is only promised.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.algorithms import PPOSection
from megatron_async_rlhf.config.load import check_tree, dump_config, set_key
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.files import is_local
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.formats.directory import copy_hf_files
from megatron_async_rlhf.formats.hub_snapshot import local_model
from megatron_async_rlhf.jobs.evaluated_models import KEYS
from megatron_async_rlhf.jobs.inputs import make_model_template
from megatron_async_rlhf.jobs.pair_inputs import make_reward_model_template
from megatron_async_rlhf.launch.evaluation import with_policies
from megatron_async_rlhf.launch.recipe import Recipe, Stage, filled
from megatron_async_rlhf.telemetry.files import ANSWERS, CHECKPOINT_DIR, EXPORT_DIR, PAIRS, RESOLVED_CONFIG, SAMPLES

_CHECKPOINT = re.compile(rf"{CHECKPOINT_DIR}/step_\d+")


class DescribedStages:
    """Of one recipe, in the order of its stages: first `config_of` a stage, then `add` it.

    Attributes:
        coming: models and files of data that a start will find, by where their descriptions are: `which the stage sft
            makes`.
    """

    def __init__(self, recipe: Recipe, scratch: Path) -> None:
        self._recipe, self._stages, self._absent = recipe, scratch / "stages", scratch / "absent"
        self._added: dict[str, Stage] = {}
        self._names = {str(self._stages): str(recipe.directory)}
        self.coming: dict[Path, str] = {}

    def are_made(self, names: list[str]) -> bool:
        """Whether these stages need no description."""
        return self._added.keys().isdisjoint(names)

    def config_of(self, stage: Stage) -> RunConfig:
        """The configuration with descriptions in place of what is not here.

        Raises:
            ConfigError, CheckpointError: one line.
        """
        directories = {
            name: (self._stages if name in self._added else self._recipe.directory) / name for name in stage.needs
        }
        tree = filled(stage.tree, directories)
        config = check_tree(tree)
        for key, source in _models_of(config, is_evaluation=stage.command == "eval").items():
            here = self._described(key, source, _value_at(stage.file, key))
            if here != source:
                set_key(tree, key, str(here))
        for key, text in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            if text is not None and is_local(text):
                self._check_made(key, Path(text))
        config = check_tree(tree)
        return with_policies(config, weights=False) if stage.command == "eval" else config

    def add(self, stage: Stage, config: RunConfig) -> None:
        """Describe what the stage will leave.

        Args:
            config: as `config_of` gave it.

        Raises:
            ConfigError, DataError: one line.
        """
        directory, makes = self._stages / stage.name, f"which the stage {stage.name} makes"
        self._added[stage.name] = stage
        directory.mkdir(parents=True)
        (directory / RESOLVED_CONFIG).write_text(dump_config(stage.config), encoding="utf-8")
        if stage.command in ("sft", "train"):
            make_model_template(config, directory / EXPORT_DIR, or_described=True)
        elif stage.command == "reward-model":
            make_reward_model_template(config, directory / EXPORT_DIR, or_described=True)
        self.coming |= {directory / name: makes for name in _files_of(stage)}

    def with_names(self, text: str) -> str:
        """A text about descriptions as one about what they describe."""
        for here, name in self._names.items():
            text = text.replace(here, name)
        return text

    def _described(self, key: str, source: Path, of_file: Any) -> Path:
        """Where a model is, or its description.

        Args:
            of_file: what the stage's own file names in its place.

        Raises:
            ConfigError: an earlier stage makes no such thing; or there is neither.
        """
        self._check_made(key, source)
        if source.exists() or source.is_relative_to(self._stages) or source.is_relative_to(self._recipe.directory):
            return source
        problem = None
        if not key.startswith("reward"):  # which a run takes from directories only
            try:
                if (found := local_model(source, key, weights=False)) != source:
                    return found
            except ConfigError as error:
                problem = error
        shape = Path(of_file) if isinstance(of_file, str) else None
        if shape is None or not (shape / "config.json").is_file():
            if problem is not None:
                raise problem
            return source
        here = self._absent / f"{len(self._names):03}"  # so that none is the beginning of another
        copy_hf_files(shape, here)
        self._names[str(here)] = str(source)
        self.coming[here] = f"which is not here: planned with what {shape} says of it"
        return here

    def _check_made(self, key: str, source: Path) -> None:
        """
        Raises:
            ConfigError: it is to be in the directory of an earlier stage, which will not leave it there.
        """
        if not source.is_relative_to(self._stages) or source in self.coming:
            return
        relative = source.relative_to(self._stages)
        earlier, inside = self._added[relative.parts[0]], Path(*relative.parts[1:]).as_posix()
        if inside == "." and key in KEYS.values():  # a run, of which an evaluation takes the policy
            return
        if _CHECKPOINT.fullmatch(inside) and (self._stages / earlier.name / EXPORT_DIR).is_dir():
            copy_hf_files(self._stages / earlier.name / EXPORT_DIR, source)
            self.coming[source] = f"which the stage {earlier.name} makes"
            return
        raise ConfigError(
            f"{key} = {source}: the stage {earlier.name} (async-rlhf {earlier.command}) makes no {inside}, only "
            f"{' and '.join(_files_of(earlier))}"
        )


def _files_of(stage: Stage) -> list[str]:
    """What a stage leaves that later ones read."""
    if stage.command == "eval":
        has_pairs = stage.config.eval is not None and stage.config.eval.pairs
        return [ANSWERS, *([PAIRS] if has_pairs else [])]
    return [EXPORT_DIR, *([SAMPLES] if stage.command == "train" else [])]


def _models_of(config: RunConfig, *, is_evaluation: bool) -> dict[str, Path]:
    """All models that the configuration names, by their keys."""
    models = {"model.hf": config.model.hf}
    models |= {f"{key}.model": section.model for key, section in config.reward_models.items()}
    if is_evaluation and config.eval is not None:
        models["eval.against"] = config.eval.against if isinstance(config.eval.against, Path) else None
        models["eval.kl_to"] = config.eval.kl_to
    elif isinstance(config.algorithm, PPOSection):
        models["algorithm.value_hf"] = config.algorithm.value_hf
    return {key: source for key, source in models.items() if source is not None}


def _value_at(tree: Mapping[str, Any], key: str) -> Any:
    """What a tree has at `section.key` or `section.0.key`; None for nothing."""
    node: Any = tree
    for part in key.split("."):
        if isinstance(node, list):
            node = node[int(part)] if part.isdecimal() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, Mapping) else None
    return node
