"""Training throughput of the learner beside plain Transformers with torch AdamW, in one run on one device's CPU.

    .venv/bin/python tools/bench_learner.py --gsm8k path/to/gsm8k/train.jsonl

Both hold the same weights and make the same optimizer steps turn by turn, each in a process of its own with the same
number of threads: zero gradients, forward, log-probabilities, backward, clip, AdamW. The learning rate is so small
that no weight changes, so every step of either must report the same loss and gradient norm; the run stops otherwise.

- learner: `MegatronLearner.train_supervised`, nothing left out; micro-batches are packed up to the token budget.
- padded: `LlamaForCausalLM` with sdpa attention and no attention mask (right-padded rows do not need one, which spares
  it the cost); rows in random order, as many as the same budget of positions holds when padded to their longest.
- sorted: the same, sorted by length first, as much as padding can be avoided without packing.

The lengths: `equal`, all of one length, every token learned; `gsm8k`, those of GSM8K problems with solutions, every
token learned; `answers`, the same, but only the solutions learned, as in a warm start. Without `--gsm8k` they are
drawn from log-normal distributions with its means and deviations. Medians over the rounds; ratios by the wall clock and
by processor time, which other load on the machine disturbs less.
"""

import json
import multiprocessing
import os
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.launch.nodes import free_ports
from megatron_async_rlhf.models.architecture import Architecture, architecture_of
from megatron_async_rlhf.types import Sequence

TIMEOUT_S = 600.0
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "weight_decay": 0.0, "clip_grad": 1.0}
LEARNING_RATE = 1e-30
LENGTHS = ("equal", "gsm8k", "answers")
WAYS, CLOCKS = ("padded", "sorted"), ("wall", "cpu")


