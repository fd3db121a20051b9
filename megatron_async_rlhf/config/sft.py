"""The `sft` section: supervised fine-tuning as a stage of its own, `async-rlhf sft`."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_async_rlhf.config.sections import OptimizerKeys, WarmStartSection

BATCH_SIZE = 64


class SFTSection(OptimizerKeys):
    """Supervised fine-tuning on the answers of `data.train`; the losses are means over the step's target tokens.

    Sequences share micro-batches of `learner.micro_batch_tokens` without seeing each other, so nothing is padded.
    """

    learning_rate: PositiveFloat = 5e-6
    warmup_share: float = Field(
        0.0, ge=0, lt=1
    )  # of all steps, instead of warmup_steps; the paper's No Robots run: 0.03
    epochs: PositiveInt | None = None  # over data.train; default 1, unless steps is set
    steps: PositiveInt | None = None  # optimizer steps, instead of epochs
    batch_size: PositiveInt | None = None  # sequences per optimizer step; default 64, unless batch_tokens is set
    batch_tokens: PositiveInt | None = None  # as many sequences per optimizer step as have so many tokens, instead
    answers: Literal["last", "all"] = "last"  # turns of the assistant that the loss is of
    max_tokens: PositiveInt | None = (
        None  # of a whole conversation; default model.context_length; see data.long_prompts
    )
    eval_every: PositiveInt | None = (
        None  # steps between two losses on held-out conversations; default before and after
    )
    export: Literal["last", "best"] = "last"  # the policy after the last step, or the one with the lowest held-out loss

    @model_validator(mode="after")
    def check_amounts(self) -> "SFTSection":
        for one, other in (("epochs", "steps"), ("batch_size", "batch_tokens")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"sft.{one} and sft.{other} say the same thing in two ways: remove one of them")
        if self.warmup_share and self.warmup_steps:
            raise ValueError("sft.warmup_share and sft.warmup_steps say the same thing in two ways: remove one of them")
        if self.export == "best" and self.eval_every is None:
            raise ValueError("sft.export = best chooses among evaluations: set sft.eval_every")
        return self

    @classmethod
    def of_warm_start(cls, keys: WarmStartSection) -> "SFTSection":
        """What `async-rlhf sft` makes of a configuration without this section."""
        return cls(**keys.model_dump())

    @property
    def sequences_per_step(self) -> int:
        """At most; of `batch_tokens` as many as there are tokens, for what cannot know better."""
        return self.batch_tokens or self.batch_size or BATCH_SIZE

    def optimizer_keys(self, steps: int) -> OptimizerKeys:
        """Of a stage with so many steps."""
        if not self.warmup_share:
            return self
        return self.model_copy(update={"warmup_steps": round(self.warmup_share * steps)})
