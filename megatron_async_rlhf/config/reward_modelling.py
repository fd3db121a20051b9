"""The `reward_model` section: a reward model from preference pairs, `async-rlhf reward-model`."""

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_async_rlhf.config.sections import OptimizerKeys


class RewardModellingSection(OptimizerKeys):
    """Training on the preference pairs of `data.train`; losses are means over the pairs of a step."""

    learning_rate: PositiveFloat = 1e-5
    epochs: PositiveInt | None = None  # over data.train; default 1, unless steps is set
    steps: PositiveInt | None = None  # optimizer steps, instead of epochs
    batch_size: PositiveInt = 64  # pairs per optimizer step
    margin: bool = False  # the chosen reward is to be higher by the data's margin, which every pair must have
    center_coefficient: float = Field(0.0, ge=0)  # of (r_chosen + r_rejected)^2; Eisenstein et al.: 0.01
    max_tokens: PositiveInt | None = None  # of prompt and completion; default model.context_length
    eval_every: PositiveInt | None = None  # steps between two evaluations on held-out pairs; default before and after

    @model_validator(mode="after")
    def check_amounts(self) -> "RewardModellingSection":
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                "reward_model.epochs and reward_model.steps say the same thing in two ways: remove one of them"
            )
        return self
