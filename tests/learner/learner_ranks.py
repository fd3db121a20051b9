"""Runs the ranks of `learner_worker.py` in one parallel layout and reads what they wrote."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

WORKER = Path(__file__).with_name("learner_worker.py")
TIMEOUT_S = 200
CONTEXT_LENGTH = 24
VOCAB_SIZE = 37  # divisible by no number of ranks
TEMPERATURE = 0.7
SUPERVISED_STEPS = 3
WARM_START = {
    "steps": 4, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "lr_decay": "linear", "weight_decay": 0.1,
    "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-6, "clip_grad": 0.5,
}  # fmt: skip
REINFORCEMENT = {
    "learning_rate": 3e-4, "min_learning_rate": 0.0, "lr_decay": "linear", "weight_decay": 0.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-4, "clip_grad": 2.0,
}  # fmt: skip
RL_STEPS = 10
LONG_STEPS = 20
LONG_RUN = REINFORCEMENT | {"learning_rate": 1e-3, "clip_grad": 5.5, "weight_decay": 0.1}
BETA = 0.1
PEAK_TFLOPS = 0.5


@dataclass(frozen=True)
class Layout:
    """How many ranks divide each layer, the layers, and the batch; what else changes where the arithmetic happens."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    distributed_optimizer: bool = False
    virtual_stages: int = 1
    context: int = 1
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    reference: str = "resident"
    precision: str = "fp32"

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def keys(self) -> dict:
        """Of the learner's section, beside the numbers of ranks."""
        return {
            "sequence_parallel": self.sequence_parallel,
            "recompute": self.recompute,
            "distributed_optimizer": self.distributed_optimizer,
            "virtual_stages": self.virtual_stages,
            "overlap_grad_reduce": self.overlap_grad_reduce,
            "overlap_param_gather": self.overlap_param_gather,
            "reference": self.reference,
            "context_parallel": self.context,
            "precision": self.precision,
        }

    def __str__(self) -> str:
        flags = [
            name if value is True else f"{name}_{value}"
            for name, value in self.keys.items()
            if value not in (False, "none", "resident", "fp32", 1) or value is True
        ]
        return "-".join([f"tp{self.tensor}", f"pp{self.pipeline}", f"dp{self.data}", *flags])


