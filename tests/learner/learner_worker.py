"""The learner ranks of the tests: drive `MegatronLearner` as told by a JSON file and write down what happened.

Run as `learner_worker.py <job.json>`. Results go beside the job: `rank<r>.json` and `ranks-rank<r>.log` from every
rank, weights and logits once.
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from forked_ranks import run_ranks
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from msgspec import structs

from megatron_async_rlhf.algorithms.supervised import supervised_loss
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import LearnerError
from megatron_async_rlhf.formats.digest import digest
from megatron_async_rlhf.learner.megatron.layers.output import output_matrix
from megatron_async_rlhf.learner.megatron.learner import MegatronLearner
from megatron_async_rlhf.learner.megatron.parallel import Placement, join_learner
from megatron_async_rlhf.learner.megatron.training.batching import cut_micro_batches
from megatron_async_rlhf.learner.megatron.transfer.weights import named_parameters
from megatron_async_rlhf.learner.protocol import EvaluateSupervised, ExportWeights, Score, TrainRollout, TrainSupervised
from megatron_async_rlhf.learner.rollout import Rollout, Samples
from megatron_async_rlhf.models.architecture import architecture_of, architecture_of_hf
from megatron_async_rlhf.types import Sequence, StepMetrics, TrainingGroup


def make_learner(job: dict, model: dict, placement: Placement) -> MegatronLearner:
    changed = {name: job["config"][name] | keys for name, keys in model.get("config", {}).items()}
    config = RunConfig.model_validate(job["config"] | {"model": model["section"]} | changed)
    hf = config.model.hf
    arch = architecture_of_hf(hf) if hf else architecture_of(config.model, model["vocab_size"])
    return MegatronLearner(config, arch, placement)


def sequences_of(rows: list) -> list[Sequence]:
    return [Sequence(token_ids=token_ids, prompt_length=prompt_length) for token_ids, prompt_length in rows]


def preferences(version: int, pairs: list[Sequence]) -> Rollout:
    """One mini-batch of chosen and rejected sequences, alternating."""
    groups = [
        TrainingGroup(sequences=pairs[i : i + 2], rewards=[1.0, 0.0], sampler_logprobs=[[], []])
        for i in range(0, len(pairs), 2)
    ]
    return Rollout.of(TrainRollout(version=version, mini_batches=[groups]))


def logits_of(learner: MegatronLearner, sequences: list[Sequence]) -> list[torch.Tensor]:
    """Raw logits of each sequence by itself, whole, on the last stage; none where ranks divide sequences."""
    if learner.placement.context_parallel > 1:
        return []

    def forward(batches, model):
        batch = next(batches)
        output = model(
            input_ids=batch.tokens_T.unsqueeze(0),
            position_ids=None,
            attention_mask=None,
            packed_seq_params=batch.packed,
        )
        if not model.post_process:
            return output, None
        logits = output @ output_matrix(model).t()
        return output, lambda hidden, non_loss_data: gather_from_tensor_model_parallel_region(logits)

    repeats = learner.placement.batch_multiple

    def run(sequence: Sequence) -> list[torch.Tensor]:
        # One more token, because the last one's logits are not computed otherwise.
        longer = Sequence(token_ids=[*sequence.token_ids, 0], prompt_length=1)
        everywhere = dataclasses.replace(learner.placement, data_rank=0, data_parallel=1)
        batch, *_ = cut_micro_batches(Samples.of_sequences([longer]), 1, 1, everywhere)
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([batch] * repeats) for _ in learner.chunks],
            model=learner.chunks,
            num_microbatches=repeats,
            seq_length=len(batch.tokens_T),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )

    with torch.no_grad():
        collected = [run(sequence) for sequence in sequences]
    return [
        logits[0][0, : len(sequence.token_ids), : learner.arch.vocab_size]
        for logits, sequence in zip(collected, sequences, strict=True)
        if logits
    ]


def gradients_of(learner: MegatronLearner, sequences: list[Sequence]) -> dict[str, torch.Tensor]:
    """Of the supervised loss, reduced over data-parallel ranks; changes nothing."""
    count = sum(len(sequence.token_ids) - sequence.prompt_length for sequence in sequences)

    def loss(batch, logprobs_T):
        return supervised_loss(logprobs_T, batch.mask_T, num_tokens=count)

    learner.policy.accumulate(learner._supervised_passes, learner._cut(Samples.of_sequences(sequences)), loss)
    return {name: parameter.main_grad.clone() for name, parameter in named_parameters(learner.chunks).items()}


def digests_of(learner: MegatronLearner) -> dict[str, str]:
    """Of this rank's own shards. Collective: they may have to be gathered first."""
    learner.gather_parameters()
    return {name: digest(parameter).hex() for name, parameter in named_parameters(learner.chunks).items()}


def count_runs(learner: MegatronLearner) -> Counter:
    """From now on, how often the parts of this rank's first layer run."""
    runs = Counter()
    layer = learner.chunks[0].decoder.layers[0]
    for name, part in (("attention", layer.self_attention.core_attention), ("mlp", layer.mlp)):
        part.register_forward_hook(lambda *_, name=name: runs.update([name]))
    return runs


