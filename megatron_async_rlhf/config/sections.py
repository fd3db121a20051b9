"""The sections of a run's configuration, one class each. No torch here: a laptop can check a cluster's config.

Units are in the names (`_s` seconds, `_mib`, `_gib`); unknown keys are refused; what crosses sections is
checked in `config.root`.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from megatron_async_rlhf.config.beats import LearnerTimeout, NodeTimeout
from megatron_async_rlhf.config.cluster import SlurmKeys, Variables
from megatron_async_rlhf.config.section import LocalPath, Section, synonyms
from megatron_async_rlhf.devices import DEVICES

Device = Annotated[Literal["cpu", "cuda"], synonyms(cuda=("gpu", "gpus"))]
_FLOAT32, _BFLOAT16 = ("fp32", "float32", "f32", "float"), ("bf16", "bfloat16", "bfloat")
Precision = Annotated[Literal["fp32", "bf16"], synonyms(fp32=_FLOAT32, bf16=_BFLOAT16)]
Dtype = Annotated[Literal["float32", "bfloat16"], synonyms(float32=_FLOAT32, bfloat16=_BFLOAT16)]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Recompute = Literal["none", "selective", "full"]


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("must be letters, digits, '.', '_' and '-', beginning with a letter or a digit")
    return name


class RunSection(Section):
    """Name, place, seed and device of the run."""

    name: Annotated[str, AfterValidator(_check_name)] = "run"
    dir: LocalPath | None = None  # default: runs/<name>; an earlier run found there is set aside, never overwritten
    seed: int = Field(0, ge=0)
    device: Device = "cpu"  # what learner and generators compute on
    # Of the learner, when a rank of it dies or hangs: the run continues by itself from its last checkpoint, if it has one.
    max_restarts: int = Field(3, ge=0)

    @property
    def path(self) -> Path:
        return self.dir if self.dir is not None else Path("runs") / self.name


class ModelSection(Section):
    """The policy: a Hugging Face directory, a checkpoint that `import-hf` made of one, or a fresh Llama."""

    hf: LocalPath | None = (
        None  # directory with weights, config and tokenizer; beside it only context_length and chat_template may be set
    )
    layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    ffn_size: PositiveInt | None = None
    heads: PositiveInt | None = None
    kv_heads: PositiveInt | None = None  # default: heads
    context_length: PositiveInt | None = None  # tokens of prompt and completion together; with hf at most its own
    rope_theta: PositiveFloat | None = None  # default 10000
    norm_eps: PositiveFloat | None = None  # default 1e-5
    tie_embeddings: bool | None = None  # default false
    init_std: PositiveFloat | None = None  # default 0.02
    tokenizer: Literal["bytes", "bpe"] | None = None  # default bytes; bpe is trained on data.train
    vocab_size: PositiveInt | None = None  # only with bpe
    # Instead of the model's own: a Jinja file, or none, which takes prompts as they are (base models, `TL;DR:`).
    chat_template: Literal["none"] | LocalPath | None = None

    @model_validator(mode="after")
    def check_one_source(self) -> "ModelSection":
        shape = {name: getattr(self, name) for name in type(self).model_fields if name not in ("hf", "chat_template")}
        given = sorted(name for name, value in shape.items() if value is not None and name != "context_length")
        if self.hf is not None and given:
            raise ValueError(
                f"model.hf brings shape and tokenizer; remove model.{given[0]}, or replace all of the section: "
                f"-s 'model={{hf: {self.hf}}}'"
            )
        required = ("layers", "hidden_size", "ffn_size", "heads", "context_length")
        missing = [name for name in required if shape[name] is None]
        if self.hf is None and missing:
            raise ValueError(f"model.{missing[0]} is missing: give model.hf, or all of {', '.join(required)}")
        if self.tokenizer == "bpe" and self.vocab_size is None:
            raise ValueError("model.tokenizer = bpe needs model.vocab_size")
        if self.tokenizer != "bpe" and self.vocab_size is not None:
            raise ValueError("model.vocab_size only goes with model.tokenizer = bpe; a bytes vocabulary is fixed")
        return self


class OptimizerKeys(Section):
    """Adam with decoupled weight decay and a learning-rate schedule."""

    learning_rate: PositiveFloat
    min_learning_rate: float = Field(0.0, ge=0)
    lr_decay: Literal["constant", "linear", "cosine"] = "linear"  # the paper: linear, no warmup
    warmup_steps: int = Field(0, ge=0)  # all steps but the last, at most
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: PositiveFloat = 1e-8
    clip_grad: float = Field(1.0, ge=0)  # global gradient norm; 0 turns clipping off (the paper's TL;DR runs)

    @model_validator(mode="after")
    def check_rates(self) -> "OptimizerKeys":
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate} is above learning_rate = {self.learning_rate}"
            )
        return self


class Fp8Keys(Section):
    """Matrix products of the layers in 8-bit floats, through Transformer Engine."""

    # How scales are chosen: from earlier steps | from the tensor | per block of 128 (Hopper) | per 32 (Blackwell)
    recipe: Fp8Recipe = "tensorwise"
    bf16_layers: int = Field(0, ge=0)  # so many first and so many last layers stay in bf16

    @model_validator(mode="before")
    @classmethod
    def pass_over_parameters(cls, keys: Any) -> Any:
        """`parameters: false` stands in the resolved configurations of older runs."""
        if isinstance(keys, dict) and keys.get("parameters") is False:
            return {key: value for key, value in keys.items() if key != "parameters"}
        return keys

    @model_validator(mode="after")
    def check_bf16_layers(self) -> "Fp8Keys":
        if self.bf16_layers and self.recipe == "delayed":
            raise ValueError(
                f"fp8.bf16_layers = {self.bf16_layers} does not go with fp8.recipe = delayed, whose scales are agreed on "
                "once for all layers; set fp8.recipe = tensorwise"
            )
        return self


class LearnerSection(OptimizerKeys):
    """The Megatron-core learner: parallelism, precision, optimizer of the RL stage."""

    learning_rate: PositiveFloat = 3e-6
    tensor_parallel: PositiveInt = 1  # ranks that share each layer
    pipeline_parallel: PositiveInt = 1  # stages that the layers are divided over
    virtual_stages: PositiveInt = 1  # chunks of layers per pipeline rank, interleaved: shorter pipeline bubbles
    context_parallel: PositiveInt = 1  # ranks that divide each sequence
    ranks: PositiveInt | None = None  # default: the product of the parallel sizes; more ranks are data parallel
    sequence_parallel: bool = False  # between layers, divide the tokens over the tensor-parallel ranks
    recompute: Recompute = "none"  # in backward, instead of keeping it: selective = attention, full = layers
    distributed_optimizer: bool = False  # each data-parallel rank keeps and updates its share of the Adam state
    overlap_grad_reduce: bool = False  # reduce gradients over data-parallel ranks while backward continues
    overlap_param_gather: bool = False  # gather updated parameters while the next forward pass continues
    optimizer_offload: float = Field(0.0, ge=0, le=1)  # share of the Adam state kept and updated on the host; cuda only
    reference: Literal["resident", "swapped"] = "resident"  # its copy on the device, or swapped in from host memory
    precision: Precision = "fp32"  # of weights and activations; with bf16 Adam keeps float32 weights of its own
    fp8: Fp8Keys | None = None
    micro_batch_tokens: PositiveInt = 4096  # most tokens of one forward-backward pass on one rank
    share_prompts: bool = False  # compute a prompt once for its completions in a micro-batch; cpu only
    # TFLOP/s one rank's device could do, dense, at this precision: model_flops_utilisation is a share of it. Default: of
    # known GPUs, none for a CPU
    peak_tflops: PositiveFloat | None = None
    # OpenMP threads per rank, each with a core of its own if there are enough; with launch.cores = shared one per core
    threads: PositiveInt = 1
    timeout_s: LearnerTimeout = 600.0  # any collective, and any one command of the controller

    @property
    def model_ranks(self) -> int:
        """Ranks that work on one sequence together."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def world_size(self) -> int:
        return self.ranks if self.ranks is not None else self.model_ranks

    @property
    def data_parallel(self) -> int:
        return self.world_size // self.model_ranks

    @property
    def weights_dtype(self) -> str:
        """Of the weights it trains and exports, by torch's name."""
        return "float32" if self.precision == "fp32" else "bfloat16"

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights: context parallelism divides tokens only."""
        return self.data_parallel * self.context_parallel


class WarmStartSection(OptimizerKeys):
    """Supervised steps on the data's own solutions before RL, on the same learner; 0 steps turns it off."""

    steps: int = Field(0, ge=0)  # optimizer steps; 0 turns it off
    batch_size: PositiveInt = 64  # sequences per optimizer step
    learning_rate: PositiveFloat = 1e-3
    lr_decay: Literal["constant", "linear", "cosine"] = "cosine"  # to min_learning_rate, reached after the last step
    adam_beta2: float = Field(0.95, ge=0, lt=1)


