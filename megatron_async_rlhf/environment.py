"""What a process of a run gets of the environment that the run is started in.

    ours ──(without what is ignored)──> + UTF-8, no working directory on the path ──> + what the plan says ──> a process

A run is its configuration: what a shell, a container or a Kubernetes pod happens to set for vLLM, torch or Python would
change it silently, so it is ignored. What describes the site passes: where libraries and caches are, which devices are
ours, how NCCL and UCX reach the network, proxies, credentials. A variable that is meant belongs into
`launch.environment`.
"""

import os
import pwd
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path

# Names, and beginnings of names (`*`), of variables that are ignored, by what they would change.
IGNORED = {
    "how vLLM works, or a Kubernetes service called vllm": ("VLLM_*", "PROMETHEUS_*", "OTEL_*"),
    "vLLM's HTTP server": ("UVICORN_*", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"),
    "how torch and Transformer Engine compute": (
        *("TORCH_*", "TORCHDYNAMO_*", "TORCHINDUCTOR_*", "PYTORCH_*", "ATEN_*", "NVTE_*", "TRITON_*"),
        *("NVIDIA_TF32_OVERRIDE", "CUBLAS_*", "CUBLASLT_*", "DNNL_*", "ONEDNN_*"),
        *("CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS"),
    ),
    "threads": ("OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "NUMEXPR_*", "RAYON_*", "TOKENIZERS_*"),
    "which ranks there are and how they meet": (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_*", "MASTER_*", "TORCHELASTIC_*", "GLOO_*"),
    ),
    "how W&B works, which telemetry.wandb says": ("WANDB_*",),
    "how Python works": ("PYTHON*",),
    "the language and colours of output": ("LC_*", "LANG", "LANGUAGE", "FORCE_COLOR", "CLICOLOR_FORCE"),
}
# Of these, what describes the site and passes.
KEPT = (
    *("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_NCCL_SO_PATH", "VLLM_CUDART_SO_PATH"),
    *("VLLM_ENABLE_CUDA_COMPATIBILITY", "VLLM_CUDA_COMPATIBILITY_PATH"),
    *("TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TORCH_CUDA_ARCH_LIST", "TORCH_NCCL_*", "TORCHINDUCTOR_CACHE_DIR"),
    *("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_PTXAS_PATH"),
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"),
    *("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE"),
    *("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"),
)
# Many shells set these, not for us: to name them would hide the others.
_COMMON = ("LC_*", "LANG", "LANGUAGE", "FORCE_COLOR", "PYTHON*", "OMP_*", "MKL_*", "OPENBLAS_*", "NUMEXPR_*")
_MOST_NAMES = 8

_ALWAYS = {
    "PYTHONUTF8": "1",
    "PYTHONSAFEPATH": "1",  # a `random.py` in the working directory is not Python's
    "LC_ALL": "C.UTF-8",  # some read what `lscpu` prints
}
STARTED = "ASYNC_RLHF_STARTED"  # of a controller: when its command began, or the job that it is all of, seconds since the epoch
PER_PROCESS = ("TMPDIR", "VLLM_RPC_BASE_PATH", "TORCHINDUCTOR_CACHE_DIR")  # as `launch.scratch` makes them
_NO_PROXY = ("no_proxy", "NO_PROXY")
_LOOPBACK = "localhost,127.0.0.1,::1"

# What Python code of a run imports, apart from Python's own modules.
_NEEDED = (
    *("torch", "megatron", "transformer_engine", "vllm", "transformers", "tokenizers", "safetensors", "numpy"),
    *(
        "aiohttp",
        "datasets",
        "jinja2",
        "msgspec",
        "psutil",
        "pydantic",
        "rich",
        "typer",
        "wandb",
        "xxhash",
        "yaml",
        "zmq",
    ),
)
_NEVER_IMPORTED = {"test", "idlelib", "lib2to3", "ensurepip", "venv", "turtle", "turtledemo", "this", "antigravity"}


def is_ignored(name: str) -> bool:
    rules = (rule for rules in IGNORED.values() for rule in rules)
    return _matches(name, rules) and not _matches(name, KEPT)


def child_environment(ours: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a process of a run.

    Args:
        ours: of the process that starts it.
        own: what the plan says of it; wins, but that its `no_proxy` is added to ours.
    """
    passed = (
        _user() | {name: value for name, value in ours.items() if value and not is_ignored(name)} | _own_place(ours)
    )
    empty = {name: "" for name, value in ours.items() if not value and not is_ignored(name) and name not in passed}
    direct = _joined(*(ours.get(name, "") for name in _NO_PROXY), own.get("no_proxy", ""), _LOOPBACK)
    return passed | empty | _ALWAYS | dict(own) | dict.fromkeys(_NO_PROXY, direct)


def ignored(environment: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of variables that have no influence, by what they would change."""
    found = {
        what: sorted(name for name in environment if _matches(name, rules) and is_ignored(name))
        for what, rules in IGNORED.items()
    }
    return {what: names for what, names in found.items() if names}


def ignored_line(environment: Mapping[str, str]) -> str | None:
    """Says which variables have no influence, of those that somebody may have set for this run."""
    names = sorted(
        name
        for name, value in environment.items()
        if is_ignored(name) and not _matches(name, _COMMON) and not _is_a_scratch_directory(name, value, environment)
    )
    if not names:
        return None
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (
        f"{', '.join(names[:_MOST_NAMES])}{more}: ignored; what is meant for this run belongs into launch.environment"
    )


def _is_a_scratch_directory(name: str, value: str, environment: Mapping[str, str]) -> bool:
    """As a pipeline or a sweep gives it to its runs, which have their own."""
    return name in PER_PROCESS and value == environment.get("TMPDIR")


def environment_problems(environment: Mapping[str, str]) -> list[str]:
    """What a run can neither work with nor ignore, one line each."""
    return [*_temporary_problems(), *_path_problems(environment)]


def _temporary_problems() -> Iterator[str]:
    try:
        tempfile.gettempdir()
    except OSError:
        yield "TMPDIR: there is no temporary directory that can be written, not even /tmp; set one"


def _path_problems(environment: Mapping[str, str]) -> Iterator[str]:
    places = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    elsewhere = [place for place in sys.path if place and place not in places]
    for place in places:
        modules = _modules_in(Path(place))
        for name in sorted(modules.keys() & (sys.stdlib_module_names - _NEVER_IMPORTED)):
            yield f"PYTHONPATH = {place}: {modules[name]} would take the place of Python's own {name}; leave it out"
        for name in sorted(modules.keys() & set(_NEEDED)):
            if PathFinder.find_spec(name, elsewhere) is not None:
                yield (
                    f"PYTHONPATH = {place}: {modules[name]} would take the place of the {name} that is installed; leave it "
                    "out, or uninstall the other"
                )


def _modules_in(directory: Path) -> dict[str, Path]:
    try:
        entries = list(directory.iterdir())
    except OSError:
        return {}
    files = {path.name.split(".")[0]: path for path in entries if path.suffix in (".py", ".so")}
    return files | {path.name: path for path in entries if (path / "__init__.py").is_file()}


def _user() -> dict[str, str]:
    """Of one whom the system does not know, as in many containers: Python would look for a name and a home in vain."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return {"USER": str(os.getuid()), "HOME": tempfile.gettempdir()}
    return {}


def _own_place(ours: Mapping[str, str]) -> dict[str, str]:
    """Lets a child find the copy of this package that we are of. `python -m` takes that of the working directory, and a script
    that of its own, which a child does not look into: it would find another one, if one is installed."""
    package = __name__.partition(".")[0]
    places = sys.path if sys.flags.safe_path else sys.path[1:]
    finders = [finder for finder in sys.meta_path if finder is not PathFinder]
    specs = [PathFinder.find_spec(package, places), *(finder.find_spec(package, None) for finder in finders)]
    found = next(filter(None, specs), None)
    own = Path(__file__).resolve().parent
    if found is not None and found.origin is not None and Path(found.origin).resolve().parent == own:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(own.parent), ours.get("PYTHONPATH")]))}


def _joined(*lists: str) -> str:
    names = dict.fromkeys(name.strip() for names in lists for name in names.split(",") if name.strip())
    return "*" if "*" in names else ",".join(names)


def _matches(name: str, rules: Iterable[str]) -> bool:
    return any(name == rule or (rule[-1] == "*" and name.startswith(rule[:-1])) for rule in rules)
