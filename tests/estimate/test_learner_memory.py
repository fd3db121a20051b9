"""The estimated peak of a learner rank against the measured one, in every kind of layout a CPU can have.

Measured is the growth of the resident set over that of the same rank when it had trained a tiny model
(`measured_rank.py`); estimated is the total without the fixed part, and without the staging of a push, as none happens.
Freed memory is handed back at once (MALLOC_MMAP_THRESHOLD_): glibc would keep holes of tensors below 32 MiB, which
large models do not have much of, and small ones like these up to 40 %.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.holdings import learner_holdings
from megatron_async_rlhf.estimate.learner_memory import LOGITS_BLOCK, LearnerMemory, learner_memory
from megatron_async_rlhf.estimate.report import ACCURACY
from megatron_async_rlhf.estimate.save_memory import save_memory
from megatron_async_rlhf.models.architecture import Architecture, architecture_of
from megatron_async_rlhf.models.layout import LearnerLayout

pytestmark = pytest.mark.timeout(600)  # the first test waits for all ranks of all cases

MODEL = {"layers": 4, "hidden_size": 512, "ffn_size": 1408, "heads": 8, "kv_heads": 4, "context_length": 128}
VOCAB_SIZE = 8192
CASES = {
    "one rank": {},
    "tensor parallel": {"ranks": 2, "tensor_parallel": 2},
    "sequence parallel": {"ranks": 2, "tensor_parallel": 2, "sequence_parallel": True},
    "pipeline": {"ranks": 2, "pipeline_parallel": 2},
    "interleaved pipeline": {"ranks": 2, "pipeline_parallel": 2, "virtual_stages": 2},
    "context parallel": {"ranks": 2, "context_parallel": 2},
    "bf16": {"precision": "bf16"},
    "swapped reference": {"reference": "swapped"},
    "distributed optimizer": {"ranks": 2, "distributed_optimizer": True},
    "distributed optimizer, bf16": {"ranks": 2, "distributed_optimizer": True, "precision": "bf16"},
    "recompute, long rows": {"recompute": "full", "micro_batch_tokens": 4096},
}
# Their parts are in other cases too.
REPEATING = (
    (
        *("tensor parallel", "pipeline", "interleaved pipeline", "bf16", "context parallel", "swapped reference"),
        "distributed optimizer, bf16",
    )
    if os.environ.get("ASYNC_RLHF_TEST_THOROUGH") != "1"
    else ()
)
MEASURED = [case for case in CASES if case not in REPEATING]
SAVED = [case for case in MEASURED if case in ("one rank", "bf16") or case.startswith("distributed optimizer")]


def config_of(case: str) -> RunConfig:
    learner = {"ranks": 1, "micro_batch_tokens": 1024, "timeout_s": 120} | CASES[case]
    return RunConfig.model_validate(
        {
            "model": MODEL,
            "learner": learner,
            "weights": {"timeout_s": 60},
            "generator": {"max_new_tokens": 32},
            # One micro-batch of pairs for each data-parallel rank; two for a pipeline.
            "schedule": {"prompts_per_step": learner["micro_batch_tokens"] // 256 * learner["ranks"]},
        }
    )


def architecture(config: RunConfig) -> Architecture:
    return architecture_of(config.model, VOCAB_SIZE)


def estimated(case: str) -> list[LearnerMemory]:
    config = config_of(case)
    return learner_memory(config, architecture(config))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Of each case what every rank wrote down."""
    directory = tmp_path_factory.mktemp("peaks")
    jobs = [
        {
            "name": name, "vocab_size": VOCAB_SIZE, "save": name in SAVED,
            "config": config_of(name).model_dump(mode="json", exclude_unset=True),
        }
        for name in MEASURED
    ]  # fmt: skip
    (directory / "job.json").write_text(json.dumps(jobs))
    here = Path(__file__).parent
    program = str(here / "measured_rank.py")
    ranks = {"PYTHONPATH": os.pathsep.join([str(here.with_name("learner")), *sys.path])}
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    result = subprocess.run(
        [sys.executable, program, str(directory / "job.json")],
        env=os.environ | ranks | settings,
        capture_output=True,
        text=True,
        timeout=500,
    )
    logs = "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(directory.glob("*.log")))
    assert result.returncode == 0, f"{result.stderr}\n{logs}"
    return {
        name: [
            json.loads((directory / f"{name}.{rank}.json").read_text())
            for rank in range(config_of(name).learner.world_size)
        ]
        for name in MEASURED
    }


def stage_of(case: str, rank: int) -> int:
    learner = config_of(case).learner
    return rank // (learner.world_size // learner.pipeline_parallel)


