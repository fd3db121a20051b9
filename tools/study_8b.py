"""The paper's run with LLaMA 3.1 8B, simulated: its split, better ones, other workloads, and more GPUs. Nothing here is measured.

    .venv/bin/python tools/study_8b.py --json docs/results/simulated_8b.json

1. The paper's split (arXiv 2410.18252, table 1): one of eight H100s generates, seven train with ZeRO-3 and one sequence at a time,
   synchronous and asynchronous. The learner's time is arithmetic on `Zero3`; the generator's is what the planner has for every run,
   and once more both with what this project's learner and vLLM reached on one H200.
2. What this project's planner takes for the same eight GPUs and the same work, one of them for the reward model.
3. More completions of a prompt (K) and more updates on a rollout (T), on the planned split: bound by generation, or by training.
4. 8 to 1,024 GPUs with a batch that grows as they do: the best asynchronous plan beside the best synchronous one.

All of it is steps of a run under way. Prints the tables of docs/studies.md.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import Struct
from msgspec.structs import asdict, replace

from megatron_async_rlhf.config.load import check_tree
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.devices import DEVICES
from megatron_async_rlhf.estimate.machines import Machine, machine_of
from megatron_async_rlhf.estimate.speed import Speed
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.flops import token_flops
from megatron_async_rlhf.plan.analytic import Workload
from megatron_async_rlhf.plan.report import to_json
from megatron_async_rlhf.plan.search import KINDS, find_plans
from megatron_async_rlhf.simulate.prediction import SIGMA, estimated_scenario, predict, shape_of, sized

EXAMPLES = Path(__file__).parents[1] / "examples"
PAPER_SAVING = 1 - 142 / 230  # table 1, "compute time" without a unit
SCALES = (8, 16, 32, 64, 128, 256, 512, 1024)


class Zero3(Struct, frozen=True, kw_only=True):
    """What the paper's learner is taken to do, from its published code (open-instruct, `online_dpo_vllm_thread.py`).

    Attributes:
        ranks: GPUs that train.
        prompts: of a step; of each, two completions.
        prompt_tokens, completion_tokens: on average: an assumption, and the paper's table 1.
        max_new_tokens: of a completion.
        passes: forward passes of models as large as the policy on each completion before it is trained: policy, reference and
            reward model; each holds its weights divided over all ranks.
    """

    ranks: int = 7
    prompts: int = 112
    prompt_tokens: float = 150.0
    completion_tokens: float = 286.0
    max_new_tokens: int = 1024
    passes: int = 3

    def step_s(self, arch: Architecture, machine: Machine) -> float:
        """Of one sequence at a time the longer of computing it and gathering the weights for it: both happen at once."""
        length = self.prompt_tokens + self.completion_tokens
        gather_s = 2 * arch.num_parameters * (self.ranks - 1) / self.ranks / machine.link
        forward_s = length * token_flops(arch, length / 2) / machine.learner
        sequences = 2 * self.prompts / self.ranks
        before = sequences * self.passes * max(forward_s, gather_s)
        # A pair is one micro-batch: forward, forward again and backward; weights are gathered for each, gradients sent once.
        return before + sequences / 2 * max(2 * 4 * forward_s, 4 * gather_s)


def reached_on_gpu(config: RunConfig) -> Machine:
    """The shares of peak and bandwidth that were measured with the shape of the 8B, docs/gpu_results.md: training 52 %,
    prompts 67 %, and decoding steps that are 75 % of the bandwidth, 0.5 ms, and 20 microseconds a sequence beside its cache."""
    device = DEVICES[config.launch.gpu]
    peak, bandwidth = device.flops["bf16"], device.bandwidth
    return dataclasses.replace(
        machine_of(config), learner=0.52 * peak, prefill=0.67 * peak, bandwidth=0.75 * bandwidth, step_s=0.0005
    )


def paper_split(inputs: Zero3, machine: Callable[[RunConfig], Machine] = machine_of) -> dict[str, Any]:
    config = _task(inputs.prompts, inputs.ranks, inputs.max_new_tokens)
    arch = shape_of(config)
    lengths = (inputs.prompt_tokens, inputs.completion_tokens)
    scenario, speed = estimated_scenario(config, arch, lengths, machine=machine(config))
    step_s = inputs.step_s(arch, speed.machine)
    speeds = replace(scenario.speeds, train_s=step_s, train_token_s=0.0)
    prediction = predict(sized(config), replace(scenario, speeds=speeds))
    turns = prediction.synchronous
    return {
        "inputs": asdict(inputs) | _machine_inputs(speed),
        "train_seconds": step_s,
        "generate_seconds": turns.totals.generate_busy_s / turns.totals.steps,
        "sync_seconds": turns.step_s,
        "async_seconds": prediction.schedule.step_s,
        "saving": 1 - prediction.schedule.step_s / turns.step_s,
        "published_saving": PAPER_SAVING,
    }


def _machine_inputs(speed: Speed) -> dict[str, float]:
    """Of a rank and of the one generator, as the planner has them."""
    return {
        "learner_flops_per_s": speed.machine.learner,
        "link_bytes_per_s": speed.machine.link,
        "decode_fixed_ms": 1000 * speed.token_s,
        "decode_sequence_ms": 1000 * speed.sequence_s,
        "push_seconds": speed.push_s,
        "length_sigma": SIGMA,
    }


def planned(gpus: int, prompts: int, inputs: Zero3, **algorithm: Any) -> dict[str, Any]:
    """The best plan of each schedule, and what asynchronous ones save."""
    config = _task(prompts, 1, inputs.max_new_tokens, nodes=gpus // 8, served=True, **algorithm)
    began = time.monotonic()
    workload = Workload(lengths=(inputs.prompt_tokens, inputs.completion_tokens))
    plans = find_plans(config, shape_of(config), best=1, workload=workload)
    rows = {plan.kind: to_json(plan) for plan in plans}
    sync = rows["sync"]["step_seconds"]
    return {
        "gpus": gpus,
        "prompts": prompts,
        **algorithm,
        "planning_seconds": time.monotonic() - began,
        "plans": rows,
        # Beside the best that taking turns can do, which may be another split.
        "saving": {kind: 1 - row["step_seconds"] / sync for kind, row in rows.items() if kind != "sync"},
    }


def _task(
    prompts: int,
    ranks: int,
    max_new_tokens: int,
    *,
    nodes: int = 1,
    samples: int = 2,
    epochs: int = 1,
    served: bool = False,
) -> RunConfig:
    """
    Args:
        served: the reward model has a GPU of each machine; otherwise the learner's passes are all there is of it.
    """
    tree: dict[str, Any] = {
        "run": {"device": "cuda"},
        "model": {"hf": str(EXAMPLES / "llama8b"), "context_length": 512 + max_new_tokens},
        "weights": {"transport": "nccl"},
        "learner": {"precision": "bf16", "ranks": ranks, "micro_batch_tokens": 4096, "recompute": "full"},
        "generator": {"dtype": "bfloat16", "max_new_tokens": max_new_tokens, "max_concurrent": 256},
        "algorithm": {"type": "online_dpo", "samples_per_prompt": samples, "beta": 0.03},
        "schedule": {"prompts_per_step": prompts, "steps": 448, "epochs": epochs, "max_staleness": epochs},
        "launch": {"nodes": nodes, "gpus_per_node": 8, "gpu": "h100", "memory_check": False},
    }
    if served:
        tree["reward"] = {
            "type": "reward_model",
            "model": str(EXAMPLES / "llama8b_reward_model"),
            "dtype": "bfloat16",
            "context_length": 2048,
            "replicas": nodes,
        }
    return check_tree(tree)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    inputs = Zero3()
    paper, reached = paper_split(inputs), paper_split(inputs, reached_on_gpu)
    for speeds, found in (("as assumed", paper), ("as reached on an H200", reached)):
        print(
            f"7 + 1, {speeds}: training {found['train_seconds']:.1f} s, generation {found['generate_seconds']:.1f} s, in turns "
            f"{found['sync_seconds']:.1f} s, asynchronous {found['async_seconds']:.1f} s: {found['saving']:.0%} less "
            f"(published {PAPER_SAVING:.0%})"
        )
    workloads = [
        planned(8, inputs.prompts, inputs, samples=samples, epochs=epochs)
        for samples, epochs in ((2, 1), (4, 1), (8, 1), (2, 2), (2, 4))
    ]
    scales = [planned(gpus, inputs.prompts * gpus // 8, inputs) for gpus in SCALES]
    print_table(("K", "T"), [((row["samples"], row["epochs"]), row) for row in workloads])
    print_table(("GPUs", "prompts"), [((row["gpus"], row["prompts"]), row) for row in scales])
    if json_file:
        content = {"paper": paper, "paper_as_reached": reached, "workloads": workloads, "scales": scales}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def print_table(names: tuple[str, str], rows: list[tuple[tuple[int, int], dict[str, Any]]]) -> None:
    """In Markdown: what a row varies, and its best plans."""
    head = [
        *names,
        *(cell for kind in KINDS for cell in (kind.replace("_", " "), "step")),
        "one step saves",
        "bounded saves",
    ]
    print(f"\n| {' | '.join(head)} |\n| {' | '.join('---' for _ in head)} |")
    for varied, row in rows:
        cells = [f"{number:,}" for number in varied]
        for kind in KINDS:
            plan = row["plans"][kind]
            gpus = plan["devices"]
            cells += [
                f"{gpus['learner']} + {gpus['generators']} + {gpus['reward_models']}",
                f"{plan['step_seconds']:.2f} s",
            ]
        cells += [f"{row['saving'][kind]:.0%}" for kind in ("one_step", "bounded")]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
