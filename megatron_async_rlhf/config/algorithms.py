"""The `algorithm` section: one class per algorithm, chosen by `algorithm.type`.

Defaults are the paper's (Noukhovitch et al., arXiv 2410.18252) where it has the algorithm; where its table and its code
differ, both are reachable and a comment says which is which. Formulas are in `megatron_async_rlhf.algorithms`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from megatron_async_rlhf.algorithms.preference import best_and_worst
from megatron_async_rlhf.config.algorithm_keys import AlgorithmKeys, GRPOKLKeys, PolicyGradientKeys, RatioKeys
from megatron_async_rlhf.config.section import FunctionName, LocalPath
from megatron_async_rlhf.config.written_key import Key

# What `grpo.loss_function` is given by name, beside `loss_kwargs`; see `algorithms.ppo.clipped_policy_loss`.
LOSS_ARGUMENTS = ("logprobs_T", "base_T", "advantages_T", "token_weights_T", "segments", "weight_T", "num_tokens")


class OnlineDPOSection(AlgorithmKeys):
    """Online DPO (Guo et al. 2024) as the paper runs it: best against worst of K samples."""

    objective: ClassVar[str] = "preferences:OnlineDPO"
    own_metrics: ClassVar[tuple[Key, ...]] = (
        Key("num_pairs", "pairs", "of chosen and rejected completions (online DPO)", "learner"),
        Key("dpo/margin", "nats", "`beta` times the chosen minus the rejected log-ratio to the reference, mean over pairs", "learner"),
        Key("dpo/accuracy", "share", "of pairs whose chosen completion has the larger log-ratio", "learner"),
        Key("dpo/chosen_ratio", "nats", "`beta` times the log-ratio of chosen completions", "learner"),
        Key("dpo/rejected_ratio", "nats", "`beta` times the log-ratio of rejected completions", "learner"),
    )  # fmt: skip

    type: Literal["online_dpo"] = "online_dpo"
    samples_per_prompt: int = Field(2, ge=2)  # K; the paper also trains with 4
    beta: PositiveFloat = 0.1  # the paper: 0.1 (TL;DR, GSM8K), 0.03 (8B chatbot)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO | IPO

    def chosen_samples(self, rewards: Sequence[float]) -> list[int]:
        """The best and the worst; none where all are equal."""
        return list(best_and_worst(rewards) or ())

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

    objective: ClassVar[str] = "preferences:BestOfN"

    type: Literal["best_of_n"] = "best_of_n"
    samples_per_prompt: int = Field(2, ge=2)

    def chosen_samples(self, rewards: Sequence[float]) -> list[int]:
        """The best, the first among equals, as the paper's code does."""
        return [max(range(len(rewards)), key=lambda i: rewards[i])]

    @property
    def trained_samples(self) -> int:
        return 1


class PPOSection(RatioKeys):
    """PPO with a value model, a Megatron model of its own."""

    objective: ClassVar[str] = "ppo:PPO"
    own_metrics: ClassVar[tuple[Key, ...]] = (
        Key("value_loss", "-", "of the value model, before its coefficient (PPO)", "learner"),
        Key("value/mean", "reward", "mean value of a token", "learner"),
        Key("value/error", "reward²", "mean squared distance to the returns", "learner"),
        Key("value/clipped", "share", "of tokens whose loss `algorithm.value_clip` raises, which takes its gradient away", "learner"),
        Key("value/grad_norm", "-", "the value model's gradient norm, before clipping", "learner"),
        Key("value/learning_rate", "-", "the value model's", "learner"),
        Key("time/values_s", "s", "forward pass of the value model; only if there is one", "learner"),
    )  # fmt: skip

    type: Literal["ppo"] = "ppo"
    samples_per_prompt: PositiveInt = 1
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True  # to mean 0 and variance 1 over a mini-batch
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


class WholeCompletionKeys(PolicyGradientKeys):
    """Losses of whole completions."""

    type: Literal["rloo", "proximal_rloo"]

    @model_validator(mode="after")
    def check_whole_completions(self) -> Self:
        if self.correction.type == "mask":
            raise ValueError(
                f"algorithm.correction.type = mask leaves single tokens out, but the loss of algorithm.type = {self.type} "
                "is of whole completions: set algorithm.correction.type = mask_sequences"
            )
        return self

    @property
    def correction_level(self) -> Literal["token", "sequence"]:
        return "sequence"


class RLOOSection(WholeCompletionKeys):
    """REINFORCE leave-one-out: the plain policy gradient, no ratio but the correction's."""

    objective: ClassVar[str] = "rloo:RLOO"

    type: Literal["rloo"] = "rloo"
    samples_per_prompt: int = Field(2, ge=2)


class ProximalRLOOSection(WholeCompletionKeys, RatioKeys):
    """RLOO with the clipped ratio of whole completions: the paper's own variant."""

    objective: ClassVar[str] = "rloo:ProximalRLOO"

    type: Literal["proximal_rloo"] = "proximal_rloo"
    samples_per_prompt: int = Field(2, ge=2)


class GRPOSection(RatioKeys):
    """GRPO and its successors, as four choices: see the table in `algorithms.grpo`."""

    objective: ClassVar[str] = "grpo:GRPO"

    type: Literal["grpo"] = "grpo"
    samples_per_prompt: int = Field(8, ge=2)
    kl: GRPOKLKeys = Field(default_factory=GRPOKLKeys)
    scale_advantages: bool = True  # divide by the group's standard deviation; Dr. GRPO: false
    normalisation: Literal["token", "sequence", "constant"] = "sequence"  # DAPO, CISPO: token; Dr. GRPO: constant
    ratio: Literal["token", "sequence", "sequence_token"] = "token"  # GSPO: sequence
    loss: Literal["clip", "cispo"] = "clip"  # clipped surrogate | CISPO: clipped ratios as weights
    cispo_high: PositiveFloat = 5.0  # most that CISPO lets a token's ratio count
    dual_clip: float | None = Field(None, gt=1)  # bounds the loss of bad tokens that became likelier; INTELLECT-2: 4
    loss_function: FunctionName | None = None  # FILE.py:NAME of a loss of one's own, in place of `loss`
    loss_kwargs: dict[str, Any] = Field(default_factory=dict)  # its further keyword arguments

    @model_validator(mode="after")
    def check_loss(self) -> "GRPOSection":
        _check_dual_clip(self.dual_clip, self.clip_high)
        if self.loss == "cispo":
            self._refuse(
                ("clip_low", "clip_high", "dual_clip", "ratio"),
                "has no meaning with algorithm.loss = cispo, which bounds each token's ratio by algorithm.cispo_high: remove "
                "it, or set algorithm.loss = clip",
            )
        if self.loss_function is not None:
            self._refuse(
                ("loss", "clip_low", "clip_high", "dual_clip", "ratio", "cispo_high"),
                f"has no effect with algorithm.loss_function = {self.loss_function}: remove it, and give that function what "
                "it needs with algorithm.loss_kwargs",
            )
        elif self.loss_kwargs:
            raise ValueError(
                "algorithm.loss_kwargs has no effect without algorithm.loss_function: set that, or remove it"
            )
        return self

    def _refuse(self, keys: Sequence[str], why: str) -> None:
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"algorithm.{key} = {getattr(self, key)} {why}")


def _check_dual_clip(dual_clip: float | None, clip_high: float) -> None:
    if dual_clip is not None and dual_clip <= 1 + clip_high:
        raise ValueError(
            f"algorithm.dual_clip = {dual_clip:g} must be above 1 + algorithm.clip_high = {1 + clip_high:g}, where the "
            "ratio's own clip ends"
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
