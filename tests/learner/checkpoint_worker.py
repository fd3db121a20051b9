"""Learner ranks that save checkpoints and resume from them, as told by a JSON file: `checkpoint_worker.py <job.json>`.

Each phase of the job has ranks of its own, forked like those of `learner_worker`, so what one phase leaves to the next
is on disk. A phase trains `first` steps, saves, trains on while the files are written, and writes down what came out.
"""

import dataclasses
import json
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import torch
from engine_layers import ScalingState, use_engine_layers
from forked_ranks import run_ranks
from learner_worker import counted, digests_of, preferences, sequences_of
from offloading import offload_without_a_gpu

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import LearnerError, WriteError
from megatron_async_rlhf.formats.digest import digest
from megatron_async_rlhf.learner.megatron.layers import spec as layers
from megatron_async_rlhf.learner.megatron.learner import MegatronLearner
from megatron_async_rlhf.learner.megatron.parallel import join_learner
from megatron_async_rlhf.learner.megatron.training import data_parallel, trained_model
from megatron_async_rlhf.learner.megatron.training.trained_model import TrainedModel
from megatron_async_rlhf.learner.protocol import (
    ExportWeights,
    FinishCheckpoint,
    ResumeReinforcement,
    SaveCheckpoint,
    TrainSupervised,
)
from megatron_async_rlhf.models.architecture import architecture_of

WAIT_S = 60


def finish(learner: MegatronLearner) -> None:
    deadline = time.monotonic() + WAIT_S
    while not learner.finish_checkpoint(FinishCheckpoint()).saved:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(learner: MegatronLearner, job: dict, versions: range) -> list[dict]:
    """Version 0 has no pairs: the optimizer takes its first step at version 1."""
    pairs = [[], *job["pairs"]]
    return [
        counted(learner.train_rollout(preferences(version, sequences_of(pairs[version]))).steps[0])
        for version in versions
    ]


def adam_digests(model: TrainedModel) -> list:
    """Of this rank's own share, in the order of the groups."""
    (inner,) = model.optimizer.chained_optimizers
    adam = inner.optimizer
    return [
        {key: digest(value).hex() for key, value in adam.state[parameter].items()}
        for group in adam.param_groups
        for parameter in group["params"]
    ]


def held_by(learner: MegatronLearner) -> dict:
    """Digests that do not depend on the order of the parameters."""
    return {"weights": digests_of(learner), "adam": sorted(map(sorted_items, adam_digests(learner.policy)))}


def sorted_items(state: dict[str, str]) -> list:
    return sorted(map(list, state.items()))


def outcome(learner: MegatronLearner, metrics: list[dict], directory: Path) -> dict:
    learner.export_weights(ExportWeights(directory=str(directory)))
    rates = [group["lr"] for group in learner.policy.optimizer.param_groups]
    return {
        "metrics": metrics, "weights": digests_of(learner), "adam": adam_digests(learner.policy), "rates": rates,
        "random": torch.rand(3).tolist(), "version": learner.version,
    }  # fmt: skip


def save(learner: MegatronLearner, directory: Path, *, snapshot: bool, reference: bool = True) -> None:
    learner.save_checkpoint(
        SaveCheckpoint(
            checkpoint=str(directory / "checkpoint"),
            reference=str(directory / "reference") if reference else None,
            snapshot=snapshot,
        )
    )


def error_of_a_save(learner: MegatronLearner, directory: Path) -> str:
    """A directory lies where rank 0 wants to write its file."""
    (directory / "checkpoint/__0_0.distcp").mkdir(parents=True, exist_ok=True)
    save(learner, directory, snapshot=True, reference=False)
    try:
        finish(learner)
    except WriteError as error:
        return str(error)
    return ""


def errors_of_a_full_disk(learner: MegatronLearner, directory: Path) -> dict[str, str]:
    """What is said when the disk is full by the time rank 0 writes each of a checkpoint's files, and the export's."""
    errors = {}
    for name in ("common.pt", "__0_0.distcp", ".metadata.tmp", "metadata.json", "shard-0.partial"):
        place = directory / name / "checkpoint"
        if learner.placement.rank == 0:
            place.mkdir(parents=True)
            (place / name).symlink_to("/dev/full")
        torch.distributed.barrier()
        try:
            if name == "shard-0.partial":
                learner.export_weights(ExportWeights(directory=str(place)))
            else:
                save(learner, place.parent, snapshot=True, reference=False)
                finish(learner)
        except WriteError as error:
            errors[name] = str(error)
    return errors


def move_main_parameters(learner: MegatronLearner) -> None:
    """Of an optimizer that has its own: by one place, on one rank."""
    if learner.placement.rank != torch.distributed.get_world_size() - 1:
        return
    for parameter in learner.chunks[0].parameters():
        if (main := getattr(parameter, "main_param", None)) is not None:
            main.data.copy_(main.data.roll(1))


