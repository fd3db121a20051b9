"""Everything that can be checked or made before a process starts: model template, tokenizer, prompts, layouts.

No torch. `async-rlhf train` runs it first, so bad input costs one line and no start-up; the controller runs it
again to get the same objects.
"""

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

from msgspec import Struct

from megatron_async_rlhf.config.algorithms import LOSS_ARGUMENTS, GRPOSection, PPOSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.prompts import build_prompts
from megatron_async_rlhf.data.report import DataReport
from megatron_async_rlhf.data.solutions import solved_prompts
from megatron_async_rlhf.data.source import load_examples
from megatron_async_rlhf.data.tokenizer import (
    Tokenizer,
    fix_date,
    make_byte_tokenizer,
    set_chat_template,
    train_bpe_tokenizer,
)
from megatron_async_rlhf.errors import ConfigError, DataError
from megatron_async_rlhf.formats.directory import check_format, copy_hf_files, hf_files_of, is_checkpoint
from megatron_async_rlhf.formats.safetensors_files import find_files, find_weights, refuse_adapter
from megatron_async_rlhf.formats.tensor_spec import TensorSpec
from megatron_async_rlhf.formats.value_source import check_value_source
from megatron_async_rlhf.jobs.described import has_tokenizer, only_described
from megatron_async_rlhf.jobs.reward_models import check_reward_models, length_warnings, load_reward_models
from megatron_async_rlhf.models.architecture import (
    Architecture,
    architecture_of,
    architecture_of_hf,
    check_causal_model,
    check_value_architecture,
    policy_architecture,
)
from megatron_async_rlhf.models.hf_mapping import check_shapes
from megatron_async_rlhf.models.layout_rules import check_layouts
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.rewards.function import check_parameters, inspect_function
from megatron_async_rlhf.rewards.preflight import check_entry
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.rewards.workers import TimeLimit
from megatron_async_rlhf.telemetry.summary import DataCounts
from megatron_async_rlhf.types import Prompt, Sequence
from megatron_async_rlhf.weights.plan import TransferPlan, configured_transfer


class RunInputs(Struct, frozen=True, kw_only=True):
    """What a run works with, as its config describes it.

    Attributes:
        solved: prompt and solution as one row by prompt index; empty without a warm start.
        data: what became of the records that prompts are made of.
        transfer: how a push moves the policy to one generator.
    """

    architecture: Architecture
    tokenizer: Tokenizer
    train: list[Prompt]
    eval: list[Prompt]
    solved: dict[int, Sequence]
    data: DataReport
    reward: Reward
    transfer: TransferPlan


def data_counts(report: DataReport) -> DataCounts:
    """For the summary of the run."""
    return DataCounts(read=report.read, used=report.used, dropped=dict(report.dropped))


def make_model_template(
    config: RunConfig, directory: Path, *, or_classifier: bool = False, or_described: bool = False
) -> None:
    """Write Hugging Face config and tokenizer of the policy, without weights, into `directory`, and today's date.

    Args:
        or_classifier: `model.hf` may be a model for sequence classification as well.
        or_described: `model.hf` may be without weights, and then without a tokenizer.

    Raises:
        ConfigError, DataError: one line.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fix_date(directory)
    if config.model.hf is not None:
        is_description = or_described and only_described(config.model.hf)
        _copy_template(config.model.hf, directory, or_classifier, is_description)
        if is_description and not has_tokenizer(directory):
            return
    else:
        _make_fresh_template(config, directory)
    set_chat_template(directory, config.model.chat_template)


def _make_fresh_template(config: RunConfig, directory: Path) -> None:
    if config.model.tokenizer == "bpe":
        assert config.model.vocab_size is not None  # it goes with bpe
        train_bpe_tokenizer(
            directory, _texts(load_examples(config.data_read, "train", config.run.seed)), config.model.vocab_size
        )
    else:
        make_byte_tokenizer(directory)
    tokenizer = Tokenizer.load(directory)
    hf = architecture_of(config.model, tokenizer.vocab_size).to_hf(
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    (directory / "config.json").write_text(json.dumps(hf, indent=1) + "\n", encoding="utf-8")


def resolve_architecture(config: RunConfig, template: Path) -> tuple[Architecture, TransferPlan]:
    """What follows from the model's shape alone: needs no more than the `config.json` in `template`.

    Raises:
        ConfigError: one line.
    """
    architecture = policy_architecture(config.model, template)
    check_layouts(config, architecture)
    if (source := value_source(config)) is not None:
        check_value_architecture(source, hf_files_of(source), architecture)
    return architecture, configured_transfer(config, architecture)


def value_source(config: RunConfig) -> Path | None:
    """What PPO's value model starts from, if not from the policy."""
    return config.algorithm.value_hf if isinstance(config.algorithm, PPOSection) else None


