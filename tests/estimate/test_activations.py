"""What the estimate says a layer keeps, against what autograd is really given to keep; the schedules against Megatron's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.estimate.activations import LayerShare, chunks_in_flight, head_bytes, layer_bytes
from megatron_async_rlhf.launch.nodes import free_ports
from megatron_async_rlhf.models.architecture import Architecture

SHAPE = {
    "family": "llama", "vocab_size": 64, "layers": 1, "hidden_size": 48, "ffn_size": 100, "heads": 4, "kv_heads": 2,
    "head_dim": 12, "context_length": 64, "rope_theta": 1e4, "norm_eps": 1e-5, "tie_embeddings": False,
}  # fmt: skip
CASES = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "no groups": {"arch": {"kv_heads": 4}},
    "wide heads": {"arch": {"head_dim": 32, "kv_heads": 1}},
    "norms of queries and keys": {"arch": {"family": "qwen3"}},
    "norms of queries and keys, bf16": {"arch": {"family": "qwen3"}, "precision": "bf16"},
    "selective": {"recompute": "selective"},
    "selective, bf16": {"recompute": "selective", "precision": "bf16"},
    "full": {"recompute": "full"},
    "full, bf16": {"recompute": "full", "precision": "bf16"},
}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """Bytes per token of each case."""
    cases = [
        {"recompute": "none", "precision": "fp32"} | case | {"arch": SHAPE | case.get("arch", {})}
        for case in CASES.values()
    ]
    (port,) = free_ports(1)
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("saved_tensors.py")), json.dumps(cases)],
        env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return dict(zip(CASES, json.loads(result.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bytes_a_layer_keeps(measured: dict[str, dict[str, float]], name: str):
    case = CASES[name]
    learner = LearnerSection(precision=case.get("precision", "fp32"))
    share = LayerShare.of(Architecture(**SHAPE | case.get("arch", {})), learner)
    expected = layer_bytes(share, case.get("recompute", "none"))
    # Within a byte: the ends of the sequences, and nothing else, are not counted.
    assert measured[name]["layer"] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_bytes_the_last_stage_keeps(measured: dict[str, dict[str, float]], name: str):
    """The norm, and token ids (8 bytes each), which the estimate leaves out; the hidden states that the
    log-probabilities keep are not among them yet."""
    learner = LearnerSection(precision=CASES[name].get("precision", "fp32"))
    share = LayerShare.of(Architecture(**SHAPE), learner)
    assert measured[name]["rest"] - 8 == pytest.approx(head_bytes(share) - share.item * share.hidden, abs=1)


def test_ranks_divide_what_a_layer_keeps():
    arch = Architecture(**SHAPE | {"heads": 8, "kv_heads": 4, "ffn_size": 128, "hidden_size": 96})
    whole = LayerShare.of(arch, LearnerSection())
    divided = LayerShare.of(arch, LearnerSection(tensor_parallel=4, sequence_parallel=True))
    angles = whole.item * 4 * whole.head_dim  # every rank has all of them
    norms = 4 * 2  # 1/rms of every token a rank has; here counted as one
    assert 4 * (layer_bytes(divided, "none") - angles - norms) == layer_bytes(whole, "none") - angles - norms


@pytest.mark.parametrize("virtual_stages", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [4, 8, 12])
def test_micro_batches_in_flight(virtual_stages: int, micro_batches: int):
    """One more than Megatron's warm-up passes."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    stages = 4
    for stage in range(stages):
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: stages, rank=lambda: stage),  # noqa: B023
            virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
        )
        total, all_in_warmup, warmup, _ = get_pp_rank_microbatches(
            micro_batches, virtual_stages, stages, p2p_communicator=communicator
        )
        expected = total if all_in_warmup else warmup + 1
        assert chunks_in_flight(stage, stages, virtual_stages, micro_batches) == expected
