"""Keys that algorithms have in common, and what an algorithm has to say of itself.

An algorithm is a section of the configuration (`config.algorithms`). Its class says which samples of a prompt it trains
on, which passes over a rollout come before its first update, which sequences its loss needs together, which metrics it
reports, and where the learner finds its objective.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_async_rlhf.config.section import Section
from megatron_async_rlhf.config.written_key import Key, ReportingSection


class AlgorithmKeys(ReportingSection):
    """What all algorithms have: how many samples, and what is done to rewards before anything is learned from them.

    Attributes:
        objective: `module:class` of the `Objective` below `learner.megatron.objectives`.
    """

    objective: ClassVar[str]
    own_metrics: ClassVar[tuple[Key, ...]] = (
        Key(
            "kl_to_reference", "nats",
            "`log pi - log pi_ref` summed over a completion's tokens, mean over the completions trained on; of algorithms "
            "with a reference",
            "learner", lambda keys: keys.has_reference,
        ),
        Key(
            "time/proximal_s", "s", "forward pass of the policy before the rollout's updates; only if there is one",
            "learner", lambda keys: keys.scores_policy_first(1) or keys.scores_policy_first(2),
        ),
    )  # fmt: skip

    samples_per_prompt: PositiveInt = 2  # K
    missing_eos_reward: float | None = -1.0  # replaces the reward of a cut-off completion; null keeps its reward
    reward_scale: Literal["none", "batch", "running"] = "none"  # divide by the spread of this step's, or all, rewards
    overlong_buffer: PositiveInt | None = None  # DAPO: within so many tokens of the limit, reward falls by up to 1

    @abstractmethod
    def chosen_samples(self, rewards: Sequence[float]) -> list[int]:
        """Which of a prompt's samples are trained on; none if they teach nothing."""

    @property
    def trained_samples(self) -> int:
        """Samples of a prompt that are trained on, at most."""
        return self.samples_per_prompt

    @property
    def sequences_together(self) -> int:
        """Sequences that the loss needs in one micro-batch."""
        return 1

    @property
    def has_reference(self) -> bool:
        """Whether anything is learned from the reference policy."""
        return False

    @property
    def has_value_model(self) -> bool:
        return False

    @property
    def is_corrected(self) -> bool:
        """Whether the loss knows that another policy sampled, and so needs its log-probabilities."""
        return False

    def scores_policy_first(self, updates: int) -> bool:
        """Whether a rollout begins with a pass for the proximal policy's log-probabilities: the policy's, before the
        first of the `updates` that the rollout is for. With one update the training pass itself computes them."""
        return False


class KLKeys(Section):
    """KL(policy || reference): a penalty in the reward, or a term of the loss."""

    coefficient: float = Field(0.05, ge=0)  # the paper: 0.05; 0 needs no reference policy
    place: Literal["reward", "loss"] = "reward"  # the paper: reward
    estimator: Literal["k1", "k2", "k3"] = "k1"  # of x = log(policy / reference): x | x^2 / 2 | exp(-x) - 1 + x
    # Of a loss term: `policy` is the KL's own gradient, `estimator` differentiates the estimator (GRPO's k3 term).
    gradient: Literal["policy", "estimator"] = "policy"

    @model_validator(mode="after")
    def check_gradient(self) -> "KLKeys":
        if self.gradient == "estimator" and self.place == "reward":
            raise ValueError(
                "algorithm.kl.gradient = estimator is of a term of the loss: set algorithm.kl.place = loss, or "
                "algorithm.kl.gradient = policy"
            )
        if self.gradient == "estimator" and self.estimator == "k1":
            raise ValueError(
                "algorithm.kl.estimator = k1: its own gradient is zero in expectation: set algorithm.kl.gradient "
                "= policy, or algorithm.kl.estimator = k2 or k3"
            )
        return self

    @property
    def in_reward(self) -> bool:
        return self.coefficient > 0 and self.place == "reward"

    @property
    def in_loss(self) -> bool:
        return self.coefficient > 0 and self.place == "loss"


class GRPOKLKeys(KLKeys):
    """As GRPO has it: a term of the loss."""

    coefficient: float = Field(0.04, ge=0)  # 0 needs no reference policy
    place: Literal["loss"] = "loss"  # GRPO has no other
    estimator: Literal["k1", "k2", "k3"] = "k3"
    gradient: Literal["policy", "estimator"] = "estimator"