class GeneratorSection(Section):
    """The vLLM servers and how they sample."""

    replicas: PositiveInt = 1  # vLLM servers
    tensor_parallel: PositiveInt = 1  # GPUs of each; on CPUs workers
    temperature: PositiveFloat = 0.7  # of the samples that are trained on
    eval_temperature: float | None = Field(None, ge=0)  # of the held-out evaluation; default temperature, 0 is greedy
    max_new_tokens: PositiveInt = 128  # of a completion; one that is longer is cut off
    dtype: Dtype = "float32"  # of the weights it holds; the learner converts while packing
    max_concurrent: PositiveInt = 128  # sequences a replica decodes at once
    kv_cache_gib: PositiveInt = 1  # of each tensor-parallel worker; cpu only
    gpu_memory_share: float = Field(0.85, gt=0, lt=1)  # of each GPU for weights, activations and cache; cuda only
    cuda_graphs: bool = True  # capture decoding steps; cuda only
    port: int = Field(0, ge=0, le=65535)  # of the first replica, the next ones follow; 0 picks free ports
    start_timeout_s: PositiveFloat = 300.0  # until a server is ready: load, compile, capture
    request_timeout_s: PositiveFloat = 300.0  # a generator that has requests and answers none for so long is lost
    # A server whose engine and workers do not answer a call that takes no time within this is not ready. They answer
    # between two engine steps, so it must be longer than the longest one.
    probe_timeout_s: PositiveFloat = 60.0
    restarts: int = Field(
        3, ge=0
    )  # of each replica that dies or hangs once training has begun; 0: its death ends the run

    @property
    def workers(self) -> int:
        """Of all replicas."""
        return self.replicas * self.tensor_parallel


