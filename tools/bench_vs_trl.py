"""Samples per second of this project beside TRL's trainers: one model, the same prompts, samples and cores, in turns.

    .venv/bin/python tools/bench_vs_trl.py --data path/to/gsm8k/train.jsonl

TRL is what most people start on one machine: `OnlineDPOTrainer`, or with `--algorithm grpo` its `GRPOTrainer`, generating with
Transformers, on all cores in turn. This project has the same number of cores, divided between learner and generator, up to two
steps off-policy (`async`) and on-policy (`sync`, same division). A step has as many prompts and completions in all three; the reward is a
hash of the text, so that no pair is a tie and every completion is trained on.

- natural: a 3.4 M-parameter Llama that was trained on the data's solutions first, and so ends its answers as they end;
- equal: the same model untrained, whose completions nearly all reach the limit.

`samples/s` leaves out the first steps (`--warm-up`); start-up is given apart. Ratios are medians over the repeats of a ratio to the
TRL run beside it.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, Literal

import typer

from megatron_async_rlhf.config.load import check_tree
from megatron_async_rlhf.jobs.inputs import load_run_inputs
from megatron_async_rlhf.launch.child_command import EXIT_COMPLETED, Commands
from megatron_async_rlhf.telemetry.files import METRICS, read_steps
from megatron_async_rlhf.telemetry.summary import read_summary

MODEL = {
    "layers": 6, "hidden_size": 192, "ffn_size": 576, "heads": 6, "kv_heads": 2, "context_length": 384, "init_std": 0.08,
    "tokenizer": "bpe", "vocab_size": 2048,
}  # fmt: skip
SFT_STEPS = 250
LIMITS = {"natural": 160, "equal": 96}
STALENESS = {"async": 2, "sync": 0}  # bounds in optimizer steps, by mode: the runs of this project
BETA, TEMPERATURE, LEARNING_RATE = 0.1, 1.0, 1e-6
Algorithm = Literal["online_dpo", "grpo"]


@dataclass(frozen=True)
class Options:
    """Of every run of this program."""

    data: str
    algorithm: Algorithm
    prompts: int
    samples: int
    steps: int
    warm_up: int
    cores: int


@dataclass(frozen=True)
class Speed:
    """Of one run; lengths in tokens, means over all completions."""

    samples_per_s: float
    startup_s: float
    length: float


def score(completions: Iterable[str]) -> list[float]:
    """From 0 to 1; of a text, always the same."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def make_model(options: Options, directory: Path, steps: int) -> Path:
    """A Hugging Face directory: the fresh model after `steps` of supervised training on the data."""
    tree = {
        "run": {"dir": str(directory)},
        "model": MODEL,
        "data": {key: value for key, value in _data(options).items() if key != "train_prompts"},
        "sft": {
            "steps": max(steps, 1),
            "batch_size": 16,
            "learning_rate": 1e-3 if steps else 1e-12,
            "warmup_steps": 10,
        },
        "learner": {"threads": options.cores},
    }
    _run("sft", tree, directory)
    return directory / "checkpoints/final"


def ours(options: Options, mode: str, model: Path, limit: int, directory: Path) -> Speed:
    _run("train", _tree(options, mode, model, limit, directory), directory)
    lines, summary = read_steps(directory / METRICS), read_summary(directory)
    trained = summary["samples_trained"]
    if trained != _samples(options) * options.steps:
        raise SystemExit(f"error: {directory}: only {trained} samples were trained on")
    seconds = lines[-1]["time/elapsed_s"] - lines[options.warm_up - 1]["time/elapsed_s"]
    return Speed(
        samples_per_s=_samples(options) * (options.steps - options.warm_up) / seconds,
        startup_s=summary["startup_seconds"],
        length=fmean(line["response_length"] for line in lines),
    )


