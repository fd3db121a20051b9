"""The `algorithm` section: one class per algorithm, chosen by `algorithm.type`.

Defaults are the paper's (Noukhovitch et al., arXiv 2410.18252) where it has the algorithm; where its table and its code
differ, both are reachable and a comment says which is which. Formulas are in `megatron_async_rlhf.algorithms`.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from megatron_async_rlhf.config.section import LocalPath, Section


class AlgorithmKeys(Section):
    """What all algorithms have: how many samples, and what is done to rewards before anything is learned from them."""

    samples_per_prompt: PositiveInt = 2  # K
    missing_eos_reward: float | None = -1.0  # replaces the reward of a cut-off completion; null keeps its reward
    reward_scale: Literal["none", "batch", "running"] = "none"  # divide by the spread of this step's, or all, rewards
    overlong_buffer: PositiveInt | None = None  # DAPO: within so many tokens of the limit, reward falls by up to 1

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


class OnlineDPOSection(AlgorithmKeys):
    """Online DPO (Guo et al. 2024) as the paper runs it: best against worst of K samples."""

    type: Literal["online_dpo"] = "online_dpo"
    samples_per_prompt: int = Field(2, ge=2)  # K; the paper also trains with 4
    beta: PositiveFloat = 0.1  # the paper: 0.1 (TL;DR, GSM8K), 0.03 (8B chatbot)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"

    @property
    def trained_samples(self) -> int:
        return 2

    @property
    def sequences_together(self) -> int:
        return 2  # chosen and rejected

    @property
    def has_reference(self) -> bool:
        return True


class BestOfNSection(AlgorithmKeys):
    """Supervised learning on the best of K samples; no KL."""

    type: Literal["best_of_n"] = "best_of_n"
    samples_per_prompt: int = Field(2, ge=2)

    @property
    def trained_samples(self) -> int:
        return 1


class KLKeys(Section):
    """KL(policy || reference): a penalty in the reward, or a term of the loss."""

    coefficient: float = Field(0.05, ge=0)  # the paper: 0.05; 0 needs no reference policy
    place: Literal["reward", "loss"] = "reward"  # the paper: reward
    estimator: Literal["k1", "k2", "k3"] = "k1"
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

    coefficient: float = Field(0.04, ge=0)
    place: Literal["loss"] = "loss"
    estimator: Literal["k1", "k2", "k3"] = "k3"
    gradient: Literal["policy", "estimator"] = "estimator"


class CorrectionKeys(Section):
    """Weights for samples of another policy than the one before the update: `rho = pi_proximal / pi_sampler`.

    none: the paper | truncate: min(rho, high) of each token | mask: IcePop, tokens with rho outside [low, high] do not
    count | mask_sequences: the same of whole completions | decoupled: rho itself, decoupled PPO.

    Where the loss is of whole completions (rloo, proximal_rloo) so is rho: the product over the tokens.
    """

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
    def kind(self) -> Literal["none", "truncate", "mask"]:
        """In the terms of `algorithms.corrections`."""
        return {
            "none": "none",
            "truncate": "truncate",
            "decoupled": "truncate",
            "mask": "mask",
            "mask_sequences": "mask",
        }[self.type]


class PolicyGradientKeys(AlgorithmKeys):
    """Losses that weigh log-probabilities with advantages."""

    kl: KLKeys = Field(default_factory=KLKeys)
    correction: CorrectionKeys = Field(default_factory=CorrectionKeys)

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


class RatioKeys(PolicyGradientKeys):
    """Losses made of the ratio of the policy's probabilities to an earlier policy's."""

    # What the ratio is taken against: `proximal`, the policy before the update (the paper's code), which staleness does
    # not show in unless a correction puts it there; or `sampler`, the policy that generated the token.
    ratio_base: Literal["proximal", "sampler"] = "proximal"
    clip_low: float = Field(0.2, ge=0, le=1)
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


class PPOSection(RatioKeys):
    """PPO with a value model, a Megatron model of its own."""

    type: Literal["ppo"] = "ppo"
    samples_per_prompt: PositiveInt = 1
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True
    value_coefficient: PositiveFloat = 0.1  # of the value loss; the paper: 0.1
    value_clip: PositiveFloat | None = 0.2  # null: no clip
    value_learning_rate: PositiveFloat | None = None  # default: the learner's
    value_hf: LocalPath | None = (
        None  # Hugging Face directory the value model starts from, a reward model; default: the policy
    )
    dual_clip: float | None = Field(None, gt=1)  # bounds the loss of bad tokens that became likelier; INTELLECT-2: 4

    @model_validator(mode="after")
    def check_dual_clip(self) -> "PPOSection":
        _check_dual_clip(self.dual_clip, self.clip_high)
        return self

    @property
    def has_value_model(self) -> bool:
        return True


class RLOOSection(PolicyGradientKeys):
    """REINFORCE leave-one-out: the plain policy gradient, no ratio but the correction's."""

    type: Literal["rloo"] = "rloo"
    samples_per_prompt: int = Field(2, ge=2)

    @model_validator(mode="after")
    def check_whole_completions(self) -> "RLOOSection":
        _check_whole_completions(self)
        return self

    @property
    def correction_level(self) -> Literal["token", "sequence"]:
        return "sequence"


