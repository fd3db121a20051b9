"""What a run reads that is not in its directory, remembered there, so that a resumed one continues with the same.

Prompts are compared as the run sees them, so that data, tokenizer, template and the code that makes prompts all count, and
nothing else does. Weights are compared by samples of their files.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from megatron_async_rlhf.checkpoint.run_checkpoints import has_own_reference
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.jobs.inputs import RunInputs, load_run_inputs
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.telemetry.files import INPUTS, POLICY_TEMPLATE_DIR, replace_file
from megatron_async_rlhf.types import Prompt
from megatron_async_rlhf.types import Sequence as Row

_FORMAT = 1
_WEIGHT_FILES = (".safetensors", ".distcp")
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each file: training changes nearly every number of a model


class PromptSet(Struct, frozen=True, kw_only=True):
    """Digests of a split's prompts, of each part in their order."""

    count: int
    texts: str
    solutions: str
    tokens: str


class InputDigests(Struct, frozen=True, kw_only=True):
    """Digests of all that a run reads from elsewhere.

    Attributes:
        weights: of `model.hf`; None without it.
        reward: of the source code that scores.
        reward_models: of the weights in the directories of reward models; None without any, and of runs of before.
    """

    train: PromptSet
    eval: PromptSet
    weights: str | None
    reward: str | None
    reward_models: str | None = None
    format: int = _FORMAT


def digest_inputs(config: RunConfig, run_inputs: RunInputs) -> InputDigests:
    """
    Raises:
        ConfigError: the weights of `model.hf`, or of a reward model, cannot be read.
    """
    return InputDigests(
        train=digest_prompts(run_inputs.train),
        eval=digest_prompts(run_inputs.eval),
        weights=None if config.model.hf is None else digest_weights(config.model.hf),
        reward=digest_code(run_inputs.reward),
        reward_models=digest_reward_models(config),
    )


def check_resumed_inputs(
    config: RunConfig,
    run_inputs: RunInputs | None = None,
    *,
    run_dir: Path | None = None,
    is_new: bool = False,
    starts_over: bool = False,
) -> tuple[InputDigests, list[str]]:
    """What is read now, and warnings; data and weights must still be those of the run that is resumed or done again.

    Args:
        run_inputs: what was loaded, if it was.
        run_dir: of that run; default: the one of `config`.
        is_new: there is no such run: nothing to compare with.
        starts_over: as in `check_same_inputs`.

    Raises:
        ConfigError, DataError: one line.
    """
    directory = run_dir or config.run.path.absolute()
    now = digest_inputs(config, run_inputs or load_run_inputs(config, directory / POLICY_TEMPLATE_DIR))
    return now, [] if is_new else check_same_inputs(directory, config, now, starts_over=starts_over)


def write_input_digests(run_dir: Path, inputs: Struct) -> None:
    """
    Args:
        inputs: `InputDigests` of a run; an evaluation has its own.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        replace_file(run_dir / INPUTS, msgspec.json.format(msgspec.json.encode(inputs), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"{run_dir / INPUTS} cannot be written ({error.strerror or error})") from None


def check_same_inputs(run_dir: Path, config: RunConfig, now: InputDigests, *, starts_over: bool = False) -> list[str]:
    """That what is read `now` is what the run in `run_dir` was started with; warnings about what can do no harm.

    Args:
        starts_over: the policy's weights are read from `model.hf` again, which a resumed run has in its checkpoint.

    Raises:
        ConfigError: one line naming the key whose contents are others.
    """
    path = run_dir / INPUTS
    try:
        before = msgspec.json.decode(path.read_bytes(), type=InputDigests)
    except FileNotFoundError:
        return [
            f"{run_dir} has no {INPUTS}, so it was started by an earlier version: whether data and model.hf are still the "
            "same cannot be checked"
        ]
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); delete it to continue without comparing the data"
        ) from None
    way_out = "; put back what was there, or start another run" + ("" if starts_over else " without --resume")
    for key, source, was, found in (
        ("data.train", config.data.train, before.train, now.train),
        ("data.eval", config.data.eval or f"null, held out of data.train = {config.data.train}", before.eval, now.eval),
    ):
        if (difference := _difference(was, found)) is not None:
            raise ConfigError(
                f"{key} = {source}: its prompts are not those that the run in {run_dir} was started with: {difference}{way_out}"
            )
    reads_weights = starts_over or (config.algorithm.has_reference and not has_own_reference(config))
    if reads_weights and before.weights != now.weights:
        raise ConfigError(
            f"model.hf = {config.model.hf}: its weights are not those that the run in {run_dir} was started with{way_out}"
        )
    if before.reward_models != now.reward_models:
        where = ", ".join(f"{key}.model = {section.model}" for key, section in config.reward_models.items())
        raise ConfigError(f"{where}: the weights are not those that the run in {run_dir} was started with{way_out}")
    if before.reward != now.reward:
        types = ", ".join(reward.type for reward in config.rewards)
        return [f"reward.type = {types}: its code has changed since the run in {run_dir} was started"]
    return []


def _difference(before: PromptSet, now: PromptSet) -> str | None:
    if before == now:
        return None
    if before.count != now.count:
        return f"there were {before.count}, there are {now.count}"
    parts = {"texts": "the texts", "solutions": "the solutions", "tokens": "the tokens (the template or tokenizer)"}
    return f"{next(what for part, what in parts.items() if getattr(before, part) != getattr(now, part))} differ"


def digest_code(reward: Reward) -> str:
    """Of the files with the code that scores."""
    return _digest(path.read_bytes() for path in reward.sources())


def digest_prompts(prompts: Sequence[Prompt]) -> PromptSet:
    return PromptSet(
        count=len(prompts),
        texts=_digest(_packed(prompt.text) for prompt in prompts),
        solutions=_digest(_packed([prompt.reference, prompt.solution]) for prompt in prompts),
        tokens=_digest(_packed(prompt.token_ids) for prompt in prompts),
    )


def digest_rows(rows: Iterable[Row]) -> str:
    """Of what supervised fine-tuning trains on, in its order."""
    return _digest(_packed([row.token_ids, row.prompt_length, row.ignored]) for row in rows)


def digest_reward_models(config: RunConfig) -> str | None:
    """Of the weights of all reward models; None without any."""
    models = [_packed(digest_weights(section.model, f"{key}.model")) for key, section in config.reward_models.items()]
    return _digest(models) if models else None


def digest_weights(directory: Path, key: str = "model.hf") -> str:
    """Of the names, the sizes and samples of the contents of its weight files.

    Args:
        key: of the configuration, that names the directory.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix in _WEIGHT_FILES)
        return _digest(part for path in files for part in _samples(path))
    except OSError as error:
        raise ConfigError(f"{key} = {directory}: cannot be read ({error.strerror or error})") from None


def _samples(path: Path) -> Iterable[bytes]:
    size = path.stat().st_size
    yield _packed([path.name, size])
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


def _packed(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
