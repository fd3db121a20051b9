"""Checks learner, weight pushes and generators on this machine's GPUs: correctness first, then speed and memory.

    python tools/gpu_check.py                        all parts, on as many GPUs as there are (1 to 8)
    python tools/gpu_check.py logits speed           some parts
    python tools/gpu_check.py --device cpu           the parts that also run without a GPU, on tiny models

Each part runs in a process of its own with a time limit; what it lacks is reported as skipped, with the reason, and
stops nothing. Prints a table, writes `gpu_check.json` into `--out`; exit code 1 if a check failed. A `run` that failed
stays in `--out` as `gpu_check_run`, with all its logs.

    logits    log-probabilities of the learner, bf16 and each FP8 recipe, against Transformers in float32
    packed    sequences packed into one micro-batch train as each by itself
    layouts   tensor, pipeline, context and data parallelism train as one rank does, as far as there are GPUs
    speed     tokens/s, TFLOP/s and MFU of layers of the 8B shape, bf16 and each FP8 recipe; memory against the estimate
    curve     loss of 200 supervised steps in FP8 against bf16
    push      GB/s of a weight push through CUDA IPC, byte for byte (through NCCL where there are several GPUs)
    generate  tokens/s of vLLM with the 8B shape
    run       the whole job: pushes verified, log-probabilities of learner and vLLM on the same tokens
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from megatron_async_rlhf.launch.nodes import free_ports

ROOT = Path(__file__).parents[1]
RESULT = "RESULT "
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
MOST_TIMES_TRANSFORMERS = 1.5  # the error of Transformers in the same precision; more is no rounding
TARGETS = {"bf16 MFU": 0.45, "FP8 over bf16": 1.25, "curve": 0.01, "memory": 0.15}


class Skip(Exception):
    """A part cannot run here; the message says why."""


@dataclass
class Findings:
    """What a part measured, and which bounds that held: (name, value, bound, whether it held).

    Attributes:
        out: where a part leaves what explains its failure.
    """

    out: Path
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[tuple[str, float, str, bool]] = field(default_factory=list)

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.checks.append((name, value, f"<= {bound:g}", value <= bound))

    def at_least(self, name: str, value: float, bound: float) -> None:
        self.checks.append((name, value, f">= {bound:g}", value >= bound))


# ---- learners


def on_gpu(device: str) -> bool:
    return device == "cuda"


def join(device: str, **learner: Any):
    """This process's place among the ranks; alone unless the environment says otherwise."""
    from megatron_async_rlhf.config.sections import LearnerSection
    from megatron_async_rlhf.learner.megatron.parallel import join_learner

    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= alone | {"MASTER_PORT": str(free_ports(1)[0])}
    return join_learner(LearnerSection(timeout_s=300, threads=len(os.sched_getaffinity(0)), **learner), device)


def make_learner(device: str, placement, arch, *, learning_rate: float = 1e-4, **learner: Any):
    """A learner with fresh weights, or those of `hf`. `fp8` is a recipe."""
    from megatron_async_rlhf.config.root import RunConfig
    from megatron_async_rlhf.learner.megatron.layers.fp8 import TOKEN_MULTIPLE
    from megatron_async_rlhf.learner.megatron.learner import MegatronLearner

    hf, recipe = learner.pop("hf", None), learner.pop("fp8", None)
    fresh = {"layers": 1, "hidden_size": 64, "ffn_size": 64, "heads": 1, "context_length": arch.context_length}
    if recipe:
        learner |= {"fp8": {"recipe": recipe}}
    stage = {"learning_rate": learning_rate, "lr_decay": "constant", "adam_beta2": 0.95}
    config = RunConfig.model_validate(
        {
            "run": {"device": device},
            "model": {"hf": str(hf)} if hf else fresh,  # the shape is `arch`
            "learner": {"timeout_s": 300} | stage | learner,
            "warm_start": stage | {"steps": 1000},
            "generator": {"temperature": 1.0},
            "weights": {"transport": "nccl" if on_gpu(device) else "gloo"},
        }
    )
    return MegatronLearner(config, arch, replace(placement, tile=TOKEN_MULTIPLE[recipe] if recipe else 1))


