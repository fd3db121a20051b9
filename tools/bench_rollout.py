"""From the controller's command to the learner's first forward pass: how long it takes, and what memory each rank needs.

    .venv/bin/python tools/bench_rollout.py --against ../earlier

Real learner processes, gloo between them, and the controller's own client; the rollout's samples are all different rows of a
tiny model's vocabulary. Measured is the time until the last rank has its micro-batches, and by how much each rank's peak of
memory is above what it held before. `--against` names a checkout of another version, whose code is run as well.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]
VOCAB = 32000


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def rank() -> None:
    """A learner process that answers a rollout as soon as it has its micro-batches."""
    from megatron_async_rlhf.errors import LearnerError
    from megatron_async_rlhf.learner.megatron import worker
    from megatron_async_rlhf.learner.megatron.learner import MegatronLearner
    from megatron_async_rlhf.learner.megatron.training.reinforcement import Reinforcement

    start, before = MegatronLearner.start_reinforcement, 0

    def settle() -> None:
        nonlocal before
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")

    def start_reinforcement(self: MegatronLearner) -> None:
        start(self)
        settle()

    def measure(self: Reinforcement, mini_batches: list, epochs: int) -> None:
        measured = {"time": time.time(), "peak": memory("VmHWM") - before}
        with Path(f"measured.{os.environ['RANK']}").open("a") as file:
            file.write(json.dumps(measured) + "\n")
        raise LearnerError("measured")

    MegatronLearner.start_reinforcement = start_reinforcement
    Reinforcement._prepare = measure
    worker.main()


async def measure(directory: Path, code: Path, *, ranks: int, prompts: int, samples: int, length: int, rounds: int):
    """Seconds of each round, and each rank's peak in bytes."""
    sys.path.insert(0, str(code))
    from megatron_async_rlhf.config.load import dump_config
    from megatron_async_rlhf.config.root import RunConfig
    from megatron_async_rlhf.errors import LearnerError
    from megatron_async_rlhf.jobs.inputs import make_model_template
    from megatron_async_rlhf.learner.client import LearnerClient
    from megatron_async_rlhf.learner.protocol import StartReinforcement, TrainRollout, WaitUntilReady
    from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR, RESOLVED_CONFIG
    from megatron_async_rlhf.types import Sequence, TrainingGroup

    config = RunConfig.model_validate(
        {
            "model": {"layers": 1, "hidden_size": 64, "ffn_size": 64, "heads": 2, "context_length": 2 * length},
            "learner": {"ranks": ranks, "micro_batch_tokens": 4 * length, "timeout_s": 1200},
            "algorithm": {"type": "grpo"},
            "generator": {"max_new_tokens": length},
        }
    )
    (directory / RESOLVED_CONFIG).write_text(dump_config(config))
    make_model_template(config, directory / POLICY_TEMPLATE_DIR)
    address = f"ipc://{directory}/commands"
    environment = os.environ | {"PYTHONPATH": str(code), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(20000 + os.getpid() % 20000), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "rank", "--run-dir", str(directory), "--listen", address]
    with (directory / "ranks.log").open("w") as log:
        processes = [
            subprocess.Popen(
                command, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, cwd=directory, stdout=log, stderr=log
            )
            for r in range(ranks)
        ]
    dice = Random(0)
    rows = [[dice.randrange(300, VOCAB) for _ in range(length)] for _ in range(16)]
    logprobs = [[-dice.expovariate(1.0) for _ in range(length - 96)] for _ in range(16)]
    group = TrainingGroup(
        sequences=[Sequence(token_ids=rows[k % 16], prompt_length=96) for k in range(samples)],
        rewards=[float(k) for k in range(samples)],
        sampler_logprobs=[logprobs[k % 16] for k in range(samples)],
    )
    learner, seconds = LearnerClient(address, timeout_s=1200), []
    try:
        await learner.execute(WaitUntilReady())
        await learner.execute(StartReinforcement())
        files = [directory / f"measured.{r}" for r in range(ranks)]
        for number in range(1, rounds + 1):
            start = time.time()
            try:
                await learner.execute(TrainRollout(version=0, mini_batches=[[group] * prompts]))
            except LearnerError as error:
                if "measured" not in str(error):
                    raise
            while not all(file.exists() and file.read_text().count("\n") == number for file in files):
                await asyncio.sleep(0.05)  # rank 0 does not wait for the others
            last = [json.loads(file.read_text().splitlines()[-1]) for file in files]
            seconds.append(max(each["time"] for each in last) - start)
        return seconds, [each["peak"] for each in last]
    finally:
        learner.close()
        for process in processes:
            process.kill()


def once(code: Path, **shape: int) -> tuple[list[float], list[int]]:
    """`measure`, in a process that has the code of that checkout."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [sys.executable, __file__, "measure", str(code), directory, json.dumps(shape)]
        done = subprocess.run(
            arguments, env=os.environ | {"PYTHONPATH": str(code)}, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise SystemExit((Path(directory) / "ranks.log").read_text()[-2000:])
        return json.loads(done.stdout.splitlines()[-1])


def main(
    prompts: Annotated[int, typer.Option(help="Groups of a rollout.")] = 1024,
    samples: Annotated[int, typer.Option(help="Samples of each.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sample, its prompt included.")] = 4096,
    ranks: Annotated[int, typer.Option(help="Data-parallel learner processes.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rollouts; the first is warm-up, of the others the median counts.")] = 3,
    against: Annotated[Path | None, typer.Option(help="A checkout to compare with.")] = None,
) -> None:
    """Print seconds, the peak of each rank in MiB, and the bytes of a rank's own share, 8 for each of its tokens."""
    shape = {"prompts": prompts, "samples": samples, "length": length, "ranks": ranks, "rounds": rounds}
    share = 8 * prompts * samples * length / ranks
    print(f"{prompts} x {samples} samples x {length} tokens to {ranks} ranks; a rank's share: {share / 2**20:.0f} MiB")
    results = {}
    for name, code in (("here", ROOT), *([("there", against.absolute())] if against else [])):
        seconds, peaks = results[name] = once(code, **shape)
        most = max(peaks) / 2**20
        print(
            f"{name:>6}: {median(seconds[1:] or seconds):7.2f} s to the first forward pass, "
            f"rounds {', '.join(f'{s:.2f}' for s in seconds)}; peak of a rank {most:.0f} MiB, "
            f"2 x share + 200 MiB is {2 * share / 2**20 + 200:.0f} MiB",
            flush=True,
        )
    if against:
        ours, theirs = (median(results[name][0][1:] or results[name][0]) for name in ("here", "there"))
        print(f"ratio: {theirs / ours:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        del sys.argv[1]
        rank()
    elif sys.argv[1:2] == ["measure"]:
        print(json.dumps(asyncio.run(measure(Path(sys.argv[3]), Path(sys.argv[2]), **json.loads(sys.argv[4])))))
    else:
        typer.run(main)
