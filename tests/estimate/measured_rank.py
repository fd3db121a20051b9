"""Trains real learner ranks and writes down by how much the resident set of each peaked.

Run as `measured_rank.py <job.json>`. Every case of the job forks its ranks from this process. A rank first runs the
same commands on a tiny model, so that libraries, thread pools and process groups are in memory. What it had resident
then is the fixed part, and what the kernel's high-water mark (`VmHWM`) rises above that is the measured peak: of two
whole preference steps, the first of which allocates the optimizer's state. A case that says so then saves a checkpoint:
how far that rises above what was resident before it is measured too.
"""

import ctypes
import gc
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from forked_ranks import run_ranks

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.learner.megatron.learner import MegatronLearner
from megatron_async_rlhf.learner.megatron.parallel import Placement, join_learner
from megatron_async_rlhf.learner.protocol import FinishCheckpoint, SaveCheckpoint, TrainRollout
from megatron_async_rlhf.learner.rollout import Rollout
from megatron_async_rlhf.models.architecture import architecture_of
from megatron_async_rlhf.types import Sequence, TrainingGroup

TINY = {"layers": 4, "hidden_size": 64, "ffn_size": 128, "heads": 4, "context_length": 64}
STEPS = 2
SAVE_S = 120


def status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def train(config: RunConfig, vocab_size: int, placement: Placement) -> MegatronLearner:
    """As many pairs of the longest sequences as one step has prompts."""
    arch = architecture_of(config.model, vocab_size)
    learner = MegatronLearner(config, arch, placement)
    learner.start_reinforcement()
    row = Sequence(token_ids=[1] * (arch.context_length + 1), prompt_length=1)  # its last token is no position
    group = TrainingGroup(sequences=[row, row], rewards=[1.0, 0.0], sampler_logprobs=[[], []])
    for version in range(STEPS):
        learner.train_rollout(
            Rollout.of(TrainRollout(version=version, mini_batches=[[group] * config.schedule.prompts_per_step]))
        )
    return learner


def save(learner: MegatronLearner, directory: Path) -> int:
    """By how many bytes a first checkpoint makes the resident set peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    learner.save_checkpoint(
        SaveCheckpoint(checkpoint=str(directory / "saved"), reference=str(directory / "reference"), snapshot=True)
    )
    deadline = time.monotonic() + SAVE_S
    while not learner.finish_checkpoint(FinishCheckpoint()).saved:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return status_bytes("VmHWM") - before


def run_rank(rank: int, directory: Path, case: dict) -> None:
    config = RunConfig.model_validate(case["config"])
    tiny = RunConfig.model_validate(case["config"] | {"model": TINY})
    placement = join_learner(config.learner, config.run.device)
    warm_up = train(tiny, 64, placement)
    if case["save"]:
        save(warm_up, directory / f"{case['name']} of a tiny model")
    del warm_up
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fixed = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    learner = train(config, case["vocab_size"], placement)
    weights = sum(parameter.nbytes for chunk in learner.chunks for parameter in chunk.parameters())
    figures = {"fixed": fixed, "peak": status_bytes("VmHWM") - fixed, "weights": weights}
    if case["save"]:
        figures["save"] = save(learner, directory / case["name"])
    (directory / f"{case['name']}.{rank}.json").write_text(json.dumps(figures))
    torch.distributed.destroy_process_group()


def main() -> int:
    path = Path(sys.argv[1])
    for case in json.loads(path.read_text()):
        act = partial(run_rank, directory=path.parent, case=case)
        if not run_ranks(case["config"]["learner"]["ranks"], path.parent, case["name"], act):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