@pytest.mark.slow
@pytest.mark.parametrize("case", MEASURED)
def test_estimated_peak(measured: dict[str, list[dict]], case: str):
    stages = estimated(case)
    ratios = {}
    for rank, figures in enumerate(measured[case]):
        memory = stages[stage_of(case, rank)]
        ratios[rank] = (memory.total - memory.fixed - memory.push) / figures["peak"]
    print(case, {rank: round(ratio, 3) for rank, ratio in ratios.items()})
    assert all(1 - ACCURACY < ratio < 1 + ACCURACY for ratio in ratios.values()), ratios


@pytest.mark.slow
@pytest.mark.parametrize("case", MEASURED)
def test_weights_are_exact(measured: dict[str, list[dict]], case: str):
    for rank, figures in enumerate(measured[case]):
        assert estimated(case)[stage_of(case, rank)].weights == figures["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("case", SAVED)
def test_estimated_copy_of_a_save(measured: dict[str, list[dict]], case: str):
    """Only one of the ranks that hold the same weights keeps one; the other sends it what it has."""
    config = config_of(case)
    (estimate,) = save_memory(config, architecture(config))
    writer, *others = [figures["save"] for figures in measured[case]]
    print(case, round(estimate / writer, 3), [round(other / writer, 3) for other in others])
    assert estimate == pytest.approx(writer, rel=ACCURACY)
    assert all(other < 0.25 * writer for other in others)


@pytest.mark.slow
def test_the_measure_sees_what_a_case_saves(measured: dict[str, list[dict]]):
    """Else it could be some size that all cases have."""
    whole, shared = measured["one rank"][0], measured["distributed optimizer"][0]
    moments = 8 * whole["weights"] // 4
    assert whole["peak"] - shared["peak"] == pytest.approx(moments / 2, rel=0.2)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_the_model_and_the_copy_of_a_tied_embedding(tied: bool):
    arch = dataclasses.replace(architecture(config_of("one rank")), tie_embeddings=tied)
    for stages, virtual_stages in ((1, 1), (2, 1), (2, 2), (4, 1)):
        layout = LearnerLayout(pipeline_parallel=stages, virtual_stages=virtual_stages)
        copies = arch.vocab_size * arch.hidden_size if tied and stages > 1 else 0
        assert sum(held.total for held in learner_holdings(arch, layout)) == arch.num_parameters + copies


def test_a_padded_vocabulary_is_held():
    arch = dataclasses.replace(architecture(config_of("one rank")), vocab_size=8191)
    (held,) = learner_holdings(arch, LearnerLayout(tensor_parallel=2))
    (even,) = learner_holdings(dataclasses.replace(arch, vocab_size=8192), LearnerLayout(tensor_parallel=2))
    assert held == even


def test_what_is_saved_is_the_model_once():
    """However it is divided: not a stage's copy of tied embeddings, not what the ranks of a data-parallel group share."""
    tied = dataclasses.replace(architecture(config_of("one rank")), tie_embeddings=True)
    whole = save_memory(config_of("one rank"), tied)
    assert whole == [16 * tied.num_parameters]  # weights, two moments, and the reference, in float32
    assert sum(save_memory(config_of("pipeline"), tied)) == sum(whole)
    assert save_memory(config_of("distributed optimizer"), tied) == whole


def with_algorithm(algorithm: dict, learner: dict | None = None) -> LearnerMemory:
    tree = config_of("one rank").model_dump(mode="json", exclude_unset=True)
    config = RunConfig.model_validate(tree | {"algorithm": algorithm, "learner": tree["learner"] | (learner or {})})
    (memory,) = learner_memory(config, architecture(config))
    return memory


@pytest.mark.parametrize("reference", ["resident", "swapped"])
def test_without_a_reference_none_is_held(reference: str):
    keys = {"reference": reference}
    with_kl = with_algorithm({"type": "rloo"}, keys)
    copies = 1 if reference == "resident" else 2
    assert with_kl.reference == copies * with_kl.weights
    assert with_algorithm({"type": "rloo", "kl": {"coefficient": 0}}, keys).reference == 0
    assert with_algorithm({"type": "best_of_n"}).reference == 0


def test_a_value_model_is_a_policy_without_its_output_matrix():
    memory, arch = with_algorithm({"type": "ppo"}), architecture(config_of("one rank"))
    numbers = arch.num_parameters - arch.vocab_size * arch.hidden_size + arch.hidden_size
    assert memory.value == (4 + 4 + 8) * numbers  # weights, gradients, two moments
    assert with_algorithm({"type": "grpo"}).value == 0
    two, without = ({"type": name, "samples_per_prompt": 2} for name in ("ppo", "rloo"))
    assert with_algorithm(two).total == with_algorithm(without).total + memory.value


def test_a_block_of_logits_is_the_learners():
    from megatron_async_rlhf.learner.megatron.layers.logprobs import _BLOCK_ELEMENTS

    assert LOGITS_BLOCK == _BLOCK_ELEMENTS
