"""The supervised warm start before the RL loop."""

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.learner.protocol import Learner, TrainSupervised
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
        assert answer.metrics is not None  # which is what the command was for
        recorder.warm_start_step(step, answer.metrics.values, answer.spans)
