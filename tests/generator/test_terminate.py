"""SIGTERM, blocked by whoever starts a vLLM server, stays blocked in all that the server starts."""

import signal
import subprocess
import sys

import pytest

LIMIT_S = 60
# As vLLM starts its engine.
STARTS_ANOTHER = """
import multiprocessing, signal, sys
from megatron_async_rlhf.generator.vllm.terminate import keep_terminate_blocked

def is_blocked():
    return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())

def say():
    print("child", is_blocked(), flush=True)

if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep_terminate_blocked()
        keep_terminate_blocked()
    for _ in range(2):
        child = multiprocessing.get_context("spawn").Process(target=say)
        child.start()
        child.join()
    print("parent", is_blocked())
"""


@pytest.mark.parametrize(("blocked", "kept"), [(True, True), (True, False), (False, True)])
def test_what_a_server_starts_gets_no_sigterm(tmp_path, blocked: bool, kept: bool):
    program = tmp_path / "server.py"
    program.write_text(STARTS_ANOTHER)

    def block() -> None:
        if blocked:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    command = [sys.executable, str(program), "keep" if kept else "leave"]
    done = subprocess.run(command, preexec_fn=block, capture_output=True, text=True, timeout=LIMIT_S)
    stays = blocked and kept  # Python unblocks it otherwise
    assert done.stdout.splitlines() == [f"child {stays}", f"child {stays}", f"parent {stays}"], done.stderr
