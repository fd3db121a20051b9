"""Held-out evaluation: one completion per prompt, the same seeds every time."""

from collections.abc import Sequence

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.generator.seeds import request_seed
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.scheduler.scoring import ScoredGroup, score_group
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Completion, Prompt


class Evaluation:
    """What is asked of the generators, and what becomes of their answers."""

    def __init__(self, config: RunConfig, prompts: Sequence[Prompt], reward: Reward, recorder: Recorder) -> None:
        self._config, self._prompts, self._reward, self._recorder = config, prompts, reward, recorder

    @property
    def temperature(self) -> float:
        own = self._config.generator.eval_temperature
        return self._config.generator.temperature if own is None else own

    def requests(self) -> list[SamplingRequest]:
        """One per prompt."""
        return [
            SamplingRequest(
                prompt=prompt,
                samples=1,
                seed=request_seed(self._config.run.seed, "eval", position),
                temperature=self.temperature,
                max_new_tokens=self._config.generator.max_new_tokens,
                order=position,
                held_out=True,
            )
            for position, prompt in enumerate(self._prompts)
        ]

    def score(self, completions: Sequence[list[Completion]], when: str) -> list[ScoredGroup]:
        """Score the answers to `requests`, and keep them for a later look."""
        algorithm, limit = self._config.algorithm, self._config.generator.max_new_tokens
        scored = [
            score_group(prompt, samples, self._reward, algorithm, limit)
            for prompt, samples in zip(self._prompts, completions, strict=True)
        ]
        self._recorder.evaluation_samples(when, [group.group for group in scored])
        return scored
