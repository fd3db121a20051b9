"""Which cores are near a GPU: of its NUMA node, so that what a process hands to its GPU does not cross to another socket."""

import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

_SYSFS = Path("/sys/bus/pci/devices")
_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
_TIMEOUT_S = 60.0


def cores_near(gpus: Sequence[str], available: Collection[int], sysfs: Path = _SYSFS) -> list[list[int]]:
    """Of each GPU, those of the available cores that are near it; none where the machine does not say.

    Args:
        gpus: as in CUDA_VISIBLE_DEVICES: numbers, or names that begin a UUID.
    """
    if not gpus:
        return []
    try:
        listed = subprocess.run(_QUERY, capture_output=True, encoding="utf-8", timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [[] for _ in gpus]
    rows = [[field.strip() for field in line.split(",")] for line in listed.splitlines() if line.count(",") == 2]
    near = []
    for gpu in gpus:
        buses = [bus for index, uuid, bus in rows if gpu == index or (gpu.startswith("GPU-") and uuid.startswith(gpu))]
        cores = _local_cores(buses[0], sysfs) if len(buses) == 1 else set()
        near.append(sorted(cores & set(available)))
    return near


def _local_cores(bus: str, sysfs: Path) -> set[int]:
    """The driver writes a PCI domain with eight digits, the kernel with four: 00000000:3B:00.0 is 0000:3b:00.0."""
    domain, _, rest = bus.lower().partition(":")
    try:
        ranges = (sysfs / f"{domain[-4:]}:{rest}" / "local_cpulist").read_text(encoding="utf-8").strip().split(",")
        ends = [(int(first), int(last or first)) for first, _, last in (each.partition("-") for each in ranges)]
    except (OSError, ValueError):
        return set()
    return {core for first, last in ends for core in range(first, last + 1)}
