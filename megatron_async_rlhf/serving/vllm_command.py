"""What the command lines and environments of all vLLM servers of a run have in common. Plain strings: no vllm import."""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import Device
from megatron_async_rlhf.run_tls import tls_files
from megatron_async_rlhf.serving.guard import GUARD

WAITS_ASLEEP = "ASYNC_RLHF_WAITS_ASLEEP"  # `generator/vllm/waiting.py`
_PREFILL_TOKENS = 4096  # prompt tokens of one engine step
# Of a block of the key-value cache on a CPU. Samples of one prompt share its whole blocks: with vLLM's own 128 tokens most
# prompts have none. Its kernels want multiples of 32.
CPU_BLOCK_TOKENS = 32
_WORKER_IN_ENGINE = "megatron_async_rlhf.generator.vllm.worker_in_engine.WorkerInEngine"


def common_arguments(
    model_dir: Path,
    name: str,
    address: tuple[str, int],
    *,
    dtype: str,
    seed: int,
    tensor_parallel: int,
    context_length: int,
    max_concurrent: int,
) -> list[str]:
    """Of vLLM's OpenAI server for this model, which its clients call `name`.

    The module is started directly: the `vllm` script of the CPU distribution looks up its metadata under
    another name and fails.
    """
    host, port = address
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model_dir)),
        *("--served-model-name", name),
        *("--host", host),
        *("--port", str(port)),
        *("--dtype", dtype),
        *("--seed", str(seed)),
        *("--tensor-parallel-size", str(tensor_parallel)),
        *("--max-model-len", str(context_length)),
        *("--max-num-seqs", str(max_concurrent)),
        *("--max-num-batched-tokens", str(max(context_length, _PREFILL_TOKENS))),
        "--disable-uvicorn-access-log",
    ]


def guard_arguments(config: RunConfig) -> list[str]:
    """What keeps strangers out, after all other middleware: only the run's processes are answered, encrypted between machines."""
    key, certificate = map(str, tls_files(config.run.path.absolute()))
    encrypted = ["--ssl-keyfile", key, "--ssl-certfile", certificate] if config.launch.encrypts_http else []
    return ["--middleware", GUARD, *encrypted]


def server_url(config: RunConfig, address: tuple[str, int]) -> str:
    """Of a server that has these arguments."""
    host, port = address
    return f"{'https' if config.launch.encrypts_http else 'http'}://{host}:{port}"


def common_environment(device: Device, devices: Sequence[str]) -> dict[str, str]:
    """On top of ours.

    Args:
        devices: a core or a GPU for each tensor-parallel worker, as their numbers or names.
    """
    if device == "cuda":
        placed = {
            "CUDA_VISIBLE_DEVICES": ",".join(devices),
            # Its second model runner rounds logits / temperature to the dtype of the weights before it samples, and says what
            # it sampled from: with bf16 further from the learner's policy than one that divides in float32, as the first does.
            "VLLM_USE_V2_MODEL_RUNNER": "0",
        }
    else:
        placed = {
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(devices),
            "OMP_NUM_THREADS": "1",
            WAITS_ASLEEP: "1",
            # Without graphs vLLM compiles one small function all the same, for the ranks of sampled tokens: 9 s of the
            # first request.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return placed | {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def cpu_arguments(config: RunConfig, cache: int, tensor_parallel: int) -> list[str]:
    """
    Args:
        cache: bytes of a worker's key-value cache, which vLLM fills with zeros when it starts.
    """
    one_core = tensor_parallel == 1 and config.launch.cores == "split"
    return [
        # In one go, without graphs: in vLLM 0.32 a seeded request whose prefill is cut in two crashes the worker.
        *("--enforce-eager", "--no-enable-chunked-prefill"),
        *("--kv-cache-memory-bytes", str(cache)),
        *("--block-size", str(CPU_BLOCK_TOKENS)),
        *(["--distributed-executor-backend", _WORKER_IN_ENGINE] if one_core else []),
    ]
