"""What an evaluation reads that is not in its directory, remembered there, so that a resumed one continues with the same."""

import msgspec
from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.jobs.evaluated_models import KEYS, EvaluationInputs, sources_of
from megatron_async_rlhf.launch.input_digests import (
    PromptSet,
    digest_code,
    digest_prompts,
    digest_reward_models,
    digest_weights,
)
from megatron_async_rlhf.telemetry.files import INPUTS


class EvaluationDigests(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        weights: of each model.
        reward: of the source code that scores.
        reward_models: of the weights of reward models; None without any.
    """

    prompts: PromptSet
    weights: dict[str, str]
    reward: str
    reward_models: str | None = None


def digest_evaluation(config: RunConfig, inputs: EvaluationInputs) -> EvaluationDigests:
    """
    Raises:
        ConfigError: the weights of a model cannot be read.
    """
    return EvaluationDigests(
        prompts=digest_prompts(inputs.prompts),
        weights={name: digest_weights(source, KEYS[name]) for name, source in sources_of(config).items()},
        reward=digest_code(inputs.reward),
        reward_models=digest_reward_models(config),
    )


def check_same_evaluation(config: RunConfig, now: EvaluationDigests) -> None:
    """
    Raises:
        ConfigError: prompts, weights or the code of the reward are not those of the answers that are there.
    """
    path = config.run.path / INPUTS
    way_out = "; put back what was there, or evaluate anew without --resume"
    try:
        before = msgspec.json.decode(path.read_bytes(), type=EvaluationDigests)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); evaluate anew without --resume") from None
    if before.prompts != now.prompts:
        raise ConfigError(f"data: its prompts are not those of the answers in {config.run.path}{way_out}")
    for name, digest in now.weights.items():
        if before.weights.get(name) != digest:
            raise ConfigError(
                f"{KEYS[name]} = {sources_of(config)[name]}: its weights are not those of the answers in "
                f"{config.run.path}{way_out}"
            )
    if before.reward_models != now.reward_models:
        where = ", ".join(f"{key}.model = {section.model}" for key, section in config.reward_models.items())
        raise ConfigError(f"{where}: the weights are not those of the scores in {config.run.path}{way_out}")
    if before.reward != now.reward:
        raise ConfigError(f"reward: its code is not that of the scores in {config.run.path}{way_out}")