@dataclass(frozen=True)
class Model:
    hidden: int
    layers: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.layers}/{self.vocab}"

    @classmethod
    def parse(cls, text: str) -> "Model":
        hidden, rest = text.split("x")
        layers, vocab = rest.split("/")
        return cls(int(hidden), int(layers), int(vocab))

    def config(self, budget: int, threads: int) -> RunConfig:
        shape = {
            "hidden_size": self.hidden, "layers": self.layers, "ffn_size": self.hidden * 8 // 3 // 32 * 32,
            "heads": max(4, self.hidden // 64), "context_length": 1024, "tokenizer": "bpe", "vocab_size": self.vocab,
        }  # fmt: skip
        stage = ADAM | {"learning_rate": LEARNING_RATE, "lr_decay": "constant"}
        learner = {"micro_batch_tokens": budget, "threads": threads, "timeout_s": TIMEOUT_S}
        return RunConfig.model_validate(
            {"model": shape, "warm_start": stage | {"steps": 1000}, "learner": stage | learner}
        )

    def architecture(self, config: RunConfig) -> Architecture:
        return architecture_of(config.model, self.vocab)


class Learner:
    """This project's."""

    def __init__(self, config: RunConfig, arch: Architecture, directory: Path) -> None:
        from megatron_async_rlhf.learner.megatron.learner import MegatronLearner
        from megatron_async_rlhf.learner.megatron.parallel import join_learner
        from megatron_async_rlhf.learner.protocol import ExportWeights

        (port,) = free_ports(1)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._learner = MegatronLearner(config, arch, join_learner(config.learner, config.run.device))
        self._learner.export_weights(ExportWeights(directory=str(directory)))
        (directory / "config.json").write_text(json.dumps(arch.to_hf(eos_token_id=1)))

    def step(self, sequences: list[Sequence]) -> dict[str, float]:
        from megatron_async_rlhf.learner.protocol import TrainSupervised

        return self._learner.train_supervised(TrainSupervised(step=0, sequences=sequences)).metrics.values


class Transformers:
    """As one writes it without a framework."""

    def __init__(self, config: RunConfig, arch: Architecture, directory: Path, *, by_length: bool) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(config.learner.threads)
        self._model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        )
        self._budget = config.learner.micro_batch_tokens
        self._by_length = by_length

    def step(self, sequences: list[Sequence]) -> dict[str, float]:
        import torch
        import torch.nn.functional as F

        num_tokens = sum(len(s.token_ids) - s.prompt_length for s in sequences)
        self._optimizer.zero_grad()
        total = positions = 0
        for rows in self._batches(sequences):
            width = max(len(s.token_ids) for s in rows) - 1
            tokens_BT, targets_BT = (
                torch.zeros(len(rows), width, dtype=torch.long),
                torch.full((len(rows), width), -100),
            )
            for b, s in enumerate(rows):
                ids = torch.tensor(s.token_ids)
                tokens_BT[b, : len(ids) - 1] = ids[:-1]
                targets_BT[b, s.prompt_length - 1 : len(ids) - 1] = ids[s.prompt_length :]
            logits_BTV = self._model(input_ids=tokens_BT, use_cache=False).logits
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum") / num_tokens
            loss.backward()
            total += loss.item()
            positions += tokens_BT.numel()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        tokens = sum(len(s.token_ids) - 1 for s in sequences)
        return {"loss": total, "grad_norm": norm.item(), "padding": 1 - tokens / positions}

    def _batches(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        order = sorted(sequences, key=lambda s: len(s.token_ids)) if self._by_length else sequences
        batches: list[list[Sequence]] = [[]]
        for sequence in order:
            width = max(len(s.token_ids) for s in [*batches[-1], sequence]) - 1
            if batches[-1] and width * (len(batches[-1]) + 1) > self._budget:
                batches.append([])
            batches[-1].append(sequence)
        return batches


def serve(way: str, model: Model, budget: int, threads: int, directory: Path, pipe: Connection) -> None:
    """Steps whenever told to; answers with seconds and metrics."""
    config = model.config(budget, threads)
    arch = model.architecture(config)
    if way == "learner":
        trainer = Learner(config, arch, directory)
    else:
        trainer = Transformers(config, arch, directory, by_length=way == "sorted")
    pipe.send("ready")
    while (sequences := pipe.recv()) is not None:
        start, start_cpu = time.perf_counter(), time.process_time()
        metrics = trainer.step(sequences)
        pipe.send(({"wall": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}, metrics))


class Trainer:
    """A way of training in a process of its own."""

    def __init__(self, *arguments) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=serve, args=(*arguments, there), daemon=True)
        self._process.start()
        there.close()
        self._pipe.recv()

    def step(self, sequences: list[Sequence]) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by clock, and metrics."""
        self._pipe.send(sequences)
        if not self._pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"no step within {TIMEOUT_S:g} s")
        return self._pipe.recv()

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join(10)


def problem_lengths(gsm8k: Path | None) -> list[tuple[int, int]]:
    """(prompt, solution) in tokens, taken as four bytes each."""
    if gsm8k is None:
        dice = random.Random(0)
        return [
            (min(250, int(dice.lognormvariate(3.99, 0.38))) + 1, min(400, int(dice.lognormvariate(4.15, 0.51))) + 1)
            for _ in range(4000)
        ]
    problems = [json.loads(line) for line in gsm8k.read_bytes().split(b"\n") if line]
    return [tuple(len(p[key].encode()) // 4 + 1 for key in ("question", "answer")) for p in problems]


def draw_step(kind: str, tokens: int, vocab: int, problems: list[tuple[int, int]], seed: int) -> list[Sequence]:
    """Sequences of about `tokens` tokens together."""
    dice = random.Random(seed)
    sequences: list[Sequence] = []
    drawn = 0
    while drawn < tokens:
        prompt, solution = dice.choice(problems)
        length = 129 if kind == "equal" else prompt + solution
        ids = [dice.randrange(2, vocab) for _ in range(length)]
        sequences.append(Sequence(token_ids=ids, prompt_length=prompt if kind == "answers" else 1))
        drawn += length - 1
    return sequences


def measure(model: Model, kinds: list[str], options: dict) -> list[dict]:
    """One row per kind of lengths."""
    problems = problem_lengths(options["gsm8k"])
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        trainers: dict[str, Trainer] = {}
        for way in ("learner", *WAYS):  # the learner first: it writes the weights that the others read
            trainers[way] = Trainer(way, model, options["budget"], options["threads"], Path(directory))
        for kind in kinds:
            taken: dict[str, list[dict[str, float]]] = {way: [] for way in trainers}
            for turn in range(options["rounds"] + 1):
                sequences = draw_step(kind, options["tokens"], model.vocab, problems, seed=turn)
                results = {way: trainer.step(sequences) for way, trainer in trainers.items()}
                expected = results["learner"][1]
                for way, (seconds, metrics) in results.items():
                    for key in ("loss", "grad_norm"):
                        if abs(metrics[key] - expected[key]) > 1e-4 * abs(expected[key]):
                            raise SystemExit(f"{model} {kind}: {key} is {expected[key]} and {metrics[key]} ({way})")
                    if turn:  # the first warms up
                        tokens = sum(len(s.token_ids) - 1 for s in sequences)
                        taken[way].append(
                            {clock: seconds[clock] / tokens for clock in CLOCKS} | {"padding": metrics["padding"]}
                        )
            rows.append(asdict(model) | {"lengths": kind} | summary(taken))
            show(model, rows[-1])
        for trainer in trainers.values():
            trainer.end()
    return rows


def summary(taken: dict[str, list[dict[str, float]]]) -> dict[str, dict]:
    """Medians of what each way took for a token in each round, and of the ratios within a round."""
    ratios = {
        f"{way}, {clock}": median(t[clock] / o[clock] for t, o in zip(taken[way], taken["learner"], strict=True))
        for clock in CLOCKS
        for way in WAYS
    }
    return {
        "tokens_per_s": {way: 1 / median(one["wall"] for one in rounds) for way, rounds in taken.items()},
        "padding": {way: fmean(one["padding"] for one in rounds) for way, rounds in taken.items()},
        "times_as_fast": ratios,
    }


def show(model: Model, row: dict) -> None:
    rates, padding = row["tokens_per_s"], row["padding"]
    cells = [f"{rates[way]:9.0f} ({padding[way]:4.0%})" for way in ("learner", *WAYS)]
    ratios = "".join(f"{ratio:14.2f}" for ratio in row["times_as_fast"].values())
    print(f"{model!s:>14} {row['lengths']:>8} {'  '.join(cells)} {ratios}", flush=True)


def main(
    models: Annotated[list[str] | None, typer.Option("--model", help="HIDDENxLAYERS/VOCABULARY, repeatable")] = None,
    lengths: Annotated[list[str] | None, typer.Option(help=f"{', '.join(LENGTHS)}; repeatable")] = None,
    gsm8k: Annotated[Path | None, typer.Option(help="GSM8K as JSON lines with question and answer")] = None,
    tokens: Annotated[int, typer.Option(help="of one optimizer step")] = 8192,
    budget: Annotated[int, typer.Option(help="positions of one micro-batch")] = 4096,
    rounds: int = 5,
    threads: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the rows there")] = None,
) -> None:
    """Tokens per second of learner and Transformers on the same steps."""
    print(f"{'':>23} {'tokens/s by the wall clock (padding)':>52} {'learner is x times as fast as':>57}")
    ways = "".join(f"{way:>16}  " for way in ("learner", *WAYS))
    print(f"{'model':>14} {'lengths':>8} {ways}" + "".join(f"{w + ', ' + c:>14}" for c in CLOCKS for w in WAYS))
    options = {"gsm8k": gsm8k, "tokens": tokens, "budget": budget, "rounds": rounds, "threads": threads}
    rows = []
    for text in models or ["128x4/2048", "256x8/8192", "512x4/8192"]:
        rows += measure(Model.parse(text), lengths or list(LENGTHS), options)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