def precisions(device: str) -> list[dict[str, str]]:
    """Keys of the learner's section for every precision this device can do, bf16 first."""
    import torch

    from megatron_async_rlhf.learner.megatron.layers.fp8 import possible_recipes
    from megatron_async_rlhf.learner.megatron.layers.spec import has_transformer_engine

    found = [{"precision": "bf16"}]
    if on_gpu(device) and has_transformer_engine(torch.device(device)):
        found += [{"precision": "bf16", "fp8": r} for r in possible_recipes(torch.cuda.get_device_capability())]
    return found


def name_of(precision: dict[str, str]) -> str:
    return precision.get("fp8", precision["precision"])


def free_learner() -> None:
    """Give back what the last learner held, before the next one is built."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def small_model(directory: Path, device: str, family: str = "llama"):
    """A random model with sharp predictions as a Hugging Face directory; (its shape, itself in float32)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_async_rlhf.models.architecture import architecture_of_hf

    torch.manual_seed(0)
    hidden, layers, vocab = (1024, 8, 32000) if on_gpu(device) else (64, 2, 97)
    shape = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": hidden * 11 // 4 // 16 * 16,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 128 if on_gpu(device) else 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.05,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32)
    model.save_pretrained(directory)
    return architecture_of_hf(directory), model.eval()


def draw_sequences(count: int, longest: int, vocab: int, seed: int = 0):
    """Prompts with completions of any length from 1 up."""
    from megatron_async_rlhf.types import Sequence

    dice = Random(seed)
    made = []
    for _ in range(count):
        length = dice.randint(4, longest)
        ids = [dice.randrange(vocab) for _ in range(length)]
        made.append(Sequence(token_ids=ids, prompt_length=dice.randint(1, length - 1)))
    return made


# ---- parts


def part_logits(device: str, found: Findings) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_async_rlhf.learner.protocol import Score, TrainSupervised

    placement = join(device)
    for family in ("llama", "qwen3"):
        with tempfile.TemporaryDirectory() as directory:
            arch, model = small_model(Path(directory), device, family)
            sequences = draw_sequences(24, 700 if on_gpu(device) else 60, arch.vocab_size)
            reference = transformers_logprobs(model.to(device), sequences)
            # Loaded anew: `to` would round the frequencies of the rotary embedding too.
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device).eval()
            rounded = transformers_logprobs(model, sequences)
            bounds = {"fp32": 1e-4, "bf16": MOST_TIMES_TRANSFORMERS * mean_gap(rounded, reference)}
            round_layers_to_fp8(model)
            in_fp8 = transformers_logprobs(model, sequences)
            fp8_bound = MOST_TIMES_TRANSFORMERS * mean_gap(in_fp8, reference)
            del model
            plain = [] if on_gpu(device) else [{"precision": "fp32"}]
            for precision in [*plain, *precisions(device)]:
                keys = precision | {"hf": directory, "micro_batch_tokens": 4096, "learning_rate": 1e-12}
                learner = make_learner(device, placement, arch, **keys)
                if name_of(precision) == "delayed":  # its scales come from training passes before; moves no weight
                    learner.train_supervised(TrainSupervised(step=0, sequences=sequences))
                gap = mean_gap(learner.score(Score(sequences=sequences)).logprobs, reference)
                limit = bounds.get(name_of(precision), fp8_bound)
                found.at_most(f"{family} {name_of(precision)}: mean |log-probability - Transformers|", gap, limit)
                del learner
                free_learner()


def transformers_logprobs(model, sequences) -> list[list[float]]:
    """Of each sequence's completion tokens, each sequence by itself."""
    import torch

    rows = []
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.tensor([sequence.token_ids], device=model.device)
            logprobs = model(ids).logits[0].float().log_softmax(-1)
            positions = range(sequence.prompt_length - 1, ids.shape[1] - 1)
            rows.append([logprobs[p, ids[0, p + 1]].item() for p in positions])
    return rows


def round_layers_to_fp8(model) -> None:
    """Both factors of every linear layer but the output, as `tensorwise` does it: e4m3, scaled by the largest of a tensor."""
    import torch

    def rounded(values):
        scale = values.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
        return ((values / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)

    for layer in (m for m in model.model.modules() if isinstance(m, torch.nn.Linear)):
        layer.weight.data = rounded(layer.weight.data)
        layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))


