"""Which metrics the steps of a run have, as its configuration says: what `checkpoint.keep_best` can be.

Not every step has all of them: one without sequences lacks the learner's, a stale one the log-probability gap.
"""

from collections.abc import Sequence

from megatron_async_rlhf.config.algorithms import (
    AlgorithmKeys,
    OnlineDPOSection,
    PolicyGradientKeys,
    PPOSection,
    RatioKeys,
)
from megatron_async_rlhf.config.rewards import FunctionRewardSection, RewardKeys

_OF_EVERY_STEP = (
    "reward", "reward_penalised", "reward_margin", "response_length", "finished", "pairs_skipped_share", "num_sequences",
    "staleness/mean", "staleness/max", "loss", "grad_norm", "learning_rate", "tokens", "padding", "tokens_per_s",
    "sampler/kl_k1", "sampler/kl_k3", "logprob_gap/mean_abs", "logprob_gap/max_abs", "time/train_s", "time/generate_s", "time/reference_s",
    "time/forward_backward_s", "time/gradient_reduction_s", "time/optimizer_s", "model_flops_utilisation",
)  # fmt: skip
_OF_REWARDS = {"builtin": ("exact",), "gsm8k": ("exact", "well_formed"), "function": ()}
_OF_DPO = ("num_pairs", "dpo/margin", "dpo/accuracy", "dpo/chosen_ratio", "dpo/rejected_ratio")
_OF_RATIOS = ("ratio/mean", "ratio/clipped_low", "ratio/clipped_high")
_OF_CORRECTION = ("sampler/ratio", "sampler/ratio_outside", "correction/weight", "correction/effective_sample_share")
_OF_VALUES = (
    "value_loss", "value/error", "value/clipped", "value/mean", "value/grad_norm", "value/learning_rate", "time/values_s",
)  # fmt: skip


def metric_names(algorithm: AlgorithmKeys, rewards: Sequence[RewardKeys]) -> list[str]:
    """Of the lines of metrics.jsonl."""
    names = [*_OF_EVERY_STEP]
    for reward in rewards:
        own = [*_OF_REWARDS[reward.type]]
        if isinstance(reward, FunctionRewardSection) and reward.on_error == "zero":
            own.append("reward_failed")
        if len(rewards) > 1:
            own = [f"reward/{reward.title}", *(f"{reward.title}/{name}" for name in own)]
        names += own
    if algorithm.has_reference:
        names.append("kl_to_reference")
    if algorithm.scores_policy_first(1) or algorithm.scores_policy_first(2):
        names.append("time/proximal_s")
    if isinstance(algorithm, OnlineDPOSection):
        names += _OF_DPO
    if isinstance(algorithm, PolicyGradientKeys):
        names.append("policy_loss")
        if algorithm.kl.in_loss:
            names += ["kl_loss", "kl/per_token"]
        if algorithm.correction.type != "none":
            names += _OF_CORRECTION
    if isinstance(algorithm, RatioKeys):
        names += _OF_RATIOS
    if isinstance(algorithm, PPOSection):
        names += _OF_VALUES
    return names
