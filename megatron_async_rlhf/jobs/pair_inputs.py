"""What `async-rlhf reward-model` works with, checked or made before a process starts. No torch."""

from pathlib import Path
from typing import Literal

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.batches import plan_pair_batches
from megatron_async_rlhf.data.pairs import load_pairs
from megatron_async_rlhf.data.report import DataReport
from megatron_async_rlhf.data.tokenized_pairs import PairRows, tokenize_pairs
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.formats.classifier import describe_classifier
from megatron_async_rlhf.formats.directory import hf_files_of
from megatron_async_rlhf.jobs.inputs import check_policy_weights, check_vocabulary, make_model_template, read_tokenizer
from megatron_async_rlhf.models.architecture import Architecture, architecture_of_hf, policy_architecture
from megatron_async_rlhf.models.layout_rules import check_learner_layout, check_micro_batch
from megatron_async_rlhf.types import TokenizedPair


class PairInputs(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        held_out: pairs that are not trained on.
        batches: of each optimizer step, which pairs of `train`.
        data: what became of the records that the pairs are made of.
    """

    architecture: Architecture
    train: PairRows
    held_out: list[TokenizedPair]
    batches: list[list[int]]
    data: DataReport


def make_reward_model_template(config: RunConfig, directory: Path, *, or_described: bool = False) -> None:
    """As `make_model_template`, of a reward model.

    Raises:
        ConfigError, DataError: one line.
    """
    make_model_template(config, directory, or_classifier=True, or_described=or_described)
    describe_classifier(directory)


def load_pair_inputs(config: RunConfig, template: Path) -> PairInputs:
    """Read the model template and all data.

    Raises:
        ConfigError, DataError: one line.
    """
    keys, tokenizer = config.reward_modelling, read_tokenizer(config, template)
    architecture = pair_architecture(config, template)
    check_vocabulary(config, tokenizer, architecture)
    limit = keys.max_tokens or architecture.context_length
    report = DataReport()
    train = _rows(config, tokenizer, limit, "train", report)
    held_out = _rows(config, tokenizer, limit, "eval", report).rows
    batches = plan_pair_batches(len(train.rows), keys, config.run.seed)
    return PairInputs(architecture=architecture, train=train, held_out=held_out, batches=batches, data=report)


def check_pair_inputs(config: RunConfig, template: Path, *, or_described: bool = False) -> PairInputs:
    """All that the stage reads, from the tokenizer to the weights.

    Args:
        or_described: a model that has no weights at all will do.

    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    inputs = load_pair_inputs(config, template)
    if config.model.hf is not None:  # a language model, or a reward model, as it says itself
        architecture = architecture_of_hf(hf_files_of(config.model.hf))
        check_policy_weights(config, architecture, or_described=or_described)
    return inputs


def pair_architecture(config: RunConfig, template: Path) -> Architecture:
    """
    Raises:
        ConfigError: the learner cannot hold the model in `template`, or its context is too short; one line.
    """
    architecture, limit = policy_architecture(config.model, template), config.reward_modelling.max_tokens
    check_learner_layout(config.learner, architecture)
    check_micro_batch(config.learner, 2, architecture)
    if limit is not None and limit > architecture.context_length:
        raise ConfigError(
            f"reward_model.max_tokens = {limit} is above the context of {architecture.context_length} tokens; lower it"
        )
    return architecture


def _rows(
    config: RunConfig, tokenizer: Tokenizer, limit: int, split: Literal["train", "eval"], report: DataReport
) -> PairRows:
    pairs = load_pairs(config.data, split, config.run.seed, report)
    drop_long = config.data.long_prompts == "drop"
    made = tokenize_pairs(pairs, tokenizer, limit, margin=config.reward_modelling.margin, drop_long=drop_long)
    report.drop("longer than reward_model.max_tokens", made.too_long)
    return made
