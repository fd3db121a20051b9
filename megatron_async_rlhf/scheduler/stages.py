"""What happens around the RL loop: the supervised warm start before it, the held-out evaluation before and after."""

from collections.abc import Sequence as Seq
from statistics import fmean

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.learner.protocol import Learner, Score, TrainSupervised
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.scheduler.pool import GeneratorPool, request_seed
from megatron_async_rlhf.scheduler.scoring import as_sequence, logprob_gaps, score_batch
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Prompt, Sequence


async def warm_start(
    config: RunConfig, learner: Learner, order: PromptOrder, solved: dict[int, Sequence], recorder: Recorder
) -> None:
    """`warm_start.steps` supervised optimizer steps.

    Args:
        solved: prompt and solution as one sequence, by prompt index.
    """
    for step in range(config.warm_start.steps):
        prompts = order.batch(step, config.warm_start.batch_size)
        command = TrainSupervised(step=step, sequences=[solved[prompt.index] for prompt in prompts])
        answer = await learner.execute(command)
        recorder.warm_start_step(step, answer.metrics.values, answer.spans)


async def evaluate(
    config: RunConfig,
    pool: GeneratorPool,
    learner: Learner,
    prompts: Seq[Prompt],
    reward: Reward,
    recorder: Recorder,
    when: str,
) -> dict[str, float]:
    """Held-out metrics of the version the generators hold: one completion per prompt, the same seeds every time.

    At the sampling temperature the learner scores the same completions; what it and the samplers disagree on goes
    into the run's log-probability gap. Both must be at the same version.
    """
    training = config.generator.temperature
    temperature = training if config.generator.eval_temperature is None else config.generator.eval_temperature
    requests = [
        SamplingRequest(
            prompt=prompt,
            samples=1,
            seed=request_seed(config.run.seed, "eval", position),
            temperature=temperature,
            max_new_tokens=config.generator.max_new_tokens,
            order=position,
        )
        for position, prompt in enumerate(prompts)
    ]
    completions = await pool.sample(requests)
    scored = score_batch(prompts, completions, reward, config.algorithm.missing_eos_reward)
    recorder.evaluation_samples(when, scored.groups)
    if temperature != training:
        return scored.metrics
    flat = [group[0] for group in completions]
    answer = await learner.execute(Score(sequences=[as_sequence(p, c) for p, c in zip(prompts, flat, strict=True)]))
    gaps = logprob_gaps(flat, answer.logprobs, pool.version)
    recorder.logprob_gaps(gaps)
    return scored.metrics | ({"logprob_gap": fmean(gaps)} if gaps else {})
