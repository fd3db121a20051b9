"""The `eval` section: what `async-rlhf eval` asks and measures of `model.hf`."""

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from megatron_async_rlhf.config.section import LocalPath, Section


class EvaluationSection(Section):
    """The prompts are those of the `data` section's evaluation split, the scores those of `reward`."""

    # What the answers are compared with: the data's solutions, or another model: a Hugging Face directory, a run or a
    # checkpoint, as model.hf is one.
    against: Literal["references"] | LocalPath | None = None
    judged_by: str | None = None  # name of the reward entry whose score says who wins; default: the weighted sum
    kl_to: LocalPath | None = None  # model that the divergence is measured from, usually the SFT policy; any such form
    samples: PositiveInt = 1  # answers to each prompt
    pairs: bool = False  # also write pairs.jsonl: to each prompt the best and the worst sample, for a reward model
    k: list[PositiveInt] = Field([1], min_length=1)  # of pass@k; at most samples. One number stands for a list of one
    temperature: float = Field(0.0, ge=0)  # 0 is greedy
    max_new_tokens: PositiveInt | None = None  # default: generator.max_new_tokens
    confidence: float = Field(0.95, gt=0, lt=1)  # of the intervals
    bootstrap: PositiveInt = 10_000  # resamples that the intervals are made of
    seed: int = Field(0, ge=0)  # of the samples, and of the resamples

    @field_validator("k", mode="before")
    @classmethod
    def take_single_number(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def check_samples(self) -> "EvaluationSection":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.samples = {self.samples}: at eval.temperature = 0 all answers to a prompt are the same; set "
                "eval.temperature, or eval.samples = 1"
            )
        if self.pairs and self.samples == 1:
            raise ValueError("eval.pairs = true: a pair takes two answers to a prompt; raise eval.samples = 1")
        if (largest := max(self.k)) > self.samples:
            raise ValueError(
                f"eval.k = {largest}: pass@{largest} needs at least {largest} answers to a prompt; raise eval.samples = "
                f"{self.samples}"
            )
        if self.judged_by is not None and self.against is None:
            raise ValueError(
                f"eval.judged_by = {self.judged_by} has no effect with eval.against = null: remove it, or set eval.against"
            )
        return self
