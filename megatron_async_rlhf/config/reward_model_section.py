"""The keys of `reward.type: reward_model`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from megatron_async_rlhf.config.reward_keys import FallibleKeys
from megatron_async_rlhf.config.section import LocalPath, shown
from megatron_async_rlhf.config.sections import Dtype

_Url = Annotated[str, StringConstraints(pattern=r"^https?://[^/]+/?$")]

# What describes servers that the run starts itself.
_OF_OWN_SERVERS = (
    "replicas",
    "tensor_parallel",
    "dtype",
    "max_concurrent",
    "kv_cache_gib",
    "gpu_memory_share",
    "restarts",
)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class RewardModelSection(FallibleKeys):
    """A sequence classifier with one label, whose score is the reward, served by vLLM."""

    # How it is served; which it is stays the same.
    may_change: ClassVar[tuple[str, ...]] = (
        "url", "replicas", "tensor_parallel", "kv_cache_gib", "gpu_memory_share", "start_timeout_s", "request_timeout_s",
        "restarts", "on_error",
    )  # fmt: skip

    type: Literal["reward_model"] = "reward_model"
    model: LocalPath  # Hugging Face directory of a ...ForSequenceClassification with its tokenizer
    # Servers that somebody else runs (http://host:port), one or a list; `model` then needs no weights.
    url: Annotated[list[_Url], BeforeValidator(_as_list), Field(min_length=1)] | None = None
    replicas: PositiveInt = 1  # vLLM servers of it
    tensor_parallel: PositiveInt = 1  # GPUs of each
    dtype: Dtype = "float32"  # of the weights that it computes with; the score itself is always float32
    context_length: PositiveInt | None = None  # tokens of conversation and completion together; default: the model's
    chat_template: LocalPath | None = None  # Jinja file, instead of the model's own
    # Conversations a replica computes together. Default: 1 with schedule.generation = batch, so that no score depends on
    # what is beside it, to the last bit; 32 with streaming.
    max_concurrent: PositiveInt | None = None
    kv_cache_gib: PositiveInt = 1  # of each tensor-parallel worker; cpu only
    gpu_memory_share: float = Field(0.85, gt=0, lt=1)  # of each GPU for weights, activations and cache; cuda only
    center_on_solutions: int = Field(0, ge=0)  # subtract the mean score of so many solutions of the data; 0: nothing
    start_timeout_s: PositiveFloat = 300.0  # until a server is ready
    request_timeout_s: PositiveFloat = 300.0  # a server that has requests and answers none for so long is lost
    restarts: int = Field(3, ge=0)  # of each replica that dies or hangs once training has begun; 0: it ends the run

    @model_validator(mode="after")
    def check_servers(self) -> "RewardModelSection":
        if self.url is None:
            return self
        for name in _OF_OWN_SERVERS:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f"reward.{name} = {shown(value)} has no effect with reward.url, whose servers are started elsewhere: "
                    "remove one of them"
                )
        return self
