"""vLLM's entry point into this project (`vllm.general_plugins`): what changes in every process of a server."""

import multiprocessing
import os

from megatron_async_rlhf.generator.vllm.terminate import keep_terminate_blocked
from megatron_async_rlhf.orphans import signal_on_death_of
from megatron_async_rlhf.serving.vllm_command import WAITS_ASLEEP

BACKEND = "async_rlhf"


def register() -> None:
    """Called by vLLM in each of its processes, before it starts others; may be called more than once."""
    keep_terminate_blocked()
    server = multiprocessing.parent_process()
    if server is not None and server.pid is not None:  # else this is the server itself
        signal_on_death_of(server.pid)  # an engine would stay, with its memory, and a worker that waits for another one
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "megatron_async_rlhf.generator.vllm.weight_sink", "WeightSink"
        )
    from megatron_async_rlhf.generator.vllm.grouped_outputs import group_outputs

    group_outputs()
    if os.environ.get(WAITS_ASLEEP) == "1":
        from megatron_async_rlhf.generator.vllm.waiting import wait_asleep

        wait_asleep()
