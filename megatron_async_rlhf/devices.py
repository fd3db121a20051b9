"""Peak figures of the GPUs we know, from NVIDIA's data sheets, without sparsity, and how many this machine has. No torch here."""

import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """
    Attributes:
        marks: what the name that torch gives it contains; the first device of the table whose marks are there counts.
        flops: per second, by precision: matrix products in bf16 and FP8, float32 without tensor cores. What a device
            has no instructions for is not there.
        bandwidth: of its memory, bytes per second.
        memory_gib: of its memory, as programs see it.
        link: to the other GPUs of its machine, bytes per second in one direction.
        host_link: to its machine's memory, bytes per second in one direction.
    """

    name: str
    marks: str
    flops: dict[str, float]
    bandwidth: float
    memory_gib: float
    link: float
    host_link: float


DEVICES = {
    "b200": Device(
        name="B200 180GB",
        marks="B200",
        flops={"bf16": 2250e12, "fp8": 4500e12, "fp32": 75e12},
        bandwidth=7.7e12,
        memory_gib=178.0,
        link=900e9,
        host_link=64e9,
    ),
    "h200": Device(
        name="H200 141GB",
        marks="H200",
        flops={"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
        bandwidth=4.8e12,
        memory_gib=139.0,
        link=450e9,
        host_link=64e9,
    ),
    "h100-pcie": Device(
        name="H100 PCIe",
        marks="H100 PCIe",
        flops={"bf16": 756e12, "fp8": 1513e12, "fp32": 51e12},
        bandwidth=2.0e12,
        memory_gib=80.0,
        link=64e9,
        host_link=64e9,
    ),
    "h100": Device(
        name="H100 80GB",
        marks="H100",
        flops={"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
        bandwidth=3.35e12,
        memory_gib=80.0,
        link=450e9,
        host_link=64e9,
    ),
    "a100": Device(
        name="A100 80GB",
        marks="A100",
        flops={"bf16": 312e12, "fp32": 19.5e12},
        bandwidth=2.039e12,
        memory_gib=80.0,
        link=300e9,
        host_link=32e9,
    ),
}


def known_peak(torch_name: str, precision: str) -> float | None:
    """FLOP/s of one device at `fp32`, `bf16` or `fp8`; None where that is not in the table.

    Args:
        torch_name: as `torch.cuda.get_device_name` gives it.
    """
    for device in DEVICES.values():
        if device.marks in torch_name:
            return device.flops.get(precision)
    return None


def gpus_here() -> int:
    """Of this machine."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", timeout=60.0, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
