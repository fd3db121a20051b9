"""Asynchronous RLHF: Megatron-core learns while vLLM generates, with bounded staleness."""

__version__ = "0.2.0"
