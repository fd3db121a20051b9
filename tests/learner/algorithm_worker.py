"""Learner ranks that train algorithms as told by a JSON file: `algorithm_worker.py <job.json>`.

The ranks of each layout of the job are forked from this process, one layout after the other. Each trains every case,
saves a checkpoint after the first rollout, and trains the rest once more from that, and once from the layout's before.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from checkpoint_worker import adam_digests, finish, save
from forked_ranks import run_ranks
from learner_worker import counted, digests_of, error_of, make_learner

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.formats.digest import digest
from megatron_async_rlhf.learner.megatron.learner import MegatronLearner
from megatron_async_rlhf.learner.megatron.parallel import Placement, join_learner
from megatron_async_rlhf.learner.megatron.transfer.weights import named_parameters
from megatron_async_rlhf.learner.protocol import ExportWeights, ResumeReinforcement, TrainRollout
from megatron_async_rlhf.learner.rollout import Rollout
from megatron_async_rlhf.types import Sequence, TrainingGroup


def group_of(group: dict) -> TrainingGroup:
    sequences = [Sequence(token_ids=ids, prompt_length=prompt) for ids, prompt in group["sequences"]]
    return TrainingGroup(sequences=sequences, rewards=group["rewards"], sampler_logprobs=group["sampler"])


def command_of(learner: MegatronLearner, rollout: list, epochs: int) -> Rollout:
    mini_batches = [[group_of(group) for group in groups] for groups in rollout]
    return Rollout.of(TrainRollout(version=learner.version, mini_batches=mini_batches, epochs=epochs))


def train(learner: MegatronLearner, commands: list, result: dict) -> None:
    for rollout, epochs in commands:
        answer = learner.train_rollout(command_of(learner, rollout, epochs))
        result["steps"] += [counted(step) for step in answer.steps]
        result["names"] = sorted({*result["names"], *(name for step in answer.steps for name in step.values)})
        result["seconds"] += [sorted(name for name in step.values if "time/" in name) for step in answer.steps]
        result["logprobs"].append(answer.logprobs)
        result["spans"].append(sorted({span.name for span in answer.spans}))
        result["utilisation"] += [
            {key: step.values[key] for key in step.values if key.startswith(("model_flops", "time/", "tokens"))}
            for step in answer.steps
        ]


def value_digests(learner: MegatronLearner) -> dict[str, str]:
    model = learner.reinforcement.value_model
    if model is None:
        return {}
    model.gather_parameters()
    return {name: digest(parameter).hex() for name, parameter in named_parameters(model.chunks).items()}


def outcome(learner: MegatronLearner, result: dict) -> dict:
    value_model = learner.reinforcement.value_model
    models = [learner.policy] if value_model is None else [learner.policy, value_model]
    return result | {
        "version": learner.version,
        "numbers": [sum(p.numel() for chunk in model.chunks for p in chunk.parameters()) for model in models],
        "weights": digests_of(learner),
        "values": value_digests(learner),
        "adam": [adam_digests(model) for model in models],
        "rates": [[group["lr"] for group in model.optimizer.param_groups] for model in models],
    }


def empty() -> dict:
    return {"steps": [], "names": [], "seconds": [], "logprobs": [], "spans": [], "utilisation": []}


def run_case(job: dict, case: dict, placement: Placement, directory: Path, before: Path | None) -> dict:
    model = {"section": {"hf": job["policy"]}, "config": case["config"]}
    learner = make_learner(job, model, placement)
    learner.start_reinforcement()
    result, untouched = empty(), digests_of(learner)
    first, *rest = case["commands"]
    train(learner, [first], result)
    result["changed"] = untouched != digests_of(learner)
    if case["saved"]:
        save(learner, directory, snapshot=True, reference=False)
    train(learner, rest, result)
    if case["saved"]:
        finish(learner)
    through = {"through": outcome(learner, result)}
    if placement.rank == 0 and learner.reinforcement.value_model is not None and placement.is_last_stage:
        torch.save(
            {
                name: p.detach().clone()
                for name, p in named_parameters(learner.reinforcement.value_model.chunks).items()
            },
            directory / "values.pt",
        )
    learner.export_weights(ExportWeights(directory=str(directory)))
    for name, source in (("resumed", directory), ("from another layout", before)):
        if case["saved"] and source is not None:
            again, result = make_learner(job, model, placement), empty()
            again.resume_reinforcement(ResumeReinforcement(checkpoint=str(source / "checkpoint"), reference=None))
            train(again, rest, result)
            through[name] = outcome(again, result)
    return through


def refusals(job: dict, placement: Placement) -> dict:
    """A rollout without anything, without what the sampler said, and one whose first update ruins the value model."""
    case, result = job["cases"]["ppo"], {}
    absurd = {
        "algorithm": case["config"]["algorithm"] | {"value_learning_rate": 1e30},
        "learner": {"weight_decay": 0.0},  # which at such a rate would overflow to zeros
    }
    model = {"section": {"hf": job["policy"]}, "config": case["config"] | absurd}
    (rollout, _), *_ = case["commands"]
    one, two = make_learner(job, model, placement), make_learner(job, model, placement)
    for learner in (one, two):
        learner.start_reinforcement()
    result["nothing"] = [error_of(one.train_rollout, command_of(one, [], 1)), one.version]
    silent = [[group | {"sampler": [[] for _ in group["sampler"]]} for group in groups] for groups in rollout]
    result["sampler"] = [error_of(one.train_rollout, command_of(one, silent, 1)), one.version]
    one.train_rollout(command_of(one, rollout[:1], 1))
    result["value model"] = [error_of(two.train_rollout, command_of(two, rollout[:1], 2)), two.version]
    # The first of the two updates was made, of the second nothing.
    result["same"] = (digests_of(one), value_digests(one)) == (digests_of(two), value_digests(two))
    for name in ("raises_on_the_last_rank", "other_metrics"):
        result[name] = refused_loss(job, placement, name)
    return result


def refused_loss(job: dict, placement: Placement, name: str) -> dict | None:
    """Of a loss of one's own that fails on one rank only; the others must not wait for it."""
    case = job["cases"]["grpo_own_loss"]
    function = str(Path(__file__).with_name("own_losses.py")) + f":{name}"
    algorithm = case["config"]["algorithm"] | {"loss_function": function, "loss_kwargs": {}}
    each_alone = case["config"].get("learner", {}) | {"micro_batch_tokens": 1}
    config = case["config"] | {"algorithm": algorithm, "learner": each_alone}
    learner = make_learner(job, {"section": {"hf": job["policy"]}, "config": config}, placement)
    learner.start_reinforcement()
    (rollout, _), *_ = case["commands"]
    return error_of(learner.train_rollout, command_of(learner, rollout[:1], 1))


def run_rank(rank: int, job: dict, layout: dict, path: Path) -> None:
    job = job | {"config": job["config"] | {"learner": job["config"]["learner"] | layout["learner"]}}
    config = RunConfig.model_validate(job["config"] | {"model": {"hf": job["policy"]}})
    placement = join_learner(config.learner, "cpu")
    results = {}
    for name in layout["cases"]:
        directory = path.parent / layout["name"] / name
        directory.mkdir(parents=True, exist_ok=True)
        before = path.parent / layout["before"] / name if layout["before"] else None
        results[name] = run_case(job, job["cases"][name], placement, directory, before)
    results["refusals"] = refusals(job, placement)
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
