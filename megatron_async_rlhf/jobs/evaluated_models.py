"""What an evaluation works with: its models, each with its own tokenizer and prompts, and the reward. No torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from megatron_async_rlhf.config.evaluation import EvaluationSection
from megatron_async_rlhf.config.judge import JudgeRewardSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import ModelSection
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.prompts import build_prompts
from megatron_async_rlhf.data.source import load_examples
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import ConfigError, DataError
from megatron_async_rlhf.jobs.reward_models import load_reward_models
from megatron_async_rlhf.models.architecture import Architecture, policy_architecture
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.types import Prompt

POLICY, AGAINST, KL_TO = "policy", "against", "kl_to"
KEYS = {POLICY: "model.hf", AGAINST: "eval.against", KL_TO: "eval.kl_to"}  # of the configuration


class EvaluatedModel(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        context_length: most tokens of a sequence that it is served with.
        prompts: by index, as this model's tokenizer and chat template make them.
    """

    architecture: Architecture
    tokenizer: Tokenizer
    context_length: int
    prompts: dict[int, Prompt]


class EvaluationInputs(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        models: by `POLICY`, `AGAINST` and `KL_TO`, as far as there are any.
        prompts: as the policy sees them; those that every model has room for.
        train: the prompts to train on, if a reward model's scores are centred on their solutions.
    """

    models: dict[str, EvaluatedModel]
    prompts: list[Prompt]
    reward: Reward
    train: list[Prompt] = []


def section_of(config: RunConfig) -> EvaluationSection:
    """What `eval` says, or would say if it were there."""
    return config.eval or EvaluationSection()


def most_new_tokens(config: RunConfig) -> int:
    return section_of(config).max_new_tokens or config.generator.max_new_tokens


def sources_of(config: RunConfig) -> dict[str, Path]:
    """Where each model is.

    Raises:
        ConfigError: there is no policy.
    """
    section = section_of(config)
    if config.model.hf is None:
        raise ConfigError(
            "model.hf: missing; an evaluation is of a policy that is there: set model={hf: PATH}, a Hugging Face directory, "
            "a run or a checkpoint"
        )
    sources = {POLICY: config.model.hf}
    if isinstance(section.against, Path):
        sources[AGAINST] = section.against
    if section.kl_to is not None:
        sources[KL_TO] = section.kl_to
    return sources


def config_for(config: RunConfig, name: str) -> RunConfig:
    """The configuration with that model as its policy."""
    if name == POLICY:
        return config
    model = ModelSection(hf=sources_of(config)[name], chat_template=config.model.chat_template)
    return config.model_copy(update={"model": model})


def load_evaluation(config: RunConfig, directories: Mapping[str, Path]) -> EvaluationInputs:
    """Read tokenizers and prompts, and check that all fit together.

    Args:
        directories: with the config and tokenizer of each model.

    Raises:
        ConfigError, DataError: one line.
    """
    check_compared_rewards(config)
    examples = load_examples(config.data_read, "eval", config.run.seed)
    models: dict[str, EvaluatedModel] = {}
    for name, directory in directories.items():
        models[name] = _load_model(config, name, directory, examples, models.get(POLICY))
    shared = set.intersection(*(set(model.prompts) for model in models.values()))
    prompts = [prompt for index, prompt in models[POLICY].prompts.items() if index in shared]
    if not prompts:
        raise DataError("no prompt is short enough for all models; lower eval.max_new_tokens")
    if KL_TO in models:
        _check_same_tokens(config, models)
    if section_of(config).against == "references":
        for prompt in prompts:
            if prompt.solution is None:
                raise DataError(
                    f"{prompt.name}: has no solution, which eval.against = references compares with; set "
                    "data.solution_field, or eval.against = null"
                )
    reward = make_reward(config.rewards, config.run.path)
    load_reward_models(config, reward, directories[POLICY])
    for prompt in prompts:
        reward.check(prompt)
    train = []
    if any(section.center_on_solutions for section in config.reward_models.values()):
        # Of the prompts that a run of this configuration trains on, so that both subtract the same.
        limit = config.data.max_prompt_tokens or models[POLICY].context_length - config.generator.max_new_tokens
        tokenizer = models[POLICY].tokenizer
        train = build_prompts(
            load_examples(config.data_read, "train", config.run.seed), tokenizer, limit, drop_long=True
        )
    return EvaluationInputs(models=models, prompts=prompts, reward=reward, train=train)


def check_compared_rewards(config: RunConfig) -> None:
    """
    Raises:
        ConfigError: a reward compares the answers of one policy with each other, which says nothing of the policy.
    """
    for key, entry in config.rewards_by_key.items():
        if isinstance(entry, JudgeRewardSection) and entry.form == "pairwise" and entry.against == "group":
            raise ConfigError(
                f"{key}.against = group: the judge compares the answers of one policy with each other, so their mean is 0.5 "
                f"whatever they are; set {key}.against = solution, or {key}.form = pointwise"
            )


def _load_model(
    config: RunConfig, name: str, directory: Path, examples: list[Example], policy: EvaluatedModel | None
) -> EvaluatedModel:
    tokenizer = Tokenizer.load(directory)
    architecture = policy_architecture(config_for(config, name).model, directory)
    (largest, token), rows = tokenizer.last_token, architecture.vocab_size
    key, source = KEYS[name], sources_of(config)[name]
    if largest >= rows:
        raise ConfigError(
            f"{key} = {source}: the tokenizer's token {token!r} has id {largest}, the model only {rows} embeddings "
            "(vocab_size); give the tokenizer that belongs to the model"
        )
    context = served_context(config, name, architecture, None if policy is None else policy.context_length)
    room = _room_for_prompts(config, context)
    limit, drop = min(config.data.max_prompt_tokens or room, room), config.data.long_prompts == "drop"
    prompts: Iterable[Prompt]
    if name == KL_TO and policy is not None:  # it scores what the policy has written, after the prompt that that had
        prompts = _short_ones(policy.prompts.values(), limit, f"{key} = {source}", drop=drop)
    else:
        prompts = build_prompts(examples, tokenizer, limit, drop_long=drop)
    return EvaluatedModel(
        architecture=architecture,
        tokenizer=tokenizer,
        context_length=context,
        prompts={prompt.index: prompt for prompt in prompts},
    )


def served_context(config: RunConfig, name: str, architecture: Architecture, of_policy: int | None) -> int:
    """Most tokens of a sequence that a model is served with.

    Args:
        of_policy: the same of the policy, if the model is another one.

    Raises:
        ConfigError: a prompt and an answer have no room in it.
    """
    # No longer than the policy's, whose prompts it gets: a cache for more would only take memory.
    context = min(architecture.context_length, of_policy or architecture.context_length)
    if _room_for_prompts(config, context) < 1:
        raise ConfigError(
            f"{KEYS[name]} = {sources_of(config)[name]}: its context of {context} tokens has no room for a prompt and "
            f"{most_new_tokens(config)} new tokens; lower eval.max_new_tokens"
        )
    return context


def _room_for_prompts(config: RunConfig, context: int) -> int:
    # vLLM scores a sequence only if one more token would fit.
    return context - most_new_tokens(config) - (section_of(config).kl_to is not None)


def _short_ones(prompts: Iterable[Prompt], limit: int, where: str, *, drop: bool) -> list[Prompt]:
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit or not drop]
    for prompt in kept:
        if len(prompt.token_ids) > limit:
            raise DataError(
                f"{where}: {prompt.name} has {len(prompt.token_ids)} tokens, and its context leaves room for {limit}; set "
                "data.long_prompts = drop, or lower eval.max_new_tokens"
            )
    return kept


def _check_same_tokens(config: RunConfig, models: Mapping[str, EvaluatedModel]) -> None:
    """Log-probabilities of two models can be compared only for the same tokens."""
    policy, reference = models[POLICY], models[KL_TO]
    if policy.tokenizer.vocabulary != reference.tokenizer.vocabulary:
        raise ConfigError(
            f"eval.kl_to = {section_of(config).kl_to}: its vocabulary is not that of model.hf = {config.model.hf}, and a "
            "divergence needs log-probabilities of the same tokens; set a model with the same tokenizer, such as the one "
            "that the policy was trained from"
        )