class ScheduleSection(Section):
    """How far generation may run ahead of learning, and what becomes of a rollout.

    A rollout is the set of groups trained on between two weight pushes: `mini_batches` times `prompts_per_step` prompts,
    in `mini_batches` times `epochs` optimizer steps.
    """

    mode: Literal["sync", "async"] = "async"  # generation and training take turns | run at the same time
    # Optimizer steps between sampling a token and the first step on its rollout; sync is 0, null has no bound.
    max_staleness: int | None = Field(1, ge=0)
    steps: PositiveInt = 64  # optimizer steps of the RL stage
    prompts_per_step: PositiveInt = 32  # of one mini-batch, which one optimizer step is made of
    mini_batches: PositiveInt = 1  # N of the paper: so many optimizer steps on samples of one policy
    epochs: PositiveInt = 1  # T of the paper: how often each mini-batch is used
    # batch: a rollout's prompts run together and leave together, bit for bit the same every time | streaming: each
    # prompt on its own, to the generator with the least to do
    generation: Literal["batch", "streaming"] = "batch"
    # What a push does to completions under way. none: it waits for their end | keep: they continue with the new weights
    # and the old cache | recompute: with a new cache | resubmit: they are cut off and continue wherever there is room
    in_flight_updates: Literal["none", "keep", "recompute", "resubmit"] = "none"
    # Which complete groups are trained first: in the order of prompts | any of the oldest `window` groups | of the
    # newest policy. Groups that would be too old in the next step are always trained first.
    order: Literal["fifo", "windowed", "freshest"] = "fifo"
    window: PositiveInt | None = None  # groups; default: twice a rollout's
    max_groups: PositiveInt | None = None  # under way or waiting for the learner; null: what max_staleness allows
    # How long the learner waits for a group that must be in the next step before it is cancelled and sampled anew.
    straggler_s: PositiveFloat | None = None
    # Steps: the first version that generators get after so many is evaluated on held-out prompts, while training continues.
    eval_every: PositiveInt | None = None
    record: bool = False  # keep what was trained on, for `async-rlhf replay`

    @field_validator("in_flight_updates", mode="before")
    @classmethod
    def name_booleans(cls, value: object) -> object:
        """YAML's `true` and `false`, for who needs no more than that."""
        return {True: "keep", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def check_rollout(self) -> "ScheduleSection":
        updates, bound = self.updates_per_rollout, self.staleness_bound
        if self.steps % updates:
            raise ValueError(
                f"schedule.steps = {self.steps} is not a multiple of mini_batches x epochs = {updates}, the steps on one rollout"
            )
        if bound is not None and bound % updates:
            raise ValueError(
                f"schedule.max_staleness = {bound} is not a multiple of mini_batches x epochs = {updates}: weights change "
                "hands between rollouts only"
            )
        return self

    @model_validator(mode="after")
    def check_streaming(self) -> "ScheduleSection":
        if self.generation == "batch":
            streaming = {"in_flight_updates": "none", "order": "fifo", "straggler_s": None, "max_groups": None}
            for key, needed in streaming.items():
                if getattr(self, key) != needed:
                    raise ValueError(f"schedule.{key} = {getattr(self, key)} needs schedule.generation = streaming")
            if self.staleness_bound is None:
                raise ValueError("schedule.max_staleness = null needs schedule.generation = streaming")
        if self.staleness_bound is None and self.max_groups is None:
            raise ValueError("schedule.max_staleness = null needs schedule.max_groups, or nothing bounds what is kept")
        if self.max_groups is not None and self.max_groups < self.groups_per_rollout:
            raise ValueError(
                f"schedule.max_groups = {self.max_groups} is below the {self.groups_per_rollout} groups of one rollout"
            )
        if self.window is not None and self.order != "windowed":
            raise ValueError("schedule.window needs schedule.order = windowed")
        if self.window is not None and self.window < self.groups_per_rollout:
            raise ValueError(
                f"schedule.window = {self.window} is below the {self.groups_per_rollout} groups of one rollout"
            )
        return self

    @property
    def staleness_bound(self) -> int | None:
        """The bound in force: sync is the async schedule with a bound of 0."""
        return 0 if self.mode == "sync" else self.max_staleness

    @property
    def updates_per_rollout(self) -> int:
        return self.mini_batches * self.epochs

    @property
    def groups_per_rollout(self) -> int:
        return self.mini_batches * self.prompts_per_step

    @property
    def rollouts(self) -> int:
        return self.steps // self.updates_per_rollout


class WeightsSection(Section):
    """How the learner's weights reach the generators."""

    transport: Literal["gloo", "nccl", "ipc"] = "gloo"  # memory or sockets | a GPU per rank | sides share GPUs
    verify: Literal["every", "first", "off"] = "every"  # pushes with both sides' digests compared
    staging_mib: PositiveInt = 64  # a staging buffer; a rank has two, generators on the learner's machine map its
    snapshot: bool = False  # send from a copy: the optimizer's step waits for that only; costs the copy's memory
    timeout_s: PositiveFloat = 120.0  # abort when no data arrives for this long (rendezvous, message, digest check)

    @property
    def staging_bytes(self) -> int:
        return self.staging_mib * 2**20


class CheckpointSection(Section):
    """What is saved on the way, for `train --resume`. A run that is interrupted saves where it is, whatever is set here."""

    every_steps: PositiveInt | None = None  # default: only when the run is interrupted
    keep_last: PositiveInt | None = 2  # so many of the newest; null keeps all
    # A metric of metrics.jsonl: also keep the checkpoint whose steps, since the one before, had the best mean of it.
    keep_best: str | None = None
    best: Literal["highest", "lowest"] = "highest"  # whether the highest or the lowest value counts as best
    async_save: bool = True  # write from a copy in host memory while training continues
    max_run_seconds: PositiveFloat | None = None  # of wall clock: then finish the step, save and end as interrupted
    timeout_s: PositiveFloat = 600.0  # from the copy to the last file

    @model_validator(mode="after")
    def check_keep_best(self) -> "CheckpointSection":
        if self.keep_best is not None and (self.every_steps is None or self.keep_last is None):
            raise ValueError(
                f"checkpoint.keep_best = {self.keep_best} chooses among checkpoints: set checkpoint.every_steps and "
                "checkpoint.keep_last"
            )
        if self.best == "lowest" and self.keep_best is None:
            raise ValueError("checkpoint.best = lowest needs checkpoint.keep_best")
        return self


class LaunchSection(Section):
    """How the processes of a run are placed on machines, and watched."""

    nodes: PositiveInt = 1  # machines; `async-rlhf train` is started once on each of them
    gpus_per_node: PositiveInt = 8  # without GPUs: cores, for planning
    tensor_parallel_across_nodes: bool = False  # let a learner's tensor-parallel group span machines: slow links
    interface: str | None = None  # between machines, as ib0, for NCCL too; unset: the one they find each other by
    port: int = Field(0, ge=0, le=65535)  # the other machines meet the first one here; 0 picks a free one
    join_timeout_s: PositiveFloat = 300.0  # for all machines to be there
    node_timeout_s: NodeTimeout = 20.0  # a machine that is silent for so long is lost, and the run with it
    gpu: Literal["a100", "h100", "h100-pcie", "h200", "b200"] = (
        "h100"  # whose data sheet the estimated speed is computed from
    )
    network_gbit_s: PositiveFloat = 400.0  # of one GPU to other machines; for the estimated speed too
    gpu_memory_gib: PositiveFloat | None = (
        None  # of one GPU, for the estimate of a dry run; default: that of launch.gpu
    )
    memory_check: bool = True  # refuse a start if the learner clearly lacks GPU memory or a server holds no sequence
    # split: learner and servers have cores of their own; shared: all have all cores, in turn, with a synchronous schedule
    cores: Literal["split", "shared"] = "split"
    # Bind learner ranks to cores of their own, on GPUs ranks and servers to those near theirs; vLLM always binds CPU workers,
    # and API servers, controller and reward workers are bound to the cores of a side that waits for the other.
    pin_cores: bool = True
    shutdown_grace_s: PositiveFloat = 10.0  # between SIGTERM and SIGKILL
    interrupt_grace_s: PositiveFloat = 120.0  # after Ctrl-C, for the step under way, the checkpoint and the export
    # Variables for all processes: the way to set what is otherwise ignored, as VLLM_LOGGING_LEVEL (docs/environment.md)
    environment: Variables = {}
    slurm: SlurmKeys | None = None  # what `async-rlhf launch --executor slurm` asks Slurm for; a run ignores it

    @property
    def gpu_memory(self) -> float:
        """GiB, as programs see them."""
        return DEVICES[self.gpu].memory_gib if self.gpu_memory_gib is None else self.gpu_memory_gib

    @property
    def encrypts_http(self) -> bool:
        """Whether requests leave the machine, so that servers answer only what is encrypted (`run_tls`)."""
        return self.nodes > 1
