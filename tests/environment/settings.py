"""What the shells, containers, pods and jobs that people start runs from have set. Each is tried on its own without a run,
and all that a run is to ignore together in one."""

from dataclasses import dataclass, field

NOWHERE = "/proc/nowhere"  # cannot be made, not even by root


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        passes: names that describe the site and are handed on.
    """

    variables: dict[str, str]
    passes: set[str] = field(default_factory=set)


def _ignored(**variables: str) -> Setting:
    return Setting(variables)


def _passes(**variables: str) -> Setting:
    return Setting(variables, set(variables))


_SERVICE = "tcp://10.0.0.7:8000"
SETTINGS = {
    "vLLM key": _ignored(VLLM_API_KEY="secret"),
    "vLLM plugins": _ignored(VLLM_PLUGINS="", VLLM_LOGGING_CONFIG_PATH=NOWHERE),
    "vLLM cores": _ignored(VLLM_CPU_OMP_THREADS_BIND="90-99", VLLM_CPU_KVCACHE_SPACE="4000"),
    "vLLM address": _ignored(VLLM_HOST_IP="10.9.9.9", VLLM_LOOPBACK_IP="10.9.9.9", VLLM_DP_SIZE="4"),
    "vLLM engine": _ignored(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_WORKER_MULTIPROC_METHOD="fork", VLLM_USE_V1="0"),
    "vLLM numbers": _ignored(VLLM_FLOAT32_MATMUL_PRECISION="medium", VLLM_CPU_ATTN_SPLIT_KV="0", VLLM_CPU_INT4_W4A8="1"),
    "vLLM models": _ignored(VLLM_USE_MODELSCOPE="True", VLLM_MODEL_REDIRECT_PATH=NOWHERE),
    "vLLM limits": _ignored(VLLM_MAX_N_SEQUENCES="1", VLLM_HTTP_TIMEOUT_KEEP_ALIVE="1", VLLM_LOGGING_LEVEL="CRITICAL"),
    "Kubernetes service vllm": _ignored(
        VLLM_PORT=_SERVICE, VLLM_SERVICE_HOST="10.0.0.7", VLLM_SERVICE_PORT="8000", VLLM_PORT_8000_TCP_PROTO="tcp"
    ),
    "Kubernetes service master": _ignored(MASTER_PORT=_SERVICE, MASTER_SERVICE_HOST="10.0.0.7"),
    "Kubernetes pod": _passes(KUBERNETES_SERVICE_HOST="10.0.0.1", KUBERNETES_PORT="tcp://10.0.0.1:443", HOSTNAME="pod-0"),
    "vLLM metrics": _ignored(PROMETHEUS_MULTIPROC_DIR=NOWHERE, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://10.0.0.7"),
    "HTTP server": _ignored(WEB_CONCURRENCY="many", UVICORN_PORT="1", FORWARDED_ALLOW_IPS="*"),
    "torch logs": _ignored(TORCH_LOGS="nonsense", TORCH_DISTRIBUTED_DEBUG="NONSENSE", TORCH_SHOW_CPP_STACKTRACES="1"),
    "torch loading": _ignored(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1", TORCHDYNAMO_DISABLE="1", TORCH_COMPILE_DISABLE="1"),
    "torch instructions": _ignored(ATEN_CPU_CAPABILITY="default"),
    "torch allocator": _ignored(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
    "torchrun": _ignored(
        RANK="7", WORLD_SIZE="99", LOCAL_RANK="5", LOCAL_WORLD_SIZE="9", MASTER_ADDR="10.9.9.9", GROUP_RANK="3",
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none", ROLE_NAME="default",
    ),
    "gloo": _ignored(GLOO_SOCKET_IFNAME="nope0", GLOO_DEVICE_TRANSPORT="IBVERBS"),
    "NCCL": _passes(NCCL_SOCKET_IFNAME="nope0", NCCL_DEBUG="WARN", TORCH_NCCL_ASYNC_ERROR_HANDLING="1"),
    "UCX and libfabric": _passes(UCX_NET_DEVICES="mlx5_0:1", FI_PROVIDER="efa"),
    "threads": _ignored(OMP_NUM_THREADS="nonsense", OMP_PROC_BIND="spread", OMP_THREAD_LIMIT="1", GOMP_CPU_AFFINITY="0"),
    "threads of MKL": _ignored(MKL_NUM_THREADS="7", MKL_DYNAMIC="TRUE", KMP_AFFINITY="scatter", OPENBLAS_NUM_THREADS="9"),
    "precision on CPUs": _ignored(ONEDNN_DEFAULT_FPMATH_MODE="BF16", DNNL_MAX_CPU_ISA="SSE41", MKL_CBWR="COMPATIBLE"),
    "precision on GPUs": _ignored(NVIDIA_TF32_OVERRIDE="1", CUBLAS_WORKSPACE_CONFIG=":16:8", NVTE_FUSED_ATTN="0"),
    "CUDA": Setting({"CUDA_VISIBLE_DEVICES": "7", "CUDA_LAUNCH_BLOCKING": "1"}, {"CUDA_VISIBLE_DEVICES"}),
    "Hugging Face": _passes(HF_HOME=NOWHERE, HF_HUB_OFFLINE="1", HF_TOKEN="hf_x", HF_ENDPOINT="http://127.0.0.1:9"),
    "Transformers": _passes(TRANSFORMERS_OFFLINE="1", TRANSFORMERS_CACHE=NOWHERE, TRANSFORMERS_VERBOSITY="nonsense"),
    "tokenizers": _ignored(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS="0"),
    "W&B": Setting(
        {"WANDB_MODE": "online", "WANDB_RUN_ID": "x", "WANDB_PORT": _SERVICE, "WANDB_API_KEY": "k"}, {"WANDB_API_KEY"}
    ),
    "proxies": _passes(
        http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9",
        HTTPS_PROXY="http://127.0.0.1:9", ALL_PROXY="socks5h://127.0.0.1:9", all_proxy="socks5h://127.0.0.1:9",
    ),
    "Slurm": _passes(SLURM_JOB_ID="12", SLURM_NTASKS="8", SLURM_PROCID="3", SLURM_LOCALID="3", SLURM_CPU_BIND="quiet"),
    "MPI": _passes(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="8", PMI_RANK="3", PMIX_RANK="3"),
    "Python's warnings": _ignored(PYTHONWARNINGS="error", PYTHONDEVMODE="1"),
    "Python's mode": _ignored(PYTHONOPTIMIZE="2", PYTHONHASHSEED="7", PYTHONUNBUFFERED="1", PYTHONMALLOC="debug"),
    "Python's encoding": _ignored(PYTHONUTF8="0", PYTHONIOENCODING="ascii", PYTHONCOERCECLOCALE="0"),
    "locale": _ignored(LANG="de_DE.ISO-8859-1", LANGUAGE="de", LC_MESSAGES="de_DE", LC_NUMERIC="de_DE.UTF-8"),
    "terminal": Setting({"TERM": "dumb", "COLUMNS": "no", "FORCE_COLOR": "1", "NO_COLOR": ""}, {"TERM", "COLUMNS", "NO_COLOR"}),
    "caches": _passes(XDG_CACHE_HOME=NOWHERE, XDG_CONFIG_HOME=NOWHERE, VLLM_CACHE_ROOT=NOWHERE, TRITON_CACHE_DIR=NOWHERE),
    "home": _passes(HOME=NOWHERE),
    "temporary directory": _passes(TMPDIR=NOWHERE),
    "memory": _passes(MALLOC_ARENA_MAX="1", MALLOC_PERTURB_="165", MALLOC_MMAP_THRESHOLD_="1048576"),
    "time": _passes(TZ="Pacific/Kiritimati", SOURCE_DATE_EPOCH="0"),
}  # fmt: skip
