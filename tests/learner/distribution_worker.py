"""Ranks that receive rollouts, without a model: each writes down what it got. `python distribution_worker.py DIRECTORY`."""

import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from forked_ranks import run_ranks

from megatron_async_rlhf.learner import rollout as wire
from megatron_async_rlhf.learner.megatron.distribution import receive_rollout
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.protocol import decode_command


def act(root: Path, job: dict, rank: int) -> None:
    wire.TOKENS_IN_PIECE = job["tokens_in_piece"]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    tensor, data = job["tensor_parallel"], job["data_parallel"]
    placement = Placement(
        rank=rank, tensor_rank=rank % tensor, tensor_parallel=tensor, pipeline_rank=0, pipeline_parallel=1,
        data_rank=rank // tensor, data_parallel=data, sequence_parallel=False, device=torch.device("cpu"),
        control=dist.new_group(backend="gloo"),
    )  # fmt: skip
    received = []
    for messages in job["rollouts"]:
        header, *pieces = messages
        rest = iter(pieces)
        rollout = receive_rollout(
            decode_command(header),
            lambda rest=rest: next(rest),
            placement,
            unit=job["unit"],
            budget=job["budget"],
            share=False,
        )
        assert rank or next(rest, None) is None
        received.append(rollout)
    (root / f"{rank}.pickle").write_bytes(pickle.dumps(received))
    dist.barrier()


if __name__ == "__main__":
    for number, job in enumerate(pickle.loads((Path(sys.argv[1]) / "jobs.pickle").read_bytes())):
        root = Path(sys.argv[1]) / str(number)
        root.mkdir()
        count = job["tensor_parallel"] * job["data_parallel"]
        if not run_ranks(count, root, "receiving", lambda rank, root=root, job=job: act(root, job, rank)):
            sys.exit(1)
