"""The controller process of a run, whatever its job is. Started by the supervisor (`launch.supervisor`):

python -m megatron_async_rlhf.jobs train --run-dir runs/x --learner tcp://... --generator http://... --transfer host:port
python -m megatron_async_rlhf.jobs sft --run-dir runs/x --learner tcp://...
python -m megatron_async_rlhf.jobs reward_model --run-dir runs/x --learner tcp://...
python -m megatron_async_rlhf.jobs replay --run-dir runs/x.replay --learner tcp://... --recorded runs/x
python -m megatron_async_rlhf.jobs evaluate --run-dir runs/x-eval --generator http://...
"""

import argparse
import asyncio
import logging
import os
import sys
from importlib import import_module
from pathlib import Path

from megatron_async_rlhf.interpreter import collect_rarely
from megatron_async_rlhf.jobs.addresses import Addresses
from megatron_async_rlhf.telemetry.sinks.ending import is_one_ending

JOBS = ("train", "sft", "reward_model", "replay", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--learner", help="ZeroMQ address of learner rank 0")
    parser.add_argument("--generator", action="append", default=[], help="URL of a generator; repeat for more")
    parser.add_argument("--reward-server", action="append", default=[], help="URL of a reward model's server; repeat")
    parser.add_argument("--transfer", help="host:port learner rank 0 meets the generators on")
    parser.add_argument("--resume-from", type=int, help="policy version of the checkpoint to continue from")
    parser.add_argument("--servers-stayed", action="store_true", help="they have served another controller before")
    parser.add_argument("--recorded", type=Path, help="the run to do again")
    parser.add_argument("--failed", action="store_true", help="only its rollout whose loss was not finite")
    given = parser.parse_args()
    collect_rarely()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    addresses = Addresses.of(given.learner, given.generator, given.transfer, given.reward_server)
    job = import_module(f"megatron_async_rlhf.jobs.{given.job}")
    resumed = {"resume_from": given.resume_from}
    own = {
        "train": resumed | {"servers_stayed": given.servers_stayed},
        "sft": resumed,
        "replay": {"recorded": given.recorded, "failed": given.failed},
    }.get(given.job, {})
    code = asyncio.run(job.run_job(given.run_dir, addresses, **own))
    if is_one_ending():
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
