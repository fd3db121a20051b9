"""Learner ranks that train reward models as told by a JSON file: `reward_worker.py <job.json>`.

The ranks of each layout of the job are forked from this process, one layout after the other.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from forked_ranks import run_ranks
from learner_worker import error_of

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.formats.digest import digest
from megatron_async_rlhf.learner.megatron.parallel import Placement, join_learner
from megatron_async_rlhf.learner.megatron.reward_learner import RewardModelLearner
from megatron_async_rlhf.learner.megatron.transfer.weights import named_parameters
from megatron_async_rlhf.learner.protocol import (
    ExportWeights,
    ScoreRewards,
    StartPairs,
    StartReinforcement,
    TrainPairs,
)
from megatron_async_rlhf.models.architecture import architecture_of_hf
from megatron_async_rlhf.types import TokenizedPair


def pairs_of(rows: list) -> list[TokenizedPair]:
    return [TokenizedPair(chosen=chosen, rejected=rejected, margin=margin) for chosen, rejected, margin in rows]


def run_model(job: dict, model: dict, placement: Placement, directory: Path) -> dict:
    tree = job["config"] | {"model": {"hf": model["hf"]}, "reward_model": job["keys"] | model["keys"]}
    config = RunConfig.model_validate(tree)
    arch = architecture_of_hf(Path(model["hf"])).with_score_head()
    learner = RewardModelLearner(config, arch, placement)

    def rewards() -> list[float]:
        return learner.execute(ScoreRewards(sequences=job["scored"])).rewards

    learner.execute(ExportWeights(directory=str(directory / "initial")))
    learner.execute(StartPairs(steps=len(job["steps"])))
    result = {"before": rewards(), "steps": []}
    for number, rows in enumerate(job["steps"], start=1):
        answer = learner.execute(TrainPairs(step=number, pairs=pairs_of(rows)))
        result["steps"].append(answer.metrics.values)
    result["after"] = rewards()
    learner.execute(ExportWeights(directory=str(directory / "final")))
    result["digests"] = {name: digest(parameter).hex() for name, parameter in named_parameters(learner.chunks).items()}
    for name, command in {"foreign": StartReinforcement(), "nothing": TrainPairs(step=9, pairs=[])}.items():
        result[name] = error_of(learner.execute, command)
    return result


def run_rank(rank: int, job: dict, layout: dict, path: Path) -> None:
    job = job | {"config": job["config"] | {"learner": job["config"]["learner"] | layout["learner"]}}
    config = RunConfig.model_validate(job["config"] | {"model": {"hf": job["models"]["tied"]["hf"]}})
    placement = join_learner(config.learner, "cpu")
    results = {
        name: run_model(job, model, placement, path.parent / layout["name"] / name)
        for name, model in job["models"].items()
    }
    (path.parent / f"{layout['name']}-rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def main() -> int:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    for layout in job["layouts"]:
        act = partial(run_rank, job=job, layout=layout, path=path)
        if not run_ranks(layout["learner"]["ranks"], path.parent, layout["name"], act):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