def trl(options: Options, model: Path, limit: int, prompts: list[str]) -> Speed:
    """In a process of its own, with all cores."""
    ours_end, its_end = multiprocessing.Pipe()
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    variables = {"OMP_NUM_THREADS": str(options.cores), **quiet}
    os.environ.update(variables)
    process = multiprocessing.get_context("spawn").Process(
        target=_train_with_trl, args=(its_end, options, str(model), limit, prompts, time.time())
    )
    process.start()
    its_end.close()
    try:
        return ours_end.recv()
    except EOFError:
        raise SystemExit("error: TRL's process ended without a result; see above") from None
    finally:
        process.join()
        for name in variables:
            del os.environ[name]


def _train_with_trl(
    result: Connection, options: Options, model: str, limit: int, prompts: list[str], began: float
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    times: list[float] = []
    lengths: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not times:
                times.append(time.time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.time())

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        ends = tokenizer.eos_token_id, tokenizer.pad_token_id
        lengths.extend(
            next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids)) for ids in completion_ids
        )
        return score(completions)

    tokenizer = AutoTokenizer.from_pretrained(model)
    config, trainer = _trl_trainer(options, limit, f"{model}_trl")
    training = trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    training.train()
    steps = options.steps - options.warm_up
    result.send(
        Speed(
            samples_per_s=_samples(options) * steps / (times[-1] - times[options.warm_up]),
            startup_s=times[0] - began,
            length=fmean(lengths),
        )
    )


def _trl_trainer(options: Options, limit: int, directory: str) -> tuple[Any, Any]:
    """TRL's arguments and class for this algorithm."""
    common = {
        "output_dir": directory, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "beta": BETA,
        "max_steps": options.steps, "temperature": TEMPERATURE, "learning_rate": LEARNING_RATE, "save_strategy": "no",
        "report_to": [], "lr_scheduler_type": "constant", "disable_tqdm": True, "logging_steps": 1000,
    }  # fmt: skip
    if options.algorithm == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        config = GRPOConfig(
            per_device_train_batch_size=_samples(options), num_generations=options.samples, max_completion_length=limit,
            **common,
        )  # fmt: skip
        return config, GRPOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    config = OnlineDPOConfig(
        per_device_train_batch_size=options.prompts, max_new_tokens=limit, max_length=MODEL["context_length"], **common
    )
    return config, OnlineDPOTrainer


def _tree(options: Options, mode: str, model: Path, limit: int, directory: Path) -> dict[str, Any]:
    """Configuration of a run of this project."""
    return {
        "run": {"dir": str(directory)},
        "model": {"hf": str(model), "context_length": MODEL["context_length"]},
        "data": _data(options) | {"eval_prompts": 1},
        "learner": {
            "learning_rate": LEARNING_RATE,
            "lr_decay": "constant",
            "micro_batch_tokens": 4096,
            "share_prompts": True,
        },
        "generator": {"temperature": TEMPERATURE, "max_new_tokens": limit, "max_concurrent": _samples(options)},
        "schedule": {
            "mode": mode,
            "max_staleness": STALENESS[mode],
            "steps": options.steps,
            "prompts_per_step": options.prompts,
        },
        "algorithm": {
            "type": options.algorithm,
            "samples_per_prompt": options.samples,
            **({"beta": BETA} if options.algorithm == "online_dpo" else {"kl": {"coefficient": BETA}}),
            "missing_eos_reward": None,  # or pairs of two that were cut off would be ties
        },
        "reward": {"type": "function", "function": f"{__file__}:score"},
    }


def _samples(options: Options) -> int:
    """Of a step."""
    return options.prompts * options.samples


def _data(options: Options) -> dict[str, Any]:
    return {
        "train": options.data,
        "train_prompts": options.prompts * options.steps,
        "prompt_field": "question",
        "solution_field": "answer",
        "max_prompt_tokens": 192,
        "long_prompts": "drop",
    }


