import subprocess
import sys

import pytest

SCRIPT = """
import threading
from vllm.distributed.device_communicators import shm_broadcast
from megatron_async_rlhf.generator.vllm.waiting import wait_asleep

wait_asleep()
wait_asleep()  # vLLM loads plugins more than once in a process

def spin():
    raise SystemExit("spins")

shm_broadcast.sched_yield = spin
requests = shm_broadcast.MessageQueue(1, 1, max_chunk_bytes=1024, max_chunks=2)
answers = shm_broadcast.MessageQueue(1, 1, max_chunk_bytes=1024, max_chunks=2)

def worker():
    queue = shm_broadcast.MessageQueue.create_from_handle(requests.export_handle(), 0)
    queue.wait_until_ready()
    while (number := queue.dequeue(indefinite=True)) is not None:
        answers.enqueue(number + 1)

answered = shm_broadcast.MessageQueue.create_from_handle(answers.export_handle(), 0)
other = threading.Thread(target=answers.wait_until_ready)
other.start()
answered.wait_until_ready()
other.join()
thread = threading.Thread(target=worker, daemon=True)
thread.start()
requests.wait_until_ready()
for number in range(50):
    requests.enqueue(number)
    assert answered.dequeue(timeout=20) == number + 1
requests.enqueue(None)
thread.join(20)
try:
    answered.dequeue(timeout=0.1)
except TimeoutError:
    print("all came")
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_messages_come_although_nobody_looks_for_them_again_and_again():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["all came"]), done.stderr
