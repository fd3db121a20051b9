"""Peak figures of the GPUs an estimate knows, from NVIDIA's data sheets (SXM modules, without sparsity)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """Attributes:
    flops: bf16 matrix products, per second.
    flops_fp8: the same in FP8; those in bf16 where the device has no FP8.
    flops_fp32: float32 products without tensor cores.
    bandwidth: of its memory, bytes per second.
    """

    name: str
    flops: float
    flops_fp8: float
    flops_fp32: float
    bandwidth: float


DEVICES = {
    "a100": Device(name="A100 80GB", flops=312e12, flops_fp8=312e12, flops_fp32=19.5e12, bandwidth=2.039e12),
    "h100": Device(name="H100 80GB", flops=989e12, flops_fp8=1979e12, flops_fp32=67e12, bandwidth=3.35e12),
    "h200": Device(name="H200 141GB", flops=989e12, flops_fp8=1979e12, flops_fp32=67e12, bandwidth=4.8e12),
    "b200": Device(name="B200 180GB", flops=2250e12, flops_fp8=4500e12, flops_fp32=75e12, bandwidth=7.7e12),
}
