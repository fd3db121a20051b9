import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from megatron_async_rlhf.generator.vllm.worker_in_engine import WorkerInEngine


@pytest.mark.parametrize("core", sorted(os.sched_getaffinity(0))[:2])
def test_the_engine_computes_on_the_core_of_its_worker(monkeypatch, core: int):
    bound = []
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(core))
    monkeypatch.setattr(UniProcExecutor, "_init_executor", lambda self: bound.append(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(1) as thread:  # a thread's binding is its own
        thread.submit(object.__new__(WorkerInEngine)._init_executor).result()
    assert bound == [{core}]