class ProximalRLOOSection(RatioKeys):
    """RLOO with the clipped ratio of whole completions: the paper's own variant."""

    type: Literal["proximal_rloo"] = "proximal_rloo"
    samples_per_prompt: int = Field(2, ge=2)

    @model_validator(mode="after")
    def check_whole_completions(self) -> "ProximalRLOOSection":
        _check_whole_completions(self)
        return self

    @property
    def correction_level(self) -> Literal["token", "sequence"]:
        return "sequence"


class GRPOSection(RatioKeys):
    """GRPO and its successors, as four choices: see the table in `algorithms.grpo`."""

    type: Literal["grpo"] = "grpo"
    samples_per_prompt: int = Field(8, ge=2)
    kl: GRPOKLKeys = Field(default_factory=GRPOKLKeys)
    scale_advantages: bool = True  # divide by the group's standard deviation; Dr. GRPO: false
    normalisation: Literal["token", "sequence", "constant"] = "sequence"  # DAPO, CISPO: token; Dr. GRPO: constant
    ratio: Literal["token", "sequence", "sequence_token"] = "token"  # GSPO: sequence
    loss: Literal["clip", "cispo"] = "clip"
    cispo_high: PositiveFloat = 5.0  # most that CISPO lets a token's ratio count
    dual_clip: float | None = Field(None, gt=1)

    @model_validator(mode="after")
    def check_loss(self) -> "GRPOSection":
        _check_dual_clip(self.dual_clip, self.clip_high)
        if self.loss == "cispo":
            for key in ("clip_low", "clip_high", "dual_clip", "ratio"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"algorithm.{key} = {getattr(self, key)} has no meaning with algorithm.loss = cispo, which bounds "
                        "each token's ratio by algorithm.cispo_high: remove it, or set algorithm.loss = clip"
                    )
        return self


def _check_dual_clip(dual_clip: float | None, clip_high: float) -> None:
    if dual_clip is not None and dual_clip <= 1 + clip_high:
        raise ValueError(
            f"algorithm.dual_clip = {dual_clip:g} must be above 1 + algorithm.clip_high = {1 + clip_high:g}, where the "
            "ratio's own clip ends"
        )


def _check_whole_completions(section: PolicyGradientKeys) -> None:
    if section.correction.type == "mask":
        raise ValueError(
            f"algorithm.correction.type = mask leaves single tokens out, but the loss of algorithm.type = {section.type} "
            "is of whole completions: set algorithm.correction.type = mask_sequences"
        )


SECTIONS: dict[str, type[AlgorithmKeys]] = {
    "online_dpo": OnlineDPOSection,
    "ppo": PPOSection,
    "rloo": RLOOSection,
    "proximal_rloo": ProximalRLOOSection,
    "best_of_n": BestOfNSection,
    "grpo": GRPOSection,
}


def _type_of(value: Any) -> str | None:
    """The tag of a tree from YAML or of a section; online DPO where nothing is said."""
    return value.get("type", "online_dpo") if isinstance(value, dict) else getattr(value, "type", None)


AlgorithmSection = Annotated[
    Annotated[OnlineDPOSection, Tag("online_dpo")]
    | Annotated[PPOSection, Tag("ppo")]
    | Annotated[RLOOSection, Tag("rloo")]
    | Annotated[ProximalRLOOSection, Tag("proximal_rloo")]
    | Annotated[BestOfNSection, Tag("best_of_n")]
    | Annotated[GRPOSection, Tag("grpo")],
    Discriminator(_type_of, custom_error_type="type_of_section", custom_error_message="unknown"),
]