def mean_gap(ours: list[list[float]], theirs: list[list[float]]) -> float:
    pairs = zip((v for row in ours for v in row), (v for row in theirs for v in row), strict=True)
    return statistics.fmean(abs(a - b) for a, b in pairs)


def part_packed(device: str, found: Findings) -> None:
    from megatron_async_rlhf.learner.protocol import Score, TrainSupervised

    placement = join(device)
    with tempfile.TemporaryDirectory() as directory:
        arch, _ = small_model(Path(directory), device)
        sequences = draw_sequences(24, 700 if on_gpu(device) else 60, arch.vocab_size)
        told = []
        for budget in (8192, 1):  # a longer sequence goes alone
            learner = make_learner(device, placement, arch, hf=directory, precision="bf16", micro_batch_tokens=budget)
            scored = learner.score(Score(sequences=sequences)).logprobs
            told.append((scored, learner.train_supervised(TrainSupervised(step=0, sequences=sequences)).metrics.values))
            del learner
            free_learner()
        (packed, together), (alone, apart) = told
        found.at_most("mean |packed - alone| log-probability", mean_gap(packed, alone), 0.01)
        for key in ("loss", "grad_norm"):
            found.at_most(f"{key}: packed against alone, relative", abs(together[key] / apart[key] - 1), 0.01)


def part_layouts(device: str, found: Findings) -> None:
    import torch

    count = torch.cuda.device_count() if on_gpu(device) else 2
    layouts = {
        "TP2": {"tensor_parallel": 2, "sequence_parallel": True},
        "PP2": {"pipeline_parallel": 2},
        "CP2": {"context_parallel": 2},
        "DP2": {"ranks": 2, "distributed_optimizer": True, "overlap_grad_reduce": True},
        "TP2 x PP2": {"tensor_parallel": 2, "pipeline_parallel": 2, "virtual_stages": 2},
        "TP2 x CP2 x DP2": {"tensor_parallel": 2, "context_parallel": 2, "ranks": 8, "sequence_parallel": True},
    }
    ranks = {name: ranks_of(keys) for name, keys in layouts.items()}
    if count < 2:
        raise Skip("one GPU: every layout of several ranks needs one for each")
    alone = train_in({}, device)
    found.figures["one rank"] = alone
    for name, keys in layouts.items():
        if ranks[name] <= count:
            told = train_in(keys, device)
            found.figures[name] = told
            for key in ("loss", "grad_norm"):
                gap = max(abs(a / b - 1) for a, b in zip(told[key], alone[key], strict=True))
                found.at_most(f"{name}: {key} against one rank, relative", gap, 0.02)


def ranks_of(keys: dict[str, Any]) -> int:
    sizes = (keys.get(f"{kind}_parallel", 1) for kind in ("tensor", "pipeline", "context"))
    product = 1
    for size in sizes:
        product *= size
    return keys.get("ranks", product)


def train_in(keys: dict[str, Any], device: str) -> dict[str, list[float]]:
    """Three steps on ranks of their own."""
    count, port = ranks_of(keys), free_ports(1)[0]
    shared = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--device", device, "--rank", json.dumps(keys)]
    processes = []
    for rank in range(count):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, text=True))
    try:
        told, _ = processes[0].communicate(timeout=240)
    finally:
        for process in processes:
            process.kill()
    return json.loads(next(line for line in told.splitlines() if line.startswith(RESULT)).removeprefix(RESULT))


def train_as_rank(device: str, keys: dict[str, Any]) -> dict[str, list[float]]:
    from megatron_async_rlhf.learner.protocol import TrainSupervised
    from megatron_async_rlhf.models.architecture import Architecture

    placement = join(device, **keys)
    hidden, heads = (1024, 8) if on_gpu(device) else (64, 4)
    arch = Architecture(
        vocab_size=1001, layers=4, hidden_size=hidden, ffn_size=2 * hidden, heads=heads, kv_heads=2,
        head_dim=hidden // heads, context_length=512, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False,
    )  # fmt: skip
    learner = make_learner(device, placement, arch, precision="bf16", micro_batch_tokens=2048, **keys)
    sequences = draw_sequences(32, 400 if on_gpu(device) else 60, arch.vocab_size)
    told = [learner.train_supervised(TrainSupervised(step=s, sequences=sequences)).metrics.values for s in range(3)]
    return {key: [values[key] for values in told] for key in ("loss", "grad_norm")}


