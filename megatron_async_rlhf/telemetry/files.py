"""Names inside a run directory: one place, because every process writes or reads some of them; how they are read and replaced."""

import json
import os
from pathlib import Path
from typing import Any

RESOLVED_CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
WARM_START = "warm_start.jsonl"
SAMPLES = "samples.jsonl"
EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"
TRACE = "trace.json"
WANDB_ID = "wandb_id"
STOP = "stop"  # whoever makes it asks the run to save and end
LOG_DIR = "logs"
PROCESSES = "logs/processes.json"  # name -> process id
POLICY_TEMPLATE_DIR = "model"  # Hugging Face config and tokenizer of the policy, without weights
CHECKPOINT_DIR = "checkpoints"
REFERENCE_DIR = "checkpoints/reference"  # the reference policy's weights, unless they can be read from model.hf
RUN_STATE = "run_state.msgpack"  # in a checkpoint: the controller's part
EXPORT_DIR = "checkpoints/final"  # the finished policy as a Hugging Face directory
ROLLOUT_DIR = "rollouts"  # what was trained on, with schedule.record
FAILED_BATCH = "non_finite_batch.json"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a `.jsonl` file; none if it is not there. Who wrote it may have been killed in the middle of one."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def replace_file(path: Path, text: str) -> None:
    """In one step, so that a reader, or a crash, never meets half of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
