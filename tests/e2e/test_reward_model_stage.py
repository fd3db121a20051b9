"""The stage `async-rlhf reward-model`: pairs in, a model out that Transformers scores as the stage did."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_async_rlhf.algorithms.calibration import pair_figures
from megatron_async_rlhf.cli import main
from megatron_async_rlhf.config.load import check_tree
from megatron_async_rlhf.config.reward_modelling import RewardModellingSection
from megatron_async_rlhf.data.batches import plan_pair_batches
from megatron_async_rlhf.data.tokenizer import Tokenizer, make_byte_tokenizer
from megatron_async_rlhf.errors import ConfigError

STEPS, BATCH, HELD_OUT = 40, 8, 40
WORDS = ("red", "blue", "green", "two", "seven", "many", "some")


def draw_pairs(count: int) -> list[dict]:
    """Of two answers the polite one is better, by as much as it has thanks."""
    dice = random.Random(2)
    found = []
    for number in range(count):
        plain, better = (" ".join(dice.choices(WORDS, k=dice.randint(1, 4))) for _ in range(2))
        thanks = dice.randint(1, 2)
        found.append(
            {"prompt": f"{number}?", "chosen": better + " thanks" * thanks, "rejected": plain, "margin": thanks / 2}
        )
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A policy that pads with its end-of-sequence token, and pairs to train on and others held out."""
    place = tmp_path_factory.mktemp("reward model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=96, initializer_range=0.1, eos_token_id=257, pad_token_id=257,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "policy")
    make_byte_tokenizer(place / "policy")
    settings = json.loads((place / "policy/tokenizer_config.json").read_text())
    (place / "policy/tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<eos>"}))
    rows = draw_pairs(160)
    for name, part in (("train", rows[:-HELD_OUT]), ("eval", rows[-HELD_OUT:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return place


def write_config(place: Path, name: str, **changes) -> Path:
    section = {"steps": STEPS, "batch_size": BATCH, "learning_rate": 3e-3, "margin": True, "eval_every": 20}
    tree = {
        "run": {"dir": str(place / name)},
        "model": {"hf": str(place / "policy")},
        "data": {"train": str(place / "train.jsonl"), "eval": str(place / "eval.jsonl"), "eval_prompts": HELD_OUT, "margin_field": "margin"}
        | changes.pop("data", {}),
        "reward_model": section | changes.pop("reward_model", {}),
        "learner": {"ranks": 2, "tensor_parallel": 2, "micro_batch_tokens": 400, "timeout_s": 120} | changes.pop("learner", {}),
        "weights": {"timeout_s": 60},
        **changes,
    }  # fmt: skip
    (place / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return place / f"{name}.yaml"


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    command = [sys.executable, "-m", "megatron_async_rlhf", "reward-model", str(write_config(place, "run"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stdout + result.stderr
    return place / "run"


@pytest.mark.slow
def test_the_stage_learns_and_its_export_scores_as_it_says(place: Path, run: Path):
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["algorithm"], summary["steps"]) == ("completed", "reward_model", STEPS)
    assert summary["samples_trained"] == 2 * STEPS * BATCH
    assert summary["data"]["used"] == 160
    assert list(summary["eval"]) == ["before", "step 20", "step 40", "after"]
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    assert before["accuracy_high"] < after["accuracy_low"] and after["accuracy"] > 0.9
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["num_pairs"] for step in steps] == [BATCH] * STEPS
    assert sum(step["loss"] for step in steps[-5:]) < 0.6 * sum(step["loss"] for step in steps[:5])
    assert {"pairs/accuracy", "pairs/margin", "pairs/chosen_reward", "pairs/rejected_reward"} <= steps[0].keys()

    final = run / "checkpoints/final"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    pairs = [json.loads(line) for line in (place / "eval.jsonl").read_text().splitlines()]
    rewards = {}
    for side in ("chosen", "rejected"):
        texts = [f"<user>{pair['prompt']}<assistant>{pair[side]}<eos>" for pair in pairs]
        with torch.no_grad():  # padded to a common length, as users do
            rewards[side] = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    assert pair_figures(rewards["chosen"], rewards["rejected"]) == pytest.approx(after, abs=1e-3)


@pytest.mark.slow
def test_the_converter_takes_the_run(run: Path, tmp_path: Path, monkeypatch, capsys):
    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["async-rlhf", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    call("export-hf", run, tmp_path / "exported")
    call("import-hf", run / "checkpoints/final", tmp_path / "imported", "--tensor-parallel", 2)
    for other in (tmp_path / "exported", tmp_path / "imported"):
        assert call("verify-weights", run, other).startswith("equal: ")


def test_a_dry_run_says_what_there_is_to_learn_and_starts_nothing(place: Path, monkeypatch, capsys):
    config = write_config(place, "planned", reward_model={"steps": None, "epochs": 2})
    monkeypatch.setattr(sys, "argv", ["async-rlhf", "reward-model", str(config), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert not ended.value.code, out
    assert "# preference pairs: 120 to train on, 40 held out; left out of the former: 0 too long" in out
    assert "# 30 steps of 8 pairs: 2.0 epochs" in out
    assert "--reward-model" in out and "jobs reward_model" in out
    assert not (place / "planned").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"reward_model": {"max_tokens": 97}}, "reward_model.max_tokens = 97 is above the context of 96 tokens; lower it"),
        ({"reward_model": {"max_tokens": 25}}, "the longer side of the pair has"),
        ({"reward_model": {"max_tokens": 5}}, "which are all; raise reward_model.max_tokens"),
        ({"data": {"margin_field": None}}, "the pair has no margin, which reward_model.margin = true needs"),
        ({"learner": {"micro_batch_tokens": 100}}, "must hold a preference pair of the longest sequences"),
        ({"reward_model": {"epochs": 1}}, "reward_model.epochs and reward_model.steps say the same thing in two ways"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(place: Path, monkeypatch, capsys, changes: dict, line: str):
    config = write_config(place, "refused", **changes)
    if changes.get("data"):  # the column would be recognised by its name
        rows = [json.loads(row) for row in (place / "train.jsonl").read_text().splitlines()]
        for row in rows:
            row.pop("margin")
        (place / "without.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = write_config(place, "refused", data={"train": str(place / "without.jsonl"), "margin_field": None})
    for extra in ([], ["--dry-run"]):
        monkeypatch.setattr(sys, "argv", ["async-rlhf", "reward-model", str(config), *extra])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert (ended.value.code, err.count("error: ")) == (2, 1), out + err
        assert line in err, err
    assert not (place / "refused").exists()


def test_pairs_that_are_too_long_can_be_dropped(place: Path, monkeypatch, capsys):
    config = write_config(place, "dropped", reward_model={"max_tokens": 25}, data={"long_prompts": "drop"})
    monkeypatch.setattr(sys, "argv", ["async-rlhf", "reward-model", str(config), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.load(place / "policy")
    sizes = [
        max(len(tokenizer.encode(row["prompt"] + row[side])) + 3 for side in ("chosen", "rejected")) for row in rows
    ]
    short, long = sum(size <= 25 for size in sizes), sum(size > 25 for size in sizes)
    assert short and long
    assert f"# preference pairs: {short} to train on" in (out := capsys.readouterr().out)
    assert f"left out of the former: {long} too long" in out


def test_the_stage_needs_its_section_and_no_reward(place: Path, monkeypatch, capsys):
    config = write_config(place, "without")
    tree = yaml.safe_load(config.read_text())
    check_tree(tree)  # `reward` is left out
    del tree["reward_model"]
    tree["data"] = {}
    config.write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(sys, "argv", ["async-rlhf", "reward-model", str(config)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "reward_model: the configuration has no section of that name" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="reward_model.epochs and reward_model.steps"):
        check_tree(tree | {"reward_model": {"epochs": 1, "steps": 1}})


def test_each_epoch_has_every_pair_once():
    batches = plan_pair_batches(5, RewardModellingSection(epochs=2, batch_size=4), seed=0)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    drawn = [pair for batch in batches for pair in batch]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))
    assert plan_pair_batches(5, RewardModellingSection(steps=2, batch_size=4), seed=0) == batches[:2]