def check_inputs(config: RunConfig, template: Path, *, or_described: bool = False) -> RunInputs:
    """All that a run reads, from the tokenizer to the weights, in the order in which every command checks it.

    Args:
        or_described: models may be without weights.

    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    run_inputs = load_run_inputs(config, template)
    check_policy_weights(config, run_inputs.architecture, or_described=or_described)
    check_value_weights(config, run_inputs.architecture, or_described=or_described)
    check_functions(config, run_inputs)
    check_reward_models(config, run_inputs.reward, run_inputs.train, or_described=or_described)
    return run_inputs


def check_functions(config: RunConfig, run_inputs: RunInputs) -> None:
    """
    Raises:
        ConfigError: a function of the user's cannot be imported, or cannot be called with what it is given.
        ConfigError, DataError: as `check_rewards`.
    """
    check_rewards(config, [*run_inputs.train, *run_inputs.eval])
    algorithm = config.algorithm
    if isinstance(algorithm, GRPOSection) and algorithm.loss_function is not None:
        name, limit = f"algorithm.loss_function = {algorithm.loss_function}", config.learner.timeout_s
        parameters = inspect_function(name, algorithm.loss_function, TimeLimit("learner.timeout_s", limit))
        check_parameters(name, parameters, LOSS_ARGUMENTS, algorithm.loss_kwargs, "algorithm.loss_kwargs")


def check_rewards(config: RunConfig, prompts: Seq[Prompt]) -> None:
    """
    Raises:
        ConfigError, DataError: a reward lacks a package, or cannot score a prompt.
    """
    for key, entry in config.rewards_by_key.items():
        check_entry(key, entry, prompts)


def check_description(config: RunConfig, template: Path) -> tuple[Architecture, TransferPlan]:
    """All that can be checked without the data.

    Args:
        template: of a model that may only be described, so perhaps without a tokenizer.

    Raises:
        ConfigError, DataError: one line.
    """
    load_reward_models(config, make_reward(config.rewards), template, or_described=True)
    architecture, transfer = resolve_architecture(config, template)
    if has_tokenizer(template):
        check_vocabulary(config, read_tokenizer(config, template), architecture)
    return architecture, transfer


def check_policy_weights(config: RunConfig, architecture: Architecture, *, or_described: bool = False) -> None:
    """Without torch, unless they are a checkpoint's.

    Args:
        or_described: a model that has no weights at all will do.

    Raises:
        CheckpointError: `model.hf` lacks a weight, or has one that does not fit.
    """
    source = config.model.hf
    if source is not None and not (or_described and only_described(source)):
        stored = _stored_tensors(source)
        check_shapes(str(source), {name: spec.shape for name, spec in stored.items()}, architecture)


def check_value_weights(config: RunConfig, architecture: Architecture, *, or_described: bool = False) -> None:
    """Without torch, unless they are a checkpoint's.

    Args:
        or_described: a model that has no weights at all will do.

    Raises:
        CheckpointError: `algorithm.value_hf` lacks a weight, or has one that does not fit.
    """
    if (source := value_source(config)) is not None and not (or_described and only_described(source)):
        check_value_source(source, architecture)


def _stored_tensors(source: Path) -> Mapping[str, TensorSpec]:
    if not is_checkpoint(source):
        return {name: place.spec for name, place in find_weights(source).items()}
    from megatron_async_rlhf.formats.open_weights import open_checked_weights  # brings torch

    return open_checked_weights(source).tensors


def load_run_inputs(config: RunConfig, template: Path) -> RunInputs:
    """Read the model template, load and check all data, check the layouts.

    Raises:
        ConfigError, DataError: one line.
    """
    tokenizer = read_tokenizer(config, template)
    architecture, transfer = resolve_architecture(config, template)
    check_vocabulary(config, tokenizer, architecture)
    room = architecture.context_length - config.generator.max_new_tokens
    limit = config.data.max_prompt_tokens or room
    if limit > room:
        raise ConfigError(
            f"data.max_prompt_tokens = {limit} and generator.max_new_tokens = {config.generator.max_new_tokens} "
            f"together exceed the context of {architecture.context_length} tokens"
        )
    reward = make_reward(config.rewards, config.run.path)
    load_reward_models(config, reward, template)
    splits, report = {}, DataReport()
    for split in ("train", "eval"):
        examples = load_examples(config.data_read, split, config.run.seed, report)
        splits[split] = build_prompts(examples, tokenizer, limit, drop_long=config.data.long_prompts == "drop")
        report.drop("longer than data.max_prompt_tokens", len(examples) - len(splits[split]))
        for prompt in splits[split]:
            reward.check(prompt)
    solved = {}
    if config.warm_start.steps:
        solved = solved_prompts(splits["train"], tokenizer, architecture.context_length)
    return RunInputs(
        architecture=architecture,
        tokenizer=tokenizer,
        reward=reward,
        solved=solved,
        data=report,
        transfer=transfer,
        **splits,
    )


def data_warnings(config: RunConfig, run_inputs: RunInputs) -> list[str]:
    """What is possible and yet hardly meant, a line each."""
    return [
        *_too_few_prompts(config, len(run_inputs.train)),
        *_too_short_completions(config, run_inputs),
        *length_warnings(config, run_inputs.reward, [*run_inputs.train, *run_inputs.eval]),
    ]


def _too_few_prompts(config: RunConfig, prompts: int) -> list[str]:
    needed = config.schedule.groups_per_rollout
    if prompts >= needed:
        return []
    return [
        f"data.train = {config.data.train}: its {prompts} prompts to train on are fewer than the {needed} of a rollout "
        "(schedule.mini_batches x prompts_per_step), so some are in it more than once"
    ]


def _too_short_completions(config: RunConfig, run_inputs: RunInputs) -> list[str]:
    limit = config.generator.max_new_tokens
    lengths = [len(row.token_ids) - row.prompt_length for row in run_inputs.solved.values()]
    longer = sum(length > limit for length in lengths)
    if 2 * longer <= len(lengths):
        return []
    return [
        f"generator.max_new_tokens = {limit}: {longer} of the {len(lengths)} solutions in data.train are longer, so most "
        f"completions cannot end; half of them have at most {sorted(lengths)[len(lengths) // 2]} tokens"
    ]


def read_tokenizer(config: RunConfig, template: Path) -> Tokenizer:
    try:
        return Tokenizer.load(template)
    except DataError as error:  # of a copy, which the user has never seen
        raise DataError(str(error).replace(str(template), f"model.hf = {config.model.hf}")) from None


def check_vocabulary(config: RunConfig, tokenizer: Tokenizer, architecture: Architecture) -> None:
    (largest, token), rows = tokenizer.last_token, architecture.vocab_size
    if largest >= rows:
        raise ConfigError(
            f"model.hf = {config.model.hf}: the tokenizer's token {token!r} has id {largest}, the model only {rows} "
            "embeddings (vocab_size); give the tokenizer that belongs to the model"
        )


def _copy_template(source: Path, directory: Path, or_classifier: bool, is_description: bool) -> None:
    """Config and tokenizer of a Hugging Face directory or of a checkpoint made from one."""
    refuse_adapter(source)
    described = hf_files_of(source)
    check_causal_model(described, or_classifier=or_classifier)
    architecture_of_hf(described)  # a clear error if it is no model we can train
    if is_checkpoint(source):
        check_format(source)
    elif not is_description:
        find_files(source)
    copy_hf_files(described, directory)


def _texts(examples: list[Example]) -> list[str]:
    return [text for example in examples for text in (example.text, example.solution) if text]