# From Hugging Face directories. One key-value head on two ranks is where Megatron gathers what it has divided.
ROPE = {"rope_type": "default", "rope_theta": 777.0}
# With eight rotary dimensions: one wavelength below the smoothed band, one inside, two above; not Llama 3.1's numbers.
SCALED_ROPE = ROPE | {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 2.5,
    "original_max_position_embeddings": 20,
}  # fmt: skip
IMPORTED = {
    "tied": {"family": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide": {"family": "llama", "num_key_value_heads": 2, "head_dim": 12, "shard_size": "20KB"},
    "llama3": {"family": "llama", "num_key_value_heads": 2, "rope_parameters": SCALED_ROPE},
    "mistral": {"family": "mistral", "num_key_value_heads": 2, "head_dim": 10, "sliding_window": None},
    "qwen2": {"family": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2_one_kv": {"family": "qwen2", "num_key_value_heads": 1},
    "qwen3": {"family": "qwen3", "num_key_value_heads": 2, "head_dim": 12},
    "qwen3_one_kv": {"family": "qwen3", "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True},
}
# The same models once more, with a budget that no unit fits in, so that each has a micro-batch to itself: each loss, and
# angles that must restart with every packed sequence.
ALONE = {"plain-alone": "plain", "tied-alone": "tied", "llama3-alone": "llama3"}
MODELS = ["plain", *IMPORTED, *ALONE]

LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(tensor=2, pipeline=2),
    Layout(data=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(recompute="full"),
    Layout(tensor=2, pipeline=2, sequence_parallel=True, recompute="selective"),
    Layout(data=2, distributed_optimizer=True),
    Layout(reference="swapped"),
    Layout(
        data=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, reference="swapped"
    ),
]
# Each alone what others have together.
THOROUGH = [
    Layout(tensor=2, sequence_parallel=True),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(tensor=2, pipeline=2),
    Layout(data=2),
    Layout(recompute="full"),
    Layout(data=2, distributed_optimizer=True),
    Layout(reference="swapped"),
]


def models(root: Path) -> dict[str, dict]:
    """The policies every layout trains, one layer per stage in the pipelined ones.

    plain: drawn by the learner. tied: tied embeddings, one key-value head, trained with the other loss.
    wide: heads larger than hidden size / heads, from a sharded directory. The others: a family or feature each, or
    one of these with every unit alone.
    """
    plain = {
        "layers": 2, "hidden_size": 32, "ffn_size": 48, "heads": 4, "context_length": CONTEXT_LENGTH,
        "norm_eps": 1e-2, "rope_theta": 500.0, "init_std": 0.2,
    }  # fmt: skip
    sources = {"plain": {"section": plain, "vocab_size": VOCAB_SIZE}}
    for seed, (name, shape) in enumerate(IMPORTED.items(), start=1):
        sources[name] = {"section": {"hf": str(write_hf_model(root / name, seed=seed, **shape))}}
    sources["tied"]["config"] = {"algorithm": {"loss": "ipo"}}
    for name, twin in ALONE.items():
        alone = {"learner": {"micro_batch_tokens": 1}}
        sources[name] = sources[twin] | {"config": sources[twin].get("config", {}) | alone}
    return sources


def write_hf_model(directory: Path, *, seed: int, family: str, shard_size: str = "1GB", **sizes) -> Path:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "max_position_embeddings": CONTEXT_LENGTH, "rms_norm_eps": 1e-3,
        "rope_parameters": dict(ROPE), "initializer_range": 0.2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which would start as ones and zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def make_sequences() -> list[tuple[list[int], int]]:
    """Token ids and prompt length: an empty completion, one of maximal length, and ragged ones."""
    dice = random.Random(0)

    def draw(length: int, prompt_length: int) -> tuple[list[int], int]:
        return [dice.randrange(VOCAB_SIZE) for _ in range(length)], prompt_length

    ragged = [draw(dice.randrange(6, CONTEXT_LENGTH), dice.randrange(1, 5)) for _ in range(7)]
    return [draw(5, 5), draw(CONTEXT_LENGTH, 1), *ragged]


def make_pairs() -> list[list[tuple[list[int], int]]]:
    """Three steps: an odd number of pairs, fewer pairs than data-parallel ranks, and the first again."""
    dice = random.Random(1)
    steps = []
    for count in (5, 1):
        rows = []
        for _ in range(count):
            prompt = [dice.randrange(VOCAB_SIZE) for _ in range(dice.randrange(1, 6))]
            for _ in range(2):
                length = dice.randrange(1, CONTEXT_LENGTH - len(prompt) + 1)
                rows.append((prompt + [dice.randrange(VOCAB_SIZE) for _ in range(length)], len(prompt)))
        steps.append(rows)
    steps[0][1] = (steps[0][1][0][: steps[0][1][1]], steps[0][1][1])  # an empty completion
    return [*steps, steps[0]]


def make_long_run() -> list[list[tuple[list[int], int]]]:
    """The pairs of `LONG_STEPS` optimizer steps, three to six a step."""
    dice = random.Random(2)
    steps = []
    for _ in range(LONG_STEPS):
        rows = []
        for _ in range(dice.randrange(3, 7)):
            prompt = [dice.randrange(VOCAB_SIZE) for _ in range(dice.randrange(1, 6))]
            for _ in range(2):
                length = dice.randrange(1, CONTEXT_LENGTH - len(prompt) + 1)
                rows.append((prompt + [dice.randrange(VOCAB_SIZE) for _ in range(length)], len(prompt)))
        steps.append(rows)
    return steps


class LayoutRun:
    """What the ranks of one layout wrote."""

    def __init__(self, layout: Layout, directory: Path, sources: dict[str, dict]) -> None:
        self.layout, self.directory, self.sources = layout, directory, sources
        self.ranks = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(layout.ranks)]

    def result(self, model: str) -> dict:
        return self.ranks[0][model]

    def weights(self, model: str, stage: str) -> dict[str, torch.Tensor]:
        return load_file(self.directory / model / stage / "model.safetensors")

    def gradients(self, model: str, rank: int) -> dict[str, torch.Tensor]:
        """As they were before the first supervised step clipped them, of a rank's own shards."""
        return torch.load(self.directory / model / f"gradients{rank}.pt")

    def logits(self, model: str) -> list[torch.Tensor]:
        return torch.load(self.directory / model / "logits.pt")


def run_layout(layout: Layout, directory: Path, sources: dict[str, dict]) -> LayoutRun:
    directory.mkdir()
    config = {
        "learner": REINFORCEMENT | {
            "tensor_parallel": layout.tensor, "pipeline_parallel": layout.pipeline, "ranks": layout.ranks,
            "micro_batch_tokens": 2 * CONTEXT_LENGTH, "timeout_s": 60, "peak_tflops": PEAK_TFLOPS,
        } | layout.keys,
        "warm_start": WARM_START,
        "generator": {"temperature": TEMPERATURE},
        "schedule": {"steps": RL_STEPS},
        "weights": {"timeout_s": 30},
        "algorithm": {"beta": BETA, "loss": "sigmoid"},
    }  # fmt: skip
    job = {
        "config": config, "models": sources, "sequences": make_sequences(), "pairs": make_pairs(),
        "supervised_steps": SUPERVISED_STEPS, "long run": make_long_run(), "long run config": LONG_RUN,
    }  # fmt: skip
    run_worker(WORKER, directory, job, TIMEOUT_S)
    return LayoutRun(layout, directory, sources)


def run_worker(worker: Path, directory: Path, job: dict, timeout_s: float) -> None:
    """Have `worker` do `job` in `directory`; whatever goes wrong, no rank of it stays, and their logs are quoted."""
    (directory / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(worker), str(directory / "job.json")]
    with (directory / "worker.log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = f"no result within {timeout_s} s"
    if code:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a group of its own: this worker and its ranks
        process.wait()
        ends = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(directory.glob("*.log"))]
        raise AssertionError("\n".join([f"the learner ended with {code}", *ends]))
