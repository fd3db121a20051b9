"""vLLM's entry point into this project (`vllm.general_plugins`): registers the weight-transfer backend."""

BACKEND = "async_rlhf"


def register() -> None:
    """Called by vLLM in each of its processes; may be called more than once."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "megatron_async_rlhf.generator.vllm.weight_sink", "WeightSink"
        )
