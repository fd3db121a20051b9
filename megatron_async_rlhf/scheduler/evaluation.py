"""Held-out evaluation: one completion per prompt, the same seeds every time."""

import asyncio
from collections.abc import Callable, Sequence
from statistics import fmean

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.generator.seeds import request_seed
from megatron_async_rlhf.learner.protocol import Learner, Score
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.scheduler.scoring import ScoredGroup, logprob_gaps, mean_facts, score_group
from megatron_async_rlhf.scheduler.training_batch import as_sequence
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Completion, Prompt

# Completions whose log-probabilities are compared: thousands of tokens show any disagreement, and the learner may need as long
# for all of them as the generators.
_COMPARED = 32


class Evaluation:
    """What is asked of the generators, and what becomes of their answers."""

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        reward: Reward,
        recorder: Recorder,
        clock: Callable[[], float] = now,
    ) -> None:
        self._config, self._prompts, self._reward, self._recorder = config, prompts, reward, recorder
        self._clock = clock

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

    async def finish(
        self,
        when: str,
        completions: Sequence[list[Completion]],
        start: float,
        *,
        version: int,
        learner: Learner | None = None,
    ) -> None:
        """Score the answers to `requests`, which were sent at `start`, and record what came of them.

        Args:
            learner: scores some of the completions too, if they were sampled at the sampling temperature; what it and the
                samplers disagree on goes into the run's log-probability gap. It must be at `version` as they were.

        Raises:
            RewardError: the reward gave no usable scores.
        """
        algorithm, limit = self._config.algorithm, self._config.generator.max_new_tokens
        groups = zip(self._prompts, completions, strict=True)
        scored = await asyncio.gather(
            *(score_group(prompt, samples, self._reward, algorithm, limit) for prompt, samples in groups)
        )
        self._recorder.evaluation_samples(when, [group.without_penalties for group in scored])
        for group in scored:
            self._recorder.rewards_failed(group.failures)
        metrics = mean_facts(scored)
        if learner is not None and self.temperature == self._config.generator.temperature:
            gaps = await self._logprob_gaps(scored, learner, version)
            metrics |= {"logprob_gap": fmean(gaps)} if gaps else {}
        self._recorder.evaluated(when, metrics, start, self._clock(), version=version, samples=len(scored))

    async def _logprob_gaps(self, scored: Sequence[ScoredGroup], learner: Learner, version: int) -> list[float]:
        some = scored[:: -(-len(scored) // _COMPARED)]
        sequences = [as_sequence(one.group.prompt, one.group.completions[0]) for one in some]
        answer = await learner.execute(Score(sequences=sequences))
        gaps = logprob_gaps([one.group.completions[0] for one in some], answer.logprobs, version)
        self._recorder.logprob_gaps(gaps)
        return gaps
