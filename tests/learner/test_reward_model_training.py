"""Reward models on real ranks: as Transformers trains and scores them, and the same in every layout."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from learner_ranks import CONTEXT_LENGTH, ROPE, VOCAB_SIZE, Layout, run_worker, write_hf_model
from plain_training import adamw, step
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from megatron_async_rlhf.data.tokenizer import make_byte_tokenizer
from megatron_async_rlhf.formats.classifier import describe_classifier
from megatron_async_rlhf.formats.directory import describe_weights

WORKER = Path(__file__).with_name("reward_worker.py")
TIMEOUT_S = 200
ONE = Layout()
LAYOUTS = [
    Layout(tensor=2, sequence_parallel=True),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual_stages=2),
    Layout(tensor=2, pipeline=2),
    Layout(context=2),
    Layout(data=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
]
KEYS = {
    "learning_rate": 5e-3, "min_learning_rate": 1e-3, "lr_decay": "linear", "weight_decay": 0.1, "adam_beta1": 0.9,
    "adam_beta2": 0.99, "adam_eps": 1e-5, "clip_grad": 2.0,
}  # fmt: skip
# `tied`: a policy with tied embeddings, one key-value head, and heads of a size that vLLM has. `qwen3`: a policy with norms
# per head. `qwen2`: a sequence classifier, whose own head it keeps.
OWN_KEYS = {"tied": {"margin": True}, "qwen3": {"center_coefficient": 0.05}, "qwen2": {}}
BYTES = 260  # of the byte tokenizer


def write_classifier(directory: Path) -> Path:
    torch.manual_seed(8)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=VOCAB_SIZE, num_hidden_layers=4, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT_LENGTH, rms_norm_eps=1e-3,
        rope_parameters=dict(ROPE), initializer_range=0.2, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return directory


def draw_steps() -> list[list]:
    """Chosen, rejected and margin of each pair of a step: an odd number, and fewer pairs than data-parallel ranks.

    The two share their prompt, are of any length, and some of one token or as long as the context.
    """
    dice = random.Random(4)

    def draw(low: int, high: int) -> list[int]:
        return [dice.randrange(1, VOCAB_SIZE) for _ in range(dice.randint(low, high))]

    def pair() -> list:
        prompt = draw(1, 6)
        return [prompt + draw(1, CONTEXT_LENGTH - 6), prompt + draw(1, CONTEXT_LENGTH - 6), dice.random()]

    steps = [[pair() for _ in range(count)] for count in (5, 1, 4, 3)]
    steps[0][0][0], steps[0][1][1] = draw(1, 1), draw(CONTEXT_LENGTH, CONTEXT_LENGTH)
    return steps


STEPS = draw_steps()
SCORED = [tokens for pair in STEPS[0] for tokens in pair[:2]][:9]


class Trained:
    """What all ranks of all layouts wrote."""

    def __init__(self, root: Path) -> None:
        self.root = root
        sources = {
            "tied": write_hf_model(
                root / "tied",
                seed=1,
                family="llama",
                num_key_value_heads=1,
                tie_word_embeddings=True,
                num_hidden_layers=4,
                head_dim=32,
                vocab_size=BYTES,
            ),
            "qwen3": write_hf_model(root / "qwen3", seed=2, family="qwen3", num_key_value_heads=2, num_hidden_layers=4),
            "qwen2": write_classifier(root / "qwen2"),
        }
        job = {
            "config": {
                "learner": {"micro_batch_tokens": 3 * CONTEXT_LENGTH, "timeout_s": 60},
                "weights": {"timeout_s": 30},
            },
            "keys": KEYS, "scored": SCORED, "steps": STEPS,
            "models": {name: {"hf": str(path), "keys": OWN_KEYS[name]} for name, path in sources.items()},
            "layouts": [
                {
                    "name": str(layout),
                    "learner": layout.keys
                    | {"tensor_parallel": layout.tensor, "pipeline_parallel": layout.pipeline, "ranks": layout.ranks},
                }
                for layout in (ONE, *LAYOUTS)
            ],
        }  # fmt: skip
        make_byte_tokenizer(sources["tied"])
        run_worker(WORKER, root, job, TIMEOUT_S)

    def ranks(self, layout: Layout, name: str) -> list[dict]:
        files = [self.root / f"{layout}-rank{rank}.json" for rank in range(layout.ranks)]
        return [json.loads(file.read_text())[name] for file in files]

    def result(self, layout: Layout, name: str) -> dict:
        return self.ranks(layout, name)[0]

    def exported(self, layout: Layout, name: str, stage: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / str(layout) / name / stage / "model.safetensors")

    def transformers_model(self, layout: Layout, name: str, stage: str) -> PreTrainedModel:
        """The exported weights, under the description that the model began with."""
        config = AutoConfig.from_pretrained(self.root / name, num_labels=1, pad_token_id=0)
        model = AutoModelForSequenceClassification.from_config(config)
        model.load_state_dict(self.exported(layout, name, stage), strict=True)
        return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("reward models"))


def score(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0, 0]


@pytest.mark.parametrize("name", OWN_KEYS)
def test_training_is_that_of_a_loop_with_transformers(trained: Trained, name: str):
    model, keys = trained.transformers_model(ONE, name, "initial"), OWN_KEYS[name]
    ours = trained.result(ONE, name)
    with torch.no_grad():
        assert ours["before"] == pytest.approx([score(model, row).item() for row in SCORED], abs=1e-4)
    optimizer = adamw(model, KEYS)
    for number, rows in enumerate(STEPS):
        chosen_P, rejected_P = (torch.stack([score(model, row[side]) for row in rows]) for side in (0, 1))
        margin_P = torch.tensor([row[2] for row in rows]) if keys.get("margin") else 0.0
        losses_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
        losses_P = losses_P + keys.get("center_coefficient", 0.0) * (chosen_P + rejected_P) ** 2
        reported = {
            "pairs/accuracy": (chosen_P > rejected_P).float().mean().item(),
            "pairs/margin": (chosen_P - rejected_P).mean().item(),
            "pairs/chosen_reward": chosen_P.mean().item(),
            "pairs/rejected_reward": rejected_P.mean().item(),
            "num_pairs": len(rows),
            "tokens": sum(len(row[0]) + len(row[1]) for row in rows),
        }
        theirs = step(model, optimizer, losses_P.mean(), KEYS, number / len(STEPS)) | reported
        found = {key: ours["steps"][number][key] for key in theirs}
        # A margin is a small difference of scores around 1, and CPUs of another kind round those otherwise.
        assert found.pop("pairs/margin") == pytest.approx(theirs.pop("pairs/margin"), rel=1e-4, abs=5e-5), number
        assert found == pytest.approx(theirs, rel=1e-4, abs=1e-5), number
    with torch.no_grad():
        assert ours["after"] == pytest.approx([score(model, row).item() for row in SCORED], abs=1e-3)
    final = trained.exported(ONE, name, "final")
    assert set(final) == {parameter_name for parameter_name, _ in model.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        gap = (final[parameter_name] - parameter).abs().max()
        assert gap <= 1e-4 * parameter.abs().max(), parameter_name


@pytest.mark.parametrize("name", OWN_KEYS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_trains_alike(trained: Trained, layout: Layout, name: str):
    """Also the drawn head is the same in each."""
    theirs = trained.result(ONE, name)
    for ours in trained.ranks(layout, name):
        for number, their_step in enumerate(theirs["steps"]):
            for key in ("loss", "grad_norm", "learning_rate", "tokens", "num_pairs"):
                assert ours["steps"][number][key] == pytest.approx(their_step[key], rel=1e-4), (number, key)
            for key in (key for key in their_step if key.startswith("pairs/")):  # rewards are about 1
                assert ours["steps"][number][key] == pytest.approx(their_step[key], abs=1e-4), (number, key)
        assert ours["before"] == pytest.approx(theirs["before"], abs=1e-5)
        assert ours["after"] == pytest.approx(theirs["after"], abs=1e-3)
    for stage, tolerance in (("initial", 0.0), ("final", 1e-4)):
        expected, found = (trained.exported(each, name, stage) for each in (ONE, layout))
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert (found[key] - tensor).abs().max() <= tolerance * tensor.abs().max(), (stage, key)


@pytest.mark.parametrize("name", OWN_KEYS)
def test_training_moves_all_of_the_model(trained: Trained, name: str):
    """Otherwise what is the same in all layouts might be what none has changed."""
    initial, final = (trained.exported(ONE, name, stage) for stage in ("initial", "final"))
    assert all(not torch.equal(initial[key], final[key]) for key in final)


def test_a_policy_brings_all_but_the_head_and_a_classifier_that_too(trained: Trained):
    for name in OWN_KEYS:
        source, initial = load_file(trained.root / name / "model.safetensors"), trained.exported(ONE, name, "initial")
        head = initial.pop("score.weight")
        assert head.shape == (1, 32)
        if "score.weight" in source:
            assert torch.equal(head, source.pop("score.weight"))
        else:
            assert 0.5 < head.std() * 33**0.5 < 1.5
            source.pop("lm_head.weight", None)
        assert source.keys() == initial.keys()
        assert all(torch.equal(source[key], tensor) for key, tensor in initial.items())


@pytest.fixture(scope="module")
def described(trained: Trained) -> Path:
    """An export with its description, as the stage writes it."""
    directory = trained.root / str(ONE) / "tied" / "initial"
    describe_weights(trained.root / "tied", directory, "float32")
    describe_classifier(directory)
    return directory


@torch.no_grad()
def test_transformers_scores_a_padded_batch_of_the_export_as_every_layout_does(trained: Trained, described: Path):
    model, info = AutoModelForSequenceClassification.from_pretrained(described, output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == "LlamaForSequenceClassification"
    width = max(map(len, SCORED))
    padded = torch.tensor([row + [model.config.pad_token_id] * (width - len(row)) for row in SCORED])
    attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in SCORED])
    theirs = model(padded, attention_mask=attention).logits.squeeze(1)
    for layout in (ONE, *LAYOUTS):
        assert trained.result(layout, "tied")["before"] == pytest.approx(theirs.tolist(), abs=1e-4), layout


POOLED = """
import json, sys
from vllm import LLM
llm = LLM(model=sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True, max_num_batched_tokens=256)
found = llm.encode([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])], pooling_task="classify")
print("rewards", json.dumps([output.outputs.data.tolist() for output in found]))
"""


@pytest.mark.slow
def test_vllm_pools_the_rewards_of_the_export_that_every_layout_gives(trained: Trained, described: Path):
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    arguments = [str(described), json.dumps(SCORED)]
    done = subprocess.run(
        [sys.executable, "-c", POOLED, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("rewards ")] or [done.stderr[-3000:]]
    theirs = [reward for (reward,) in json.loads(line.removeprefix("rewards "))]
    assert max(theirs) > 0.3 and min(theirs) < -1  # the numbers themselves: no sigmoid, no softmax
    for layout in (ONE, *LAYOUTS):
        assert trained.result(layout, "tied")["before"] == pytest.approx(theirs, abs=1e-4), layout


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=str)
def test_data_parallel_ranks_and_refusals_are_alike(trained: Trained, layout: Layout):
    ranks = trained.ranks(layout, "tied")
    for rank in ranks:
        assert rank["foreign"]["message"] == "a reward model's learner has no command StartReinforcement"
        assert rank["nothing"]["message"] == "reward model step 9: there are no pairs to learn from"
    if layout.data > 1:
        assert ranks[0]["digests"] == ranks[1]["digests"]
