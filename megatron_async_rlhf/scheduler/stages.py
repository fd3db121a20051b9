"""What happens around the RL loop: the supervised warm start before it, the held-out evaluation before and after."""

from statistics import fmean

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.learner.protocol import Learner, Score, TrainSupervised
from megatron_async_rlhf.scheduler.evaluation import Evaluation
from megatron_async_rlhf.scheduler.pool import GeneratorPool
from megatron_async_rlhf.scheduler.scoring import logprob_gaps, mean_facts
from megatron_async_rlhf.scheduler.training_batch import as_sequence
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Sequence


async def warm_start(
    config: RunConfig, learner: Learner, order: PromptOrder, solved: dict[int, Sequence], recorder: Recorder
) -> None:
    """`warm_start.steps` supervised optimizer steps.

    Args:
        solved: prompt and solution as one sequence, by prompt index.
    """
    for step in range(1, config.warm_start.steps + 1):
        prompts = order.batch(step - 1, config.warm_start.batch_size)
        command = TrainSupervised(step=step, sequences=[solved[prompt.index] for prompt in prompts])
        answer = await learner.execute(command)
        recorder.warm_start_step(step, answer.metrics.values, answer.spans)


async def evaluate(
    evaluation: Evaluation, config: RunConfig, pool: GeneratorPool, learner: Learner, recorder: Recorder, when: str
) -> dict[str, float]:
    """Held-out metrics of the version the generators hold.

    At the sampling temperature the learner scores the same completions; what it and the samplers disagree on goes
    into the run's log-probability gap. Both must be at the same version.
    """
    completions = await pool.sample_together(evaluation.requests())
    scored = evaluation.score(completions, when)
    metrics = mean_facts(scored)
    if evaluation.temperature != config.generator.temperature:
        return metrics
    sequences = [as_sequence(one.group.prompt, one.group.completions[0]) for one in scored]
    answer = await learner.execute(Score(sequences=sequences))
    gaps = logprob_gaps([group[0] for group in completions], answer.logprobs, pool.version)
    recorder.logprob_gaps(gaps)
    return metrics | ({"logprob_gap": fmean(gaps)} if gaps else {})