def _run(command: str, tree: dict[str, Any], directory: Path) -> None:
    with Commands(directory.parent, note=lambda line: print(line, file=sys.stderr, flush=True)) as commands:
        if commands.run(command, directory.name, check_tree(tree)) != EXIT_COMPLETED:
            raise SystemExit(1)


def prompt_texts(options: Options, model: Path, limit: int, directory: Path) -> list[str]:
    """The prompts with the model's template, for TRL.

    Raises:
        SystemExit: a text does not give the same tokens again, so that the two would have other prompts.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = load_run_inputs(check_tree(_tree(options, "sync", model, limit, directory)), model).train
    texts = [tokenizer.decode(prompt.token_ids, clean_up_tokenization_spaces=False) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        if tokenizer(text, add_special_tokens=False)["input_ids"] != prompt.token_ids:
            raise SystemExit(f"error: the tokens of {prompt.name} are not those of its text; take other data")
    return texts


def measure(options: Options, repeats: int, directory: Path) -> dict[str, Any]:
    """Speeds by lengths and program, a list over the repeats."""
    results: dict[str, Any] = {}
    for lengths, limit in LIMITS.items():
        model = make_model(options, directory / f"{lengths}_model", SFT_STEPS if lengths == "natural" else 0)
        texts = prompt_texts(options, model, limit, directory / "prompts")
        speeds: dict[str, list[Speed]] = {"trl": [], **{mode: [] for mode in STALENESS}}
        for repeat in range(repeats):
            speeds["trl"].append(trl(options, model, limit, texts))
            for mode in STALENESS:
                speeds[mode].append(ours(options, mode, model, limit, directory / f"{lengths}_{mode}_{repeat}"))
            for who, values in speeds.items():
                last = values[-1]
                print(
                    f"{lengths:8} {repeat + 1} {who:6} {last.samples_per_s:6.1f} samples/s  {last.length:5.1f} tokens"
                    f"  start-up {last.startup_s:4.0f} s",
                    flush=True,
                )
        results[lengths] = speeds
    return results


def ratio(speeds: dict[str, list[Speed]], mode: str) -> float:
    pairs = zip(speeds[mode], speeds["trl"], strict=True)
    return median(mine.samples_per_s / theirs.samples_per_s for mine, theirs in pairs)


def main(
    data: Annotated[Path, typer.Option(help="JSONL with `question` and `answer`, such as GSM8K's train.jsonl.")],
    repeats: int = 3,
    algorithm: Annotated[str, typer.Option(help="online_dpo, or grpo with 4 completions of a prompt.")] = "online_dpo",
    completions: Annotated[int, typer.Option(help="Of a step.")] = 64,
    steps: int = 24,
    warm_up: Annotated[int, typer.Option(help="Steps at the start that are not measured.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    if algorithm not in ("online_dpo", "grpo"):
        raise typer.BadParameter(f"--algorithm {algorithm}: online_dpo or grpo")
    samples = 2 if algorithm == "online_dpo" else 4
    cores = len(os.sched_getaffinity(0))
    options = Options(str(data.resolve()), algorithm, completions // samples, samples, steps, warm_up, cores)
    with tempfile.TemporaryDirectory() as directory:
        results = measure(options, repeats, Path(directory))
    print(f"\n{algorithm}, {completions} completions a step, {cores} cores; ratios to TRL, medians of {repeats}")
    for lengths, speeds in results.items():
        print(f"{lengths:8} " + "  ".join(f"{mode} {ratio(speeds, mode):.2f}x" for mode in STALENESS))
    if json_file:
        content = {
            "options": asdict(options),
            "ratio": {lengths: ratio(speeds, "async") for lengths, speeds in results.items()},
            "ratio_sync": {lengths: ratio(speeds, "sync") for lengths, speeds in results.items()},
            "runs": {
                lengths: {who: [asdict(speed) for speed in values] for who, values in speeds.items()}
                for lengths, speeds in results.items()
            },
        }
        json_file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