def part_speed(device: str, found: Findings) -> None:
    import torch

    from megatron_async_rlhf.devices import known_peak
    from megatron_async_rlhf.models.architecture import Architecture

    placement = join(device)
    scale, length, tokens, steps = (1, 2048, 65536, 3) if on_gpu(device) else (32, 64, 512, 2)
    arch = Architecture(
        vocab_size=128256 // scale, layers=2, hidden_size=4096 // scale, ffn_size=14336 // scale, heads=32 // (4 if scale > 1 else 1),
        kv_heads=8 // (4 if scale > 1 else 1), head_dim=128 if scale == 1 else 16, context_length=8192, rope_theta=5e5,
        norm_eps=1e-5, tie_embeddings=False,
    )  # fmt: skip
    if on_gpu(device):
        arch = as_deep_as_fits(arch, torch.cuda.get_device_properties(0).total_memory)
    found.figures["layers"] = arch.layers
    speeds = {}
    for precision in precisions(device):
        learner = make_learner(device, placement, arch, micro_batch_tokens=4 * length, **precision)
        told = training_speed(learner, device, length, tokens, steps)
        speeds[name_of(precision)] = told["tokens_per_s"]
        if on_gpu(device):
            measured, estimated = torch.cuda.max_memory_allocated(), estimated_bytes(learner)
            told |= {"memory_gib": measured / 2**30, "estimated_gib": estimated / 2**30}
            name = f"{name_of(precision)}: memory against the estimate, relative"
            found.at_most(name, abs(measured / estimated - 1), TARGETS["memory"])
            peak = known_peak(torch.cuda.get_device_name(), "bf16")
            if peak:
                told["mfu_of_bf16_peak"] = told["tflops"] * 1e12 / peak
        told |= {
            f"sequences of {other}": training_speed(learner, device, other, tokens, 1)
            for other in (length // 4, 4 * length)
        }
        found.figures[name_of(precision)] = told
        del learner
        free_learner()
    if "mfu_of_bf16_peak" in found.figures["bf16"]:
        found.at_least("bf16 MFU", found.figures["bf16"]["mfu_of_bf16_peak"], TARGETS["bf16 MFU"])
    faster = {name: speed / speeds["bf16"] for name, speed in speeds.items() if name != "bf16"}
    if faster:
        best = max(faster, key=faster.get)
        found.at_least(f"FP8 ({best}) over bf16", faster[best], TARGETS["FP8 over bf16"])
        found.figures["speed over bf16"] = faster


def as_deep_as_fits(arch, memory: int):
    """With as many of 32 layers as leave weights, gradients and Adam, 18 bytes a number, in 45 % of a GPU's memory."""
    depths = (replace(arch, layers=layers) for layers in range(32, 1, -1))
    return next((deep for deep in depths if 18 * deep.num_parameters <= 0.45 * memory), replace(arch, layers=1))


def training_speed(learner, device: str, length: int, tokens: int, steps: int) -> dict[str, float]:
    """Of supervised steps over as many sequences of one length as give so many tokens; a quarter of each is prompt."""
    import torch

    from megatron_async_rlhf.learner.protocol import TrainSupervised
    from megatron_async_rlhf.models.flops import forward_flops
    from megatron_async_rlhf.types import Sequence

    dice, count, prompt = Random(0), tokens // length, length // 4
    sequences = [
        Sequence(token_ids=[dice.randrange(learner.arch.vocab_size) for _ in range(length + 1)], prompt_length=prompt)
        for _ in range(count)
    ]
    seconds = []
    for step in range(2 + steps):
        started = time.perf_counter()
        learner.train_supervised(TrainSupervised(step=step, sequences=sequences))
        if on_gpu(device):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[2:])
    flops = 3 * forward_flops(learner.arch, [length] * count, count * (length + 1 - prompt))
    return {"tokens_per_s": round(count * length / median), "tflops": flops / median / 1e12}


def estimated_bytes(learner) -> int:
    """Of a learner before RL: no reference yet, no push; what torch allocates, so without CUDA's own part."""
    from megatron_async_rlhf.estimate.learner_memory import learner_memory

    (held,) = learner_memory(learner.config, learner.arch)
    return held.weights + held.gradients + held.optimizer + held.activations + held.working


