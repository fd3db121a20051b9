"""Compares predicted step times with published ones, row by row, as docs/plan.md shows it.

    .venv/bin/python tools/validate_plan.py

The rows are in docs/results/published_steps.json: GRPO, with a KL term unless `kl` says otherwise, as far as their sources tell; step
times of `alternating` rows are training and generation on all GPUs in turn, those of `async` rows the longer of the two, with
weights updated in flight.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.load import check_tree
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.plan.analytic import StepTimes, Workload, step_times

ROWS = Path(__file__).parents[1] / "docs" / "results" / "published_steps.json"


def predicted(row: dict[str, Any], shapes: dict[str, Any]) -> tuple[float, StepTimes]:
    """Seconds of a rollout with all its updates, and the times of an update."""
    arch = Architecture(
        **shapes[row["model"]], context_length=row["limit"], rope_theta=5e5, norm_eps=1e-5, tie_embeddings=False
    )
    times, _ = step_times(_config(row), arch, Workload(lengths=(row["prompt_tokens"], row["completion_tokens"])))
    one = times.bounded if row["schedule"] == "async" else times.in_turns
    return row["updates"] * one, times


def _config(row: dict[str, Any]) -> RunConfig:
    updates, learner = row["updates"], row["learner_gpus"]
    gpus = learner + row["generator_gpus"]
    with tempfile.TemporaryDirectory() as nothing:
        return check_tree(
            {
                "run": {"device": "cuda"},
                "model": {"hf": nothing},
                "weights": {"transport": "nccl"},
                "learner": {
                    "precision": "bf16",
                    "tensor_parallel": row["tensor_parallel"],
                    "pipeline_parallel": row["pipeline_parallel"],
                    "ranks": learner,
                    "sequence_parallel": row["tensor_parallel"] > 1,
                    "distributed_optimizer": True,
                    "overlap_grad_reduce": True,
                    "micro_batch_tokens": 2 * row["limit"],
                    "recompute": row.get("recompute", "none"),
                },
                "generator": {
                    "dtype": "bfloat16",
                    "tensor_parallel": row["generator_tensor_parallel"],
                    "replicas": row["generator_gpus"] // row["generator_tensor_parallel"],
                    "max_concurrent": 256,
                    "max_new_tokens": row["limit"] - round(row["prompt_tokens"]),
                },
                "algorithm": {
                    "type": "grpo",
                    "samples_per_prompt": row["samples_per_prompt"],
                    "kl": {"place": "loss", "coefficient": 0.01 if row.get("kl", True) else 0.0},
                },
                "schedule": {
                    "mode": "async",
                    "generation": "streaming",
                    "in_flight_updates": "keep",
                    "steps": updates,
                    "mini_batches": updates,
                    "max_staleness": updates,
                    "prompts_per_step": row["samples"] // row["samples_per_prompt"] // updates,
                },
                "launch": {"nodes": -(-gpus // 8), "gpus_per_node": 8, "gpu": row["gpu"]},
            }
        )


def main() -> None:
    content = json.loads(ROWS.read_text(encoding="utf-8"))
    print("| system | model | GPUs | schedule | tokens | published | predicted | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in content["rows"]:
        seconds, _ = predicted(row, content["shapes"])
        shared = row["schedule"] == "alternating"
        gpus = f"{row['learner_gpus']}" if shared else f"{row['learner_gpus']} + {row['generator_gpus']}"
        print(
            f"| {row['system']} | {row['model']} | {gpus} | {row['schedule']} | {row['completion_tokens']} | "
            f"{row['step_seconds']:g} s | {seconds:.0f} s | {seconds / row['step_seconds'] - 1:+.0%} |"
        )


if __name__ == "__main__":
    main()
