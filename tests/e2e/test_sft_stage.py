"""The stage `async-rlhf sft` with a `sft` section: multi-turn chats, against a plain loop with Transformers."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_async_rlhf.config.sft import SFTSection
from megatron_async_rlhf.data.batches import plan_batches
from megatron_async_rlhf.data.tokenizer import make_byte_tokenizer

STEPS, BATCH = 50, 4
RATE, EPS = 2e-3, 1e-6
WORDS = ("red", "blue", "café", "two words", "7", "")
# With the marks by which Transformers knows what the assistant said.
MARKED_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<eos>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def chats() -> list[dict]:
    """Of one to three turns, some with a system message."""
    rng, found = random.Random(5), []
    for number in range(60):
        messages = [{"role": "system", "content": "be brief"}] if number % 3 == 0 else []
        for turn in range(1 + number % 3):
            question = (
                f"{number}.{turn} " + " ".join(rng.choices(WORDS, k=2)) + "?"
            )  # else some would be in both splits
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=2))})
        found.append({"messages": messages})
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model that is nobody's, chats to train on, and others held out."""
    place = tmp_path_factory.mktemp("sft")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=160, initializer_range=0.1, eos_token_id=257, pad_token_id=256,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "model")
    make_byte_tokenizer(place / "model")
    rows = chats()
    for name, part in (("train", rows[:48]), ("eval", rows[48:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return place


def sft(place: Path, name: str, *, resume: bool = False, **changes) -> Path:
    """Run the stage; its directory."""
    section = {
        "answers": "all",
        "steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "adam_eps": EPS,
        "eval_every": 10,
    }
    tree = {
        "run": {"dir": str(place / name)},
        "model": {"hf": str(place / "model")},
        "data": {"train": str(place / "train.jsonl"), "eval": str(place / "eval.jsonl"), "eval_prompts": 12, "prompt_field": "messages"} | changes.pop("data", {}),
        "sft": section | changes.pop("sft", {}),
        "learner": {"micro_batch_tokens": 330, "timeout_s": 120} | changes.pop("learner", {}),
        "weights": {"timeout_s": 60},
        **changes,
    }  # fmt: skip
    (place / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "megatron_async_rlhf", "sft", str(place / f"{name}.yaml")]
    result = subprocess.run([*command, *(["--resume"] if resume else [])], capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stdout + result.stderr
    return place / name


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return sft(place, "whole", checkpoint={"every_steps": 25})


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plain_loop(place: Path) -> tuple[list[float], list[float], LlamaForCausalLM]:
    """Losses of the steps, held-out losses every 10 steps, and the model in the end, by Transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    rendered = {}
    for split in ("train", "eval"):
        records = [json.loads(line) for line in (place / f"{split}.jsonl").read_text().splitlines()]
        rendered[split] = [
            tokenizer.apply_chat_template(
                record["messages"], chat_template=MARKED_TEMPLATE, return_assistant_tokens_mask=True, return_dict=True
            )
            for record in records
        ]
    model = AutoModelForCausalLM.from_pretrained(place / "model")

    def nll(rows) -> torch.Tensor:
        losses = []
        for row in rows:
            ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["assistant_masks"], dtype=torch.bool)
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            losses.append(-logprobs[mask[1:]])
        return torch.cat(losses).mean()

    keys = SFTSection(steps=STEPS, batch_size=BATCH)
    batches = plan_batches([len(row["input_ids"]) for row in rendered["train"]], keys, seed=0)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0)
    losses, held_out = [], []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        loss = nll([rendered["train"][row] for row in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            with torch.no_grad():
                held_out.append(nll(rendered["eval"]).item())
    return losses, held_out, model


@pytest.mark.slow
def test_losses_and_weights_are_those_of_a_plain_loop(place: Path, whole: Path):
    losses, held_out, model = plain_loop(place)
    assert [line["loss"] for line in lines(whole)] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    summary = json.loads((whole / "summary.json").read_text())
    assert [summary["eval"][f"step {step}"]["loss"] for step in range(10, STEPS + 1, 10)] == pytest.approx(
        held_out, rel=1e-4
    )
    assert summary["eval"]["after"] == summary["eval"][f"step {STEPS}"]
    assert summary["samples_trained"] == STEPS * BATCH and summary["status"] == "completed"
    exported = load_file(whole / "checkpoints/final/model.safetensors")
    for name, parameter in model.named_parameters():
        gap = (exported[name] - parameter).abs().max()
        assert gap <= 1e-3 * parameter.abs().max(), name


@pytest.mark.slow
def test_what_was_cut_off_goes_on_to_the_same_bits(place: Path, whole: Path):
    """As a kill between the two checkpoints leaves it: a later line of the metrics, half a checkpoint, no export."""
    run = place / "resumed"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/final")
    (run / "checkpoints/step_000050").rename(run / "checkpoints/step_000050.partial")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "interrupted", "steps": 40}))
    sft(place, "resumed", resume=True, checkpoint={"every_steps": 25})
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(whole)]
    final = "checkpoints/final/model.safetensors"
    assert (run / final).read_bytes() == (whole / final).read_bytes()


@pytest.mark.slow
@pytest.mark.thorough
def test_the_best_is_exported_from_data_parallel_ranks(place: Path):
    """Two conversations, learned by heart: what is held out gets worse after a few steps."""
    run = sft(
        place, "best", sft={"steps": 36, "eval_every": 6, "export": "best", "learning_rate": 0.02, "lr_decay": "constant", "batch_size": 2},
        data={"train_prompts": 2},
        learner={"ranks": 2, "distributed_optimizer": True}, checkpoint={"keep_last": 1},
    )  # fmt: skip
    held_out = json.loads((run / "summary.json").read_text())["eval"]
    losses = {step: held_out[f"step {step}"]["loss"] for step in range(6, 37, 6)}
    best = min(losses, key=losses.__getitem__)
    assert best < 36 and losses[best] < held_out["after"]["loss"]
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoints/final")
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoints/final")
    total, count = 0.0, 0
    for line in (place / "eval.jsonl").read_text().splitlines():
        row = tokenizer.apply_chat_template(
            json.loads(line)["messages"],
            chat_template=MARKED_TEMPLATE,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["assistant_masks"], dtype=torch.bool)
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        total, count = total - logprobs[mask[1:]].sum().item(), count + int(mask.sum())
    assert total / count == pytest.approx(losses[best], rel=1e-4)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["final", f"step_{best:06d}"]