def part_curve(device: str, found: Findings) -> None:
    from megatron_async_rlhf.learner.protocol import TrainSupervised
    from megatron_async_rlhf.models.architecture import Architecture

    variants = precisions(device)
    if len(variants) == 1:
        raise Skip("no FP8 here: it needs Transformer Engine and compute capability 8.9")
    placement = join(device)
    batches, vocab = supervised_batches(200)
    arch = Architecture(
        vocab_size=vocab, layers=4, hidden_size=512, ffn_size=1536, heads=8, kv_heads=4, head_dim=64,
        context_length=96, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False,
    )  # fmt: skip
    curves = {}
    for precision in variants:
        learner = make_learner(device, placement, arch, micro_batch_tokens=8192, **precision)
        curves[name_of(precision)] = [
            learner.train_supervised(TrainSupervised(step=s, sequences=batch)).metrics.values["loss"]
            for s, batch in enumerate(batches)
        ]
        del learner
        free_learner()
    found.figures |= {name: [round(loss, 4) for loss in curve[::20]] for name, curve in curves.items()}
    for name, curve in curves.items():
        if name != "bf16":
            more = statistics.fmean(curve) / statistics.fmean(curves["bf16"]) - 1
            found.at_most(f"{name}: mean loss of 200 steps above that of bf16, relative", more, TARGETS["curve"])


def supervised_batches(steps: int):
    """The quickstart's warm start: its sequences, and the size of its vocabulary."""
    from megatron_async_rlhf.config.load import load_config
    from megatron_async_rlhf.data.prompts import PromptOrder
    from megatron_async_rlhf.jobs.inputs import load_run_inputs, make_model_template

    config = load_config(ROOT / "examples" / "quickstart.yaml")
    with tempfile.TemporaryDirectory() as directory:
        make_model_template(config, Path(directory))
        run_inputs = load_run_inputs(config, Path(directory))
    order = PromptOrder([p for p in run_inputs.train if p.index in run_inputs.solved], seed=0)
    batches = [[run_inputs.solved[p.index] for p in order.batch(step, 256)] for step in range(steps)]
    return batches, run_inputs.architecture.vocab_size


def part_push(device: str, found: Findings) -> None:
    import torch

    if not on_gpu(device):
        raise Skip("pushes between CPU processes: tools/bench_weights.py")
    ways = {"ipc": ["--learner", "1", "1", "1", "--generator", "1"]}
    if torch.cuda.device_count() >= 4:
        ways["nccl"] = ["--learner", "2", "1", "1", "--generator", "2"]
    else:
        found.figures["nccl"] = f"skipped: needs 4 GPUs, here are {torch.cuda.device_count()}"
    shape = ["--layers", "32", "--hidden", "4096", "--ffn", "14336", "--vocab", "128256", "--staging-mib", "512"]
    for transport, layout in ways.items():
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, str(ROOT / "tools" / "bench_weights.py"), "--transport", transport, *layout]
            command += [*shape, "--dtype", "bfloat16", "--repeats", "3", "--json", file.name]
            subprocess.run(command, check=True, timeout=280, stdout=sys.stderr)
            told = json.loads(Path(file.name).read_text())
        for way, medians in told["medians"].items():
            found.figures[f"{transport}, {way}"] = medians
            if "seconds" in medians:
                found.figures[f"{transport}, {way}"]["gb_per_s"] = told["bytes_minimum"] / medians["seconds"] / 1e9


