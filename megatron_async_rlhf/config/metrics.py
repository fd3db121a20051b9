"""The metrics of an optimizer step: those that every run has, and those that its algorithm and rewards add.

`metrics.jsonl`, docs/run_directory.md and `checkpoint.keep_best` know these and no others. Not every step has all of them:
one without sequences lacks the learner's, a stale one the log-probability gap.
"""

from collections.abc import Sequence

from megatron_async_rlhf.config.algorithm_keys import AlgorithmKeys
from megatron_async_rlhf.config.algorithms import SECTIONS
from megatron_async_rlhf.config.rewards import REWARDS, RewardKeys
from megatron_async_rlhf.config.written_key import Key, ReportingSection

_OF_EVERY_RUN = (
    Key("step", "-", "the N-th optimizer step has N, from 1; the checkpoint and the policy version of step N are those after it"),
    Key("time", "s", "Unix time at which the step was recorded"),
    Key("time/elapsed_s", "s", "of the RL loop until then, as `wall_seconds` counts it: without the time between two starts of a resumed run"),
    Key("reward", "reward", "mean of what `reward` gave to all completions of the step's prompts"),
    Key("reward_penalised", "reward", "the same with the penalties of `algorithm.missing_eos_reward` and `algorithm.overlong_buffer`: what is trained on"),
    Key("reward_margin", "reward", "best minus worst completion of a prompt, penalised; mean over the prompts that are trained on"),
    Key("response_length", "tokens", "mean length of a completion"),
    Key("finished", "share", "of completions that ended by themselves, before `generator.max_new_tokens`"),
    Key("entropy", "nats", "of the distributions that tokens were sampled from, at the sampling temperature: minus the mean log-probability of the tokens, which estimates it"),
    Key("pairs_skipped_share", "share", "of prompts that taught nothing, because all their completions earned the same (online DPO)"),
    Key("staleness/mean", "steps", "version that was trained minus version that sampled, mean over the tokens of all completions"),
    Key("staleness/max", "steps", "the largest"),
    Key("logprob_gap/mean_abs", "nats", "difference of learner and sampler log-probability, mean over tokens sampled by the very version that is trained; absent without such tokens"),
    Key("logprob_gap/max_abs", "nats", "the largest"),
    Key("time/generate_s", "s", "from submission to last completion of the slowest prompt"),
    Key("time/train_s", "s", "from the command to the learner to its answer, over the steps of the rollout"),
    Key("num_sequences", "sequences", "that the step trained on, on all ranks", "learner"),
    Key("loss", "-", "the whole loss, of the value model too", "learner"),
    Key("sampler/kl_k1", "nats", "estimate k1 of KL(sampler \\|\\| policy) per token", "learner"),
    Key("sampler/kl_k3", "nats", "estimate k3 of the same, never negative", "learner"),
    Key("grad_norm", "-", "of the policy, before clipping", "learner"),
    Key("learning_rate", "-", "the policy's, of this step", "learner"),
    Key("tokens", "tokens", "positions of the step with a token, prompts included, on all ranks; a shared prompt counts once", "learner"),
    Key("padding", "share", "of computed positions without a token", "learner"),
    Key("tokens_per_s", "tokens/s", "over the time the learner works, waiting for a push left out", "learner"),
    Key("model_flops_utilisation", "share", "of what all ranks' devices could do; only if their peak is known", "learner"),
    Key("time/reference_s", "s", "forward pass of the reference", "learner"),
    Key("time/forward_backward_s", "s", "of all micro-batches, communication included", "learner"),
    Key("time/gradient_reduction_s", "s", "the part of it after the last micro-batch: summing gradients over ranks", "learner"),
    Key("time/optimizer_s", "s", "gradient norm, clipping, Adam", "learner"),
)  # fmt: skip


def possible_metrics() -> list[Key]:
    """All that any run has, by source, each once."""
    declared = [*_OF_EVERY_RUN]
    sections: list[type[ReportingSection]] = [*REWARDS.values(), *SECTIONS.values()]
    for section in sections:
        declared += section.possible_metrics()
    by_name = {metric.name: metric for metric in reversed(declared)}
    order = list(dict.fromkeys(metric.name for metric in declared))
    return [
        by_name[name]
        for source in ("controller", "reward", "learner")
        for name in order
        if by_name[name].source == source
    ]


def metric_names(algorithm: AlgorithmKeys, rewards: Sequence[RewardKeys]) -> list[str]:
    """Those of a run."""
    names = [metric.name for metric in _OF_EVERY_RUN] + algorithm.metrics
    for reward in rewards:
        if len(rewards) == 1:
            names += reward.metrics
        else:
            names += [f"reward/{reward.title}", *(f"{reward.title}/{name}" for name in reward.metrics)]
    return names