class CorrectionKeys(Section):
    """Weights for samples of another policy than the one before the update: `rho = pi_proximal / pi_sampler`.

    none: the paper | truncate: min(rho, high) of each token | mask: IcePop, tokens with rho outside [low, high] do not
    count | mask_sequences: the same of whole completions | decoupled: rho itself, decoupled PPO.

    Where the loss is of whole completions (rloo, proximal_rloo) so is rho: the product over the tokens.
    """

    # docs/algorithms.md has the weights
    type: Literal["none", "truncate", "mask", "mask_sequences", "decoupled"] = "none"
    low: float | None = Field(None, ge=0)  # default 0.5 for mask, else 0
    high: PositiveFloat | None = None  # default 2 for truncate and mask_sequences, 5 for mask; decoupled has none

    @model_validator(mode="after")
    def check_bounds(self) -> "CorrectionKeys":
        if self.type in ("none", "decoupled") and (self.low, self.high) != (None, None):
            raise ValueError(f"algorithm.correction.type = {self.type} has no low and high; remove them")
        low, high = self.bounds
        if low > high:
            raise ValueError(f"algorithm.correction.low = {low:g} is above algorithm.correction.high = {high:g}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Of rho, given or by default."""
        low = 0.5 if self.type == "mask" else 0.0
        unbounded = float("inf")
        defaults = {"truncate": 2.0, "mask": 5.0, "mask_sequences": 2.0, "none": unbounded, "decoupled": unbounded}
        high = defaults[self.type]
        return (low if self.low is None else self.low), (high if self.high is None else self.high)

    @property
    def level(self) -> Literal["token", "sequence"]:
        """What rho is of."""
        return "sequence" if self.type == "mask_sequences" else "token"

    @property
    def kind(self) -> Literal["truncate", "mask"]:
        """In the terms of `algorithms.corrections`, of a type that corrects."""
        return "mask" if self.type.startswith("mask") else "truncate"


class PolicyGradientKeys(AlgorithmKeys):
    """Losses that weigh log-probabilities with advantages."""

    own_metrics: ClassVar[tuple[Key, ...]] = (
        Key("policy_loss", "-", "the policy's part, without a KL term", "learner"),
        Key("kl_loss", "-", "the KL term before its coefficient, with `algorithm.kl.place: loss`", "learner", lambda keys: keys.kl.in_loss),
        Key("kl/per_token", "nats", "the KL term's own estimate, mean over tokens", "learner", lambda keys: keys.kl.in_loss),
        Key("sampler/ratio", "-", "proximal policy over sampler, mean over what is corrected: tokens or completions", "learner", lambda keys: keys.correction.type != "none"),
        Key("sampler/ratio_outside", "share", "of these with a ratio outside the bounds of `algorithm.correction`", "learner", lambda keys: keys.correction.type != "none"),
        Key("correction/weight", "-", "mean weight of the off-policy correction", "learner", lambda keys: keys.correction.type != "none"),
        Key("correction/effective_sample_share", "share", "Kish's effective sample size of these weights", "learner", lambda keys: keys.correction.type != "none"),
    )  # fmt: skip

    kl: KLKeys = Field(default_factory=KLKeys)
    correction: CorrectionKeys = Field(default_factory=CorrectionKeys)

    def chosen_samples(self, rewards: Sequence[float]) -> list[int]:
        return list(range(len(rewards)))

    @property
    def has_reference(self) -> bool:
        return self.kl.coefficient > 0

    @property
    def is_corrected(self) -> bool:
        return self.correction.type != "none"

    @property
    def correction_level(self) -> Literal["token", "sequence"]:
        """What the correction's rho is of."""
        return self.correction.level

    @property
    def uses_proximal(self) -> bool:
        """Whether the loss has the proximal policy in it."""
        return self.correction.type != "none"

    def scores_policy_first(self, updates: int) -> bool:
        return self.kl.in_reward or (updates > 1 and self.uses_proximal)


def _reports_ratio(keys: AlgorithmKeys) -> bool:
    """A loss of one's own reports what it likes."""
    return getattr(keys, "loss_function", None) is None


class RatioKeys(PolicyGradientKeys):
    """Losses made of the ratio of the policy's probabilities to an earlier policy's."""

    own_metrics: ClassVar[tuple[Key, ...]] = (
        Key("ratio/mean", "-", "policy over proximal policy, mean over what it is clipped by: tokens or completions", "learner", _reports_ratio),
        Key("ratio/max", "-", "the largest", "learner", _reports_ratio),
        Key("ratio/clipped_low", "share", "whose gradient the lower bound takes away", "learner", _reports_ratio),
        Key("ratio/clipped_high", "share", "whose gradient the upper bound takes away", "learner", _reports_ratio),
    )  # fmt: skip

    # What the ratio is taken against: `proximal`, the policy before the update (the paper's code), which staleness does
    # not show in unless a correction puts it there; or `sampler`, the policy that generated the token.
    ratio_base: Literal["proximal", "sampler"] = "proximal"
    clip_low: float = Field(0.2, ge=0, le=1)  # the ratio counts between 1 - clip_low and 1 + clip_high
    clip_high: PositiveFloat = 0.2  # DAPO: 0.28

    @model_validator(mode="after")
    def check_correction(self) -> "RatioKeys":
        if self.ratio_base == "sampler" and self.correction.type != "none":
            raise ValueError(
                f"algorithm.correction.type = {self.correction.type} corrects a ratio to the proximal policy; with "
                "algorithm.ratio_base = sampler nothing is left to correct: set one of them back"
            )
        return self

    @property
    def is_corrected(self) -> bool:
        return self.ratio_base == "sampler" or self.correction.type != "none"

    @property
    def uses_proximal(self) -> bool:
        return self.ratio_base == "proximal"