def part_generate(device: str, found: Findings) -> None:
    if not on_gpu(device):
        raise Skip("speed of vLLM on a CPU says nothing about a GPU")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # as generators are started
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise Skip(f"vLLM cannot be imported: {error}") from None
    llm = LLM(
        model=str(ROOT / "examples" / "llama8b"), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
        max_model_len=2048, gpu_memory_utilization=0.8, max_num_seqs=256, seed=0, enable_prefix_caching=False,
    )  # fmt: skip
    dice = Random(0)

    def seconds(count: int, prompt: int, completion: int, seeded: bool) -> float:
        prompts = [{"prompt_token_ids": [dice.randrange(5, 128000) for _ in range(prompt)]} for _ in range(count)]
        sampling = [
            SamplingParams(
                temperature=0.7, max_tokens=completion, ignore_eos=True, detokenize=False, seed=i if seeded else None
            )
            for i in range(count)
        ]
        started = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        assert sum(len(a.outputs[0].token_ids) for a in answers) == count * completion
        return time.perf_counter() - started

    seconds(32, 256, 64, True)
    # Generators sample with a seed for each request, one of which vLLM's first model runner samples after the other.
    found.figures["tokens_per_s"] = round(256 * 256 / seconds(256, 256, 256, True))
    found.figures["tokens_per_s_without_seeds"] = round(256 * 256 / seconds(256, 256, 256, False))
    found.figures["prompt_tokens_per_s"] = round(64 * 2000 / seconds(64, 2000, 1, False))
    # Difference of two lengths: what a decoding step costs, without the prompts.
    for seeded in (True, False):
        found.figures[f"decoding_step_ms{'' if seeded else '_without_seeds'}"] = {
            count: round((seconds(count, 64, 192, seeded) - seconds(count, 64, 64, seeded)) / 128 * 1e3, 2)
            for count in (1, 16, 64, 128, 256)
        }


def part_run(device: str, found: Findings) -> None:
    from importlib.metadata import entry_points

    if not any(point.name == "megatron_async_rlhf" for point in entry_points(group="vllm.general_plugins")):
        raise Skip("vLLM finds plugins of installed packages only: pip install --no-deps --no-build-isolation -e .")
    server = [sys.executable, "-W", "ignore", "-c", "import vllm.entrypoints.openai.api_server"]
    told = subprocess.run(server, capture_output=True, text=True, timeout=120)
    if told.returncode:
        raise Skip(f"vLLM's server cannot be imported: {told.stderr.strip().splitlines()[-1]}")
    directory = found.out / "gpu_check_run"
    shutil.rmtree(directory, ignore_errors=True)
    keys = {
        "run.dir": directory, "run.device": device, "schedule.steps": 6, "warm_start.steps": 100,
        "data.eval_prompts": 64, "learner.precision": "bf16", "generator.dtype": "bfloat16",
    }  # fmt: skip
    if on_gpu(device):
        keys |= {"weights.transport": "ipc", "generator.gpu_memory_share": 0.4, "model.hidden_size": 256}
        keys |= {"launch.gpu_memory_gib": describe(device)["memory_gib"]}
        if "VLLM_USE_DEEP_GEMM" in os.environ:  # ignored otherwise; it says what the machine can compile
            keys["launch.environment.VLLM_USE_DEEP_GEMM"] = os.environ["VLLM_USE_DEEP_GEMM"]
    command = [sys.executable, "-m", "megatron_async_rlhf", "train", str(ROOT / "examples" / "quickstart.yaml")]
    for key, value in keys.items():
        command += ["-s", f"{key}={value}"]
    ending = ended_within(RUN_LIMIT_S, command)
    written = directory / "summary.json"
    summary = json.loads(written.read_text()) if written.is_file() else {}
    if ending:
        reason = summary.get("error") or "no summary.json was written; what was printed is above"
        raise SystemExit("\n".join([f"the run {ending}: {reason}", *first_causes(directory)]))
    sync = summary["weight_sync"]
    found.figures |= {"weight_sync": sync, "logprob_gap": summary["logprob_gap"], "eval": summary["eval"]}
    found.at_most("digests that differ", sync["mismatches"], 0)
    found.at_least("pushes verified", sync["verified"], sync["count"])
    found.at_most("mean |log-probability of learner - vLLM|", summary["logprob_gap"]["mean_abs"], 0.02)
    if all(held for *_, held in found.checks):
        shutil.rmtree(directory)


