"""A server's only worker, on a core of its own, in the process of vLLM's engine, as vLLM has it on a GPU.

On a CPU vLLM starts a process for it, whose threads it can then bind to cores, and sends every step there and its tokens
back. For a model of 6 M parameters that took 7 % of all the server's processor time.
"""

import os

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class WorkerInEngine(UniProcExecutor):
    """Bound to the core that `VLLM_CPU_OMP_THREADS_BIND` names, with all threads that the engine starts afterwards."""

    def _init_executor(self) -> None:
        os.sched_setaffinity(0, [int(os.environ["VLLM_CPU_OMP_THREADS_BIND"])])  # each worker has one
        super()._init_executor()