def error_of_resuming(learner: MegatronLearner, source: Path) -> str:
    try:
        learner.resume_reinforcement(
            ResumeReinforcement(checkpoint=str(source / "checkpoint"), reference=str(source / "reference"))
        )
    except LearnerError as error:
        return str(error)
    return ""


def start_reinforcement(learner: MegatronLearner) -> int:
    """Bytes of the warm start's optimizer that are still held when the next one is built."""
    (inner,) = learner.policy.optimizer.chained_optimizers
    of_adam = [tensor for state in inner.optimizer.state.values() for tensor in state.values()]
    mains = [getattr(parameter, "main_param", None) for parameter in learner.chunks[0].parameters()]
    old = [weakref.ref(tensor) for tensor in (*of_adam, *mains) if tensor is not None]
    assert old
    del inner, of_adam, mains
    build, held = trained_model.build_optimizer, []

    def build_and_look(*arguments):
        held.append(sum(tensor.nbytes for reference in old if (tensor := reference()) is not None))
        return build(*arguments)

    trained_model.build_optimizer = build_and_look
    learner.start_reinforcement()
    trained_model.build_optimizer = build
    return held[0]


def train_and_save(learner: MegatronLearner, job: dict, phase: dict, directory: Path) -> dict:
    """Versions 1 (the optimizer has not stepped yet) and 2 are saved, the second while version 3 is trained."""
    root = Path(phase["save"])
    result = {}
    for step in range(2):
        learner.train_supervised(TrainSupervised(step=step, sequences=sequences_of(job["sequences"])))
    result["held of the optimizer before"] = start_reinforcement(learner)
    metrics = steps(learner, job, range(1))
    save(learner, root / "1", snapshot=False)
    finish(learner)
    metrics += steps(learner, job, range(1, 2))
    learner.export_weights(ExportWeights(directory=str(root / "2/exported")))
    result["saved"] = held_by(learner)
    torch.manual_seed(7 + learner.placement.rank)
    save(learner, root / "2", snapshot=True)
    metrics += steps(learner, job, range(2, 4))
    finish(learner)
    result |= outcome(learner, metrics, directory)
    result["error"] = error_of_a_save(learner, root / "blocked")
    result["full"] = errors_of_a_full_disk(learner, root / "full")
    move_main_parameters(learner)
    save(learner, root / "after the error", snapshot=True)
    finish(learner)
    if learner.config.learner.precision == "bf16":
        result["moved"] = error_of_resuming(learner, root / "after the error")
    return result


def resume(learner: MegatronLearner, job: dict, phase: dict, directory: Path) -> dict:
    source = Path(phase["resume"])
    learner.resume_reinforcement(
        ResumeReinforcement(checkpoint=str(source / "checkpoint"), reference=str(source / "reference"))
    )
    first, loaded = learner.version, held_by(learner) | {"scales": ScalingState.loads}
    result = outcome(learner, steps(learner, job, range(first, 4)), directory)
    return result | {"resumed at": first, "loaded": loaded}


def run_rank(rank: int, job: dict, phase: dict, path: Path) -> None:
    if "bucket_size" in phase:  # of a gradient buffer; Megatron's own is that of large models
        data_parallel.DistributedDataParallelConfig = partial(
            data_parallel.DistributedDataParallelConfig, bucket_size=phase["bucket_size"]
        )
    config = job["config"] | {"learner": job["config"]["learner"] | phase["learner"]}
    checked = RunConfig.model_validate(config | {"model": job["model"]["section"]})
    placement = join_learner(checked.learner, "cpu")
    arch = architecture_of(checked.model, job["model"]["vocab_size"])
    if "family" in phase:
        arch = dataclasses.replace(arch, family=phase["family"])
    if "offload" in phase:  # which no config accepts without a GPU
        offload_without_a_gpu()
        keys = checked.learner.model_copy(update={"optimizer_offload": phase["offload"]})
        checked = checked.model_copy(update={"learner": keys})
    if phase.get("layers") == "engine":
        use_engine_layers()
    elif phase.get("layers") == "old":  # version 0.1.0's, which knew no extra states of norms
        layers.SeparateRMSNorm = layers.RMSNorm
    learner = MegatronLearner(checked, arch, placement)
    act = train_and_save if "save" in phase else resume
    result = act(learner, job, phase, path.parent / phase["name"])
    (path.parent / f"{phase['name']}-rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def main() -> int:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    for phase in job["phases"]:
        act = partial(run_rank, job=job, phase=phase, path=path)
        if not run_ranks(phase["learner"]["ranks"], path.parent, phase["name"], act):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