def ended_within(limit_s: float, command: list[str]) -> str:
    """How a command ended if that was not well. At the limit it is asked to end, so that it ends what it started."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        return f"did not end within {limit_s:g} s"
    return f"ended with {code}" if code else ""


def first_causes(run: Path) -> list[str]:
    """Of each process that has told an exception, the first one: where it stands, and its last frames."""
    told = [f"its files are kept in {run}"]
    others_first = sorted((run / "logs").glob("*.log"), key=lambda log: (log.stem == "controller", log.name))
    for log in others_first:  # it only tells what it heard of them
        lines = log.read_text(errors="replace").splitlines()
        start = next((i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line), None)
        if start is None:
            continue
        end = next((i for i in range(start + 1, len(lines)) if EXCEPTION.search(lines[i])), len(lines) - 1)
        told += [f"{log}:{start + 1}: first exception:", *lines[max(start + 1, end - 5) : end + 1]]
    return told


# ---- the runner

# Seconds of a whole run: a first start of vLLM compiles and captures, and may read a cold disk meanwhile.
RUN_LIMIT_S = 540
# The line that ends a traceback, behind what vLLM's logging puts in front of every line of it.
EXCEPTION = re.compile(r"^(?:\(\S+ pid=\d+\) )?(?:ERROR .*?\] )?(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b")
# seconds each may take
PARTS: dict[str, tuple[Callable[[str, Findings], None], int]] = {
    "logits": (part_logits, 180),
    "packed": (part_packed, 120),
    "layouts": (part_layouts, 600),
    "speed": (part_speed, 600),
    "curve": (part_curve, 240),
    "push": (part_push, 300),
    "generate": (part_generate, 240),
    "run": (part_run, RUN_LIMIT_S + 120),
}


def run_part(name: str, device: str, out: Path) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--device", device, "--out", str(out), "--part", name]
    started = time.time()
    with tempfile.TemporaryFile("w+") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=PARTS[name][1]).returncode
        except subprocess.TimeoutExpired:
            code = f"no result within {PARTS[name][1]} s"
        log.seek(0)
        lines = log.read().splitlines()
    told = [json.loads(line.removeprefix(RESULT)) for line in lines if line.startswith(RESULT)]
    report = told[-1] if told and code == 0 else {"failed": str(code), "log": lines[-30:]}
    return report | {"seconds": round(time.time() - started, 1)}


def answer(part: Callable[[str, Findings], None], device: str, out: Path) -> dict[str, Any]:
    found = Findings(out)
    try:
        part(device, found)
    except Skip as reason:
        return {"skipped": str(reason)}
    return {"figures": found.figures, "checks": found.checks}


def show(name: str, report: dict[str, Any]) -> None:
    if "skipped" in report:
        print(f"{name:9} skipped: {report['skipped']}")
    elif "failed" in report:
        print(f"{name:9} FAILED: {report['failed']}", *report["log"], sep="\n    ")
    else:
        print(f"{name:9} {report['seconds']} s")
        for what, value, bound, held in report["checks"]:
            print(f"    {'ok    ' if held else 'FAILED'} {what}: {value:.5g} ({bound})")
        for what, value in report["figures"].items():
            print(f"           {what}: {json.dumps(value, default=str)}")


def ok(report: dict[str, Any]) -> bool:
    return "failed" not in report and all(held for *_, held in report.get("checks", []))


@contextmanager
def quietly_ended() -> Iterator[None]:
    """An engine's or NCCL's shutdown must not count as a failure of what ran before it."""
    try:
        yield
    finally:
        sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        with quietly_ended():
            print(RESULT + json.dumps(answer(PARTS[options.part][0], options.device, options.out)), flush=True)
    if options.rank:
        with quietly_ended():
            print(RESULT + json.dumps(train_as_rank(options.device, json.loads(options.rank))), flush=True)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {min(unknown)}; there are {', '.join(PARTS)}")
    from megatron_async_rlhf.telemetry.summary import installed_versions

    reports: dict[str, Any] = {"versions": installed_versions(), "device": describe(options.device)}
    print(json.dumps(reports["device"]))
    parts = options.parts or list(PARTS)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in parts:
        reports[name] = run_part(name, options.device, options.out.absolute())
        show(name, reports[name])
        (options.out / "gpu_check.json").write_text(json.dumps(reports, indent=1, default=str) + "\n")
    raise SystemExit(int(not all(ok(reports[name]) for name in parts)))


def describe(device: str) -> dict[str, Any]:
    """Asked in a process of its own: one that has started CUDA keeps memory of the GPU."""
    if not on_gpu(device):
        return {"device": "cpu"}
    code = (
        "import json, torch; n = torch.cuda.device_count(); "
        "first = torch.cuda.get_device_properties(0) if n else None; "
        "print(json.dumps({'gpus': n, 'name': n and first.name, 'memory_gib': n and int(first.total_memory / 2**30)}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(told.stdout)
    if not found["gpus"]:
        raise SystemExit("no GPU that torch can use: see `async-rlhf doctor`; --device cpu runs what needs none")
    return found


if __name__ == "__main__":
    main()