def counted(metrics: StepMetrics) -> dict[str, float]:
    """Without what was measured with a clock, which differs from rank to rank."""
    measured = ("time/", "tokens_per_s", "model_flops_utilisation")
    return {name: value for name, value in metrics.values.items() if not name.startswith(measured)}


def error_of(act, *args) -> dict | None:
    try:
        act(*args)
    except LearnerError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return None


def train(learner: MegatronLearner, job: dict, directory: Path) -> dict:
    """Scores, three supervised steps, RL with an empty step first, and every refusal on the way."""
    sequences = sequences_of(job["sequences"])
    result = {"logprobs": learner.score(Score(sequences=sequences)).logprobs}
    logits = logits_of(learner, sequences)
    if learner.placement.reports_loss and learner.placement.data_rank == 0:
        torch.save(logits, directory / "logits.pt")
    learner.export_weights(ExportWeights(directory=str(directory / "initial")))
    torch.save(gradients_of(learner, sequences), directory / f"gradients{learner.placement.rank}.pt")
    interrupted = [
        structs.replace(sequence, ignored=[(sequence.prompt_length + 1, len(sequence.token_ids) - 1)])
        for sequence in sequences
        if len(sequence.token_ids) - sequence.prompt_length > 2
    ]
    result["evaluated"] = learner.evaluate_supervised(EvaluateSupervised(sequences=interrupted)).metrics.values
    runs = count_runs(learner)
    result["supervised"] = [
        counted(learner.train_supervised(TrainSupervised(step=step, sequences=sequences)).metrics)
        for step in range(job["supervised_steps"])
    ]
    micro_batches = len(learner._cut(Samples.of_sequences(sequences))) * job["supervised_steps"]
    result["runs"] = {part: number / micro_batches for part, number in runs.items()}
    learner.export_weights(ExportWeights(directory=str(directory / "warm")))

    pair_lists = [sequences_of(rows) for rows in job["pairs"]]
    too_early = preferences(0, pair_lists[0])
    result["too early"] = error_of(learner.train_rollout, too_early)
    learner.start_reinforcement()
    before = digests_of(learner)
    result["empty"] = learner.train_rollout(preferences(0, [])).steps[0].values
    result["version after empty"] = learner.version
    result["wrong version"] = error_of(learner.train_rollout, too_early)
    result["version after wrong version"] = learner.version
    result["changed by an empty and a refused step"] = before != digests_of(learner)
    answers = [learner.train_rollout(preferences(version, pairs)) for version, pairs in enumerate(pair_lists, start=1)]
    result["preferences"] = [counted(answer.steps[0]) for answer in answers]
    result["measured"] = answers[0].steps[0].values
    result["span names"] = sorted(span.name for span in answers[0].spans)
    result["preference logprobs"] = [answer.logprobs for answer in answers]
    result["version"] = learner.version
    result["digests"] = digests_of(learner)
    result["adam state"] = sum(state["exp_avg"].numel() for _, state in learner.policy.optimizer.state.items())
    learner.export_weights(ExportWeights(directory=str(directory / "final")))
    return result


def train_long(learner: MegatronLearner, job: dict) -> list[dict[str, float]]:
    """RL from the initial weights; every step's metrics."""
    learner.start_reinforcement()
    return [
        counted(learner.train_rollout(preferences(version, sequences_of(rows))).steps[0])
        for version, rows in enumerate(job["long run"])
    ]


def blow_up(learner: MegatronLearner, job: dict) -> dict:
    """An absurd learning rate makes the first step's weights useless; the second step must refuse to use them."""
    sequences = sequences_of(job["sequences"])
    learner.train_supervised(TrainSupervised(step=1, sequences=sequences))
    before = digests_of(learner)
    result = {"supervised": error_of(learner.train_supervised, TrainSupervised(step=2, sequences=sequences))}
    learner.start_reinforcement()
    pairs = sequences_of(job["pairs"][0])
    result["preferences"] = error_of(learner.train_rollout, preferences(0, pairs))
    result["version"] = learner.version
    result["changed"] = before != digests_of(learner)
    return result


def run_rank(rank: int, path: Path, job: dict) -> None:
    config = RunConfig.model_validate(job["config"] | {"model": job["models"]["plain"]["section"]})
    placement = join_learner(config.learner, config.run.device)
    results = {}
    for name, model in job["models"].items():
        directory = path.parent / name
        directory.mkdir(exist_ok=True)
        results[name] = train(make_learner(job, model, placement), job, directory)
    sections = {"learner": job["long run config"], "schedule": {"steps": len(job["long run"])}}
    results["long run"] = train_long(make_learner(job, job["models"]["plain"] | {"config": sections}, placement), job)
    absurd = {"learning_rate": 1e30, "clip_grad": 0.0}
    sections = {"warm_start": absurd, "learner": absurd}
    results["blow up"] = blow_up(make_learner(job, job["models"]["plain"] | {"config": sections}, placement), job)
    (path.parent / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def main() -> int:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    return not run_ranks(
        job["config"]["learner"]["ranks"], path.parent, "ranks", lambda rank: run_rank(rank, path, job)
    )


if __name__ == "__main__":
    sys.exit(main())
