"""Real Megatron ranks that load and save checkpoints with `dist_checkpointing`, as told by a JSON file.

Run as `megatron_ranks.py <job.json>`. Each layout's ranks are forked, because importing Megatron takes longer than all
they do. Nothing heavy is imported at the top: Megatron's writer starts helpers that import this file again.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

from megatron_async_rlhf.launch.nodes import free_ports


def load(job: dict, arch, placement, learner) -> tuple[object, list[str]]:
    """The model as `dist_checkpointing.load` fills it, and its parameters that are not what they should be."""
    import torch
    from megatron.core import dist_checkpointing
    from safetensors.torch import load_file

    from megatron_async_rlhf.formats.open_weights import open_weights
    from megatron_async_rlhf.learner.megatron.model import build_model
    from megatron_async_rlhf.learner.megatron.transfer.weights import load_weights

    [model], [expected] = (build_model(arch, placement, learner) for _ in range(2))
    state = dist_checkpointing.load(model.sharded_state_dict(), job["checkpoint"])
    model.load_state_dict(state)
    tensors = load_file(Path(job["hf"]) / "model.safetensors")
    load_weights([expected], arch, placement, open_weights(Path(job["hf"])))
    right = dict(expected.named_parameters())

    def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
        return not torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))

    wrong = [name for name, parameter in model.named_parameters() if differ(parameter, right[name])]
    for directory in job["readable"]:  # what `model.hf` may name
        reader = open_weights(Path(directory))
        for name, tensor in tensors.items():
            matrix = torch.empty(reader.tensors[name].matrix)
            reader.read_into(matrix, name, 0, 0)
            wrong += [f"{directory}: {name}"] if differ(matrix.view(tensor.shape), tensor) else []
    return model, wrong


def run_rank(rank: int, layout: dict, directory: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(layout["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(layout["port"])}
    log = os.open(directory / f"{layout['name']}-rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch
    from megatron.core import dist_checkpointing

    from megatron_async_rlhf.config.sections import LearnerSection
    from megatron_async_rlhf.learner.megatron.parallel import join_learner
    from megatron_async_rlhf.models.architecture import architecture_of_hf

    sizes = {"tensor_parallel": layout["tensor"], "pipeline_parallel": layout["pipeline"], "ranks": layout["ranks"]}
    learner = LearnerSection(learning_rate=1e-3, timeout_s=60, **sizes)
    placement = join_learner(learner, "cpu")
    result = {}
    for job in layout["jobs"]:
        model, wrong = load(job, architecture_of_hf(Path(job["hf"])), placement, learner)
        result[job["name"]] = {"parameters": len(list(model.parameters())), "wrong": wrong}
        for path, metadata in job["save"].items():
            Path(path).mkdir(parents=True, exist_ok=True)
            torch.distributed.barrier()
            dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), path)
    (directory / f"{layout['name']}-rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def run_layout(layout: dict, directory: Path) -> None:
    (layout["port"],) = free_ports(1)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, layout, directory)) for rank in range(layout["ranks"])]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(90)
    failed = [number for number, rank in enumerate(ranks) if rank.exitcode]
    for rank in ranks:
        rank.kill()
    if failed:
        sys.exit(f"{layout['name']}: ranks {failed} failed")


def main() -> None:
    import megatron_async_rlhf.learner.megatron.model  # noqa: F401  once, for all the ranks that are forked

    path = Path(sys.argv[1])
    for layout in json.loads(path.read_text()):
        run_layout(layout, path.parent)


if __name__ == "__main__":
    main()
