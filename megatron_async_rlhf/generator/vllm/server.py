"""The command line and environment that start one vLLM server. Plain strings: no vllm import, no process."""

import json
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.generator.vllm.plugin import BACKEND

_PREFILL_TOKENS = 4096  # prompt tokens of one engine step


def server_command(config: RunConfig, model_dir: Path, address: tuple[str, int], context_length: int) -> list[str]:
    """Arguments of vLLM's OpenAI server for replica weights that only ever come from the learner.

    The module is started directly: the `vllm` script of the CPU distribution looks up its metadata under
    another name and fails.
    """
    generator, (host, port) = config.generator, address
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model_dir)),
        *("--served-model-name", "policy"),
        *("--host", host),
        *("--port", str(port)),
        *("--load-format", "dummy"),  # the first push brings the weights
        *("--dtype", generator.dtype),
        *("--seed", str(config.run.seed)),
        *("--tensor-parallel-size", str(generator.tensor_parallel)),
        *("--max-model-len", str(context_length)),
        *("--max-num-seqs", str(generator.max_concurrent)),
        *("--max-num-batched-tokens", str(max(context_length, _PREFILL_TOKENS))),
        *("--generation-config", "vllm"),
        *("--logprobs-mode", "processed_logprobs"),  # after temperature: what the sampler really used
        *("--scheduling-policy", "priority"),  # requests run in the controller's order, not the network's
        *("--worker-extension-cls", "megatron_async_rlhf.generator.vllm.worker_extension.WeightInspection"),
        *("--weight-transfer-config", json.dumps({"backend": BACKEND})),
        "--enable-server-load-tracking",
        "--disable-uvicorn-access-log",
        *(["--enable-scale-out"] if _scale_out_is_optional() else []),  # tokens in, tokens out
        # Requests that keep their cache through an update hold blocks of older weights, and vLLM cannot empty its
        # prefix cache while they do: the next request with the same prompt would go on from those.
        *(["--no-enable-prefix-caching"] if config.schedule.in_flight_updates == "keep" else []),
        *_device_arguments(config),
    ]


def records_versions() -> bool:
    """Whether vLLM records which weights sampled a token, as it does from 0.30 on; without a record an update must not
    meet requests under way, and a server that was started again cannot be told from the one before."""
    return _vllm_mentions("entrypoints/scale_out/token_in_token_out/protocol.py", "weight_versions")


def _scale_out_is_optional() -> bool:
    """Whether vLLM has the option, without which newer versions serve no tokens; older ones always do, and refuse it."""
    return _vllm_mentions("entrypoints/*/cli_args.py", "enable_scale_out")


@cache
def _vllm_mentions(files: str, word: str) -> bool:
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:  # the machine that plans need not be the one that runs: as the newest does
        return True
    return any(word in file.read_text(encoding="utf-8") for file in Path(vllm.origin).parent.glob(files))


def _device_arguments(config: RunConfig) -> list[str]:
    if config.run.device == "cpu":
        # A prompt is prefilled in one go: in vLLM 0.32 a seeded request whose prefill is cut in two crashes the worker.
        return ["--enforce-eager", "--no-enable-chunked-prefill"]
    share = ["--gpu-memory-utilization", str(config.generator.gpu_memory_share)]
    return share if config.generator.cuda_graphs else [*share, "--enforce-eager"]


def server_environment(config: RunConfig, devices: list[str]) -> dict[str, str]:
    """What the server's environment needs on top of ours.

    Args:
        devices: a core or a GPU for each tensor-parallel worker, as their numbers or names.
    """
    if config.run.device == "cuda":
        placed = {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    else:
        placed = {
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(devices),
            "VLLM_CPU_KVCACHE_SPACE": str(config.generator.kv_cache_gib),
            # Matrices are repacked with every push: else glibc keeps holes of all their sizes (80 % more memory).
            "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
            "OMP_NUM_THREADS": "1",
        }
    return placed | {
        "VLLM_SERVER_DEV_MODE": "1",  # pause, resume and weight-update routes
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it filters tokens, which we never do, and may not be installed
        "TOKENIZERS_PARALLELISM": "false",
    }
