"""Reward models on the way into a run: checked before it, connected to their servers, centred once."""

import asyncio
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.classifier_weights import classifier_numbers
from megatron_async_rlhf.jobs.described import has_tokenizer, only_described
from megatron_async_rlhf.models.classifier import read_classifier
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.rewards.reward_model import ModelReward, reward_models_in
from megatron_async_rlhf.rewards.reward_server import RewardServer
from megatron_async_rlhf.rewards.reward_servers import RewardServers
from megatron_async_rlhf.telemetry.busy import ServersBusy
from megatron_async_rlhf.telemetry.files import REWARD_CENTERS, replace_file, writing
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Prompt


def reward_models(config: RunConfig, reward: Reward) -> dict[str, ModelReward]:
    """Those that `reward` asks, by the keys of their sections."""
    return dict(zip(config.reward_models, reward_models_in(reward), strict=True))


def load_reward_models(config: RunConfig, reward: Reward, template: Path, *, or_described: bool = False) -> None:
    """Read descriptions and tokenizers.

    Args:
        template: of the policy; has the date for chat templates.
        or_described: a model without weights may be without a tokenizer too.

    Raises:
        ConfigError, DataError: see `ModelReward.load`.
    """
    for key, model in reward_models(config, reward).items():
        source = model.section.model
        is_served = model.section.url is None
        without = or_described and is_served and only_described(source) and not has_tokenizer(source)
        model.load(key, None if without else template)


def check_reward_models(
    config: RunConfig, reward: Reward, train: Sequence[Prompt], *, or_described: bool = False
) -> None:
    """What costs more than a look at descriptions: weights, and solutions to centre on.

    Args:
        or_described: a model that has no weights at all will do.

    Raises:
        ConfigError, CheckpointError: one line.
    """
    for key, model in reward_models(config, reward).items():
        if model.section.center_on_solutions:
            model.drawn_solutions(train, config.run.seed)
    for key, section in config.served_reward_models.items():
        if or_described and only_described(section.model):
            continue
        classifier_numbers(f"{key}.model", section.model, read_classifier(f"{key}.model", section.model))


def length_warnings(config: RunConfig, reward: Reward, prompts: Sequence[Prompt]) -> list[str]:
    """Completions that a reward model may find too long, a line for each model."""
    lines, longest = [], config.generator.max_new_tokens
    for key, model in reward_models(config, reward).items():
        most = max(map(model.length, prompts), default=0)
        if most + longest > model.context_length:
            failing = "ends the run" if model.section.on_error == "fail" else "earns 0"
            lines.append(
                f"{key}.model reads {model.context_length} tokens; the longest prompt has {most} in its template, and "
                f"generator.max_new_tokens = {longest} more may come: a completion that does not fit {failing} "
                f"({key}.on_error)"
            )
    return lines


class ServedRewards:
    """The servers of all reward models of a run."""

    def __init__(self, config: RunConfig, reward: Reward, urls: Sequence[str], recorder: Recorder) -> None:
        """
        Args:
            urls: of the servers that the run has started, in the order of the configuration.
        """
        self._config = config
        self._models = reward_models(config, reward)
        busy = ServersBusy(
            now,
            what="score",
            on_any=recorder.reward_models_were_busy,
            on_one=recorder.server_was_busy,
        )
        started = enumerate(urls)
        for key, model in self._models.items():
            section = model.section
            # As `plan_reward_servers` calls the processes; those of others have other names, whoever owns them.
            named = [(f"{key}.url.{number}", url) for number, url in enumerate(section.url or [])]
            if section.url is None:
                named = [(f"reward.{number}", url) for number, url in itertools.islice(started, section.replicas)]
            model.servers = RewardServers(
                [
                    RewardServer(
                        name,
                        url,
                        request_timeout_s=section.request_timeout_s,
                        section=key,
                        ours=section.url is None,
                    )
                    for name, url in named
                ],
                section,
                key=key,
                busy=busy,
                on_silent=recorder.unresponsive if section.url is None else lambda name, error: None,
                on_note=recorder.note,
            )

    async def start(self, run_dir: Path, train: Sequence[Prompt], *, servers_stayed: bool = False) -> None:
        """Wait for all of them, then find out what is subtracted from scores, unless the run has done so before.

        Args:
            servers_stayed: they have been up before: one that does not answer now is lost, and waited for only if all are.

        Raises:
            RewardError: one is not ready in time, or a solution has no score.
            CheckpointError: what was found out before cannot be read.
        """
        started = [model.servers for model in self._models.values() if model.servers is not None]
        await asyncio.gather(*(servers.rejoin() if servers_stayed else servers.start() for servers in started))
        path = run_dir / REWARD_CENTERS
        centers = _read_centers(path)
        for key, model in self._models.items():
            if not model.section.center_on_solutions:
                continue
            if key not in centers:
                centers[key] = await model.mean_of_solutions(train, self._config.run.seed)
                with writing(path):
                    replace_file(path, json.dumps(centers, indent=1) + "\n")
            model.center = centers[key]

    async def close(self) -> None:
        for model in self._models.values():
            if model.servers is not None:
                await model.servers.close()


def _read_centers(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        return {key: float(center) for key, center in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): what was subtracted from scores so far is not known; start another run without "
            "--resume"
        ) from None
