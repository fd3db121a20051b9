"""Asynchronous RLHF: Megatron-core learns while vLLM generates, with bounded staleness.

From Python: `load_config`, `train`, `Run`, `RunConfig`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_async_rlhf.api import Run as Run
    from megatron_async_rlhf.api import load_config as load_config
    from megatron_async_rlhf.api import train as train
    from megatron_async_rlhf.config.root import RunConfig as RunConfig

__version__ = "0.2.0"
__all__ = ["Run", "RunConfig", "load_config", "train"]


def __getattr__(name: str) -> Any:
    """Only when they are asked for: vLLM's processes import this package too."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    if name == "RunConfig":
        from megatron_async_rlhf.config.root import RunConfig

        return RunConfig
    from megatron_async_rlhf import api

    return getattr(api, name)
