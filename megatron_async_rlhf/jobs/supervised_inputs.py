"""What `async-rlhf sft` works with, checked or made before a process starts. No torch."""

from pathlib import Path
from typing import Literal

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.batches import plan_batches
from megatron_async_rlhf.data.report import DataReport
from megatron_async_rlhf.data.solutions import AnsweredRows, answered_rows
from megatron_async_rlhf.data.source import load_examples
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.jobs.inputs import (
    RunInputs,
    check_inputs,
    check_policy_weights,
    check_vocabulary,
    load_run_inputs,
    read_tokenizer,
)
from megatron_async_rlhf.models.architecture import Architecture, policy_architecture
from megatron_async_rlhf.models.layout_rules import check_learner_layout, check_micro_batch
from megatron_async_rlhf.types import Sequence


class SupervisedInputs(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        held_out: rows that are not trained on, for the loss on them.
        batches: of each optimizer step, which rows of `train`.
        data: what became of the records that rows are made of.
    """

    architecture: Architecture
    train: AnsweredRows
    held_out: list[Sequence]
    batches: list[list[int]]
    data: DataReport


def load_supervised_inputs(config: RunConfig, template: Path, run_inputs: RunInputs | None = None) -> SupervisedInputs:
    """Read the model template and all data; without a `sft` section, the rows of a run's warm start.

    Args:
        run_inputs: of that run, if they were loaded.

    Raises:
        ConfigError, DataError: one line.
    """
    held_out: list[Sequence] = []
    if config.sft is None:
        run_inputs = run_inputs or load_run_inputs(config, template)
        architecture, prompts = run_inputs.architecture, run_inputs.train
        solved = [run_inputs.solved[prompt.index] for prompt in prompts if prompt.index in run_inputs.solved]
        unanswered = sum(prompt.solution is None for prompt in prompts)
        train = AnsweredRows(rows=solved, unanswered=unanswered, too_long=len(prompts) - len(solved) - unanswered)
        report = run_inputs.data
    else:
        tokenizer = read_tokenizer(config, template)
        architecture = supervised_architecture(config, template)
        check_vocabulary(config, tokenizer, architecture)
        limit = config.sft.max_tokens or architecture.context_length
        report = DataReport()
        train = _rows(config, tokenizer, limit, "train", report)
        held_out = _rows(config, tokenizer, limit, "eval", report).rows
    lengths = [len(row.token_ids) for row in train.rows]
    batches = plan_batches(lengths, config.supervised, config.run.seed)
    return SupervisedInputs(architecture=architecture, train=train, held_out=held_out, batches=batches, data=report)


def check_supervised_inputs(config: RunConfig, template: Path, *, or_described: bool = False) -> SupervisedInputs:
    """All that the stage reads, from the tokenizer to the weights.

    Args:
        or_described: a model that has no weights at all will do.

    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    if config.sft is None:
        return load_supervised_inputs(config, template, check_inputs(config, template, or_described=or_described))
    inputs = load_supervised_inputs(config, template)
    check_policy_weights(config, inputs.architecture, or_described=or_described)
    return inputs


def supervised_architecture(config: RunConfig, template: Path) -> Architecture:
    """
    Raises:
        ConfigError: the learner cannot hold the model in `template`, or its context is too short; one line.
    """
    architecture, keys = policy_architecture(config.model, template), config.supervised
    check_learner_layout(config.learner, architecture)
    check_micro_batch(config.learner, 1, architecture)
    if keys.max_tokens is not None and keys.max_tokens > architecture.context_length:
        raise ConfigError(
            f"sft.max_tokens = {keys.max_tokens} is above the context of {architecture.context_length} tokens; lower it"
        )
    return architecture


def _rows(
    config: RunConfig, tokenizer: Tokenizer, limit: int, split: Literal["train", "eval"], report: DataReport
) -> AnsweredRows:
    assert config.sft is not None  # it says what a row is
    examples = load_examples(config.data, split, config.run.seed, report)
    drop_long = config.data.long_prompts == "drop"
    answered = answered_rows(
        examples,
        tokenizer,
        limit,
        answers=config.sft.answers,
        drop_long=drop_long,
        drop_unclear=config.data.bad_records == "drop",
    )
    report.drop("no answer of the assistant", answered.unanswered)
    report.drop("longer than sft.max_tokens", answered.too_long)
    report.drop("no row in the chat template", answered.unclear)
    return answered
