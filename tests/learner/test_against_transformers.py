"""The learner beside Transformers on the weights it exported: logits, log-probabilities, and whole training steps."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from learner_ranks import (
    BETA,
    IMPORTED,
    LONG_RUN,
    LONG_STEPS,
    MODELS,
    REINFORCEMENT,
    RL_STEPS,
    ROPE,
    SUPERVISED_STEPS,
    TEMPERATURE,
    WARM_START,
    LayoutRun,
    make_long_run,
    make_pairs,
    make_sequences,
)
from plain_training import adamw, completion_logprobs, step
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_async_rlhf.config.sections import ModelSection
from megatron_async_rlhf.models.architecture import architecture_of


def transformers_model(run: LayoutRun, name: str, stage: str) -> PreTrainedModel:
    source = run.sources[name]
    hf = source["section"].get("hf")
    if hf:
        config = json.loads((Path(hf) / "config.json").read_text())
    else:
        arch = architecture_of(ModelSection.model_validate(source["section"]), source["vocab_size"])
        config = arch.to_hf(eos_token_id=2)
    directory = run.directory / name / stage
    (directory / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def assert_close_rows(ours: list[list[float]], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for our_row, their_row in zip(ours, theirs, strict=True):
        assert len(our_row) == len(their_row)
        assert (torch.tensor(our_row) - their_row).abs().sum() <= 1e-4 * max(1, len(our_row))
        assert all(abs(a - b) <= 1e-4 for a, b in zip(our_row, their_row.tolist(), strict=True))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits(run: LayoutRun, name: str):
    model = transformers_model(run, name, "initial")
    ours = run.logits(name)
    assert len(ours) == len(make_sequences())
    for logits_TV, (token_ids, _) in zip(ours, make_sequences(), strict=True):
        theirs_TV = model(torch.tensor([token_ids])).logits[0]
        assert theirs_TV.std() > 0.1  # far from uniform
        assert (logits_TV - theirs_TV).abs().max() <= 1e-4


@torch.no_grad()
def test_rope_scaling_changes_the_logits(single: LayoutRun):
    """Otherwise the test above could not tell whether the learner scales."""
    scaled = transformers_model(single, "llama3", "initial")
    assert scaled.config.rope_parameters["rope_type"] == "llama3"
    config = AutoConfig.from_pretrained(single.directory / "llama3" / "initial", rope_parameters=dict(ROPE))
    unscaled = AutoModelForCausalLM.from_pretrained(single.directory / "llama3" / "initial", config=config)
    tokens_BT = torch.tensor([make_sequences()[1][0]])
    assert (scaled(tokens_BT).logits - unscaled(tokens_BT).logits).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_completion_logprobs_of_any_length(run: LayoutRun, name: str):
    model = transformers_model(run, name, "initial")
    theirs = [completion_logprobs(model, row, TEMPERATURE) for row in make_sequences()]
    assert [len(row) for row in theirs[:2]] == [0, 23]
    assert_close_rows(run.result(name)["logprobs"], theirs)
    assert all(not result[name]["logprobs"] for result in run.ranks[1:])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_preference_step_answers_with_the_logprobs_before_it(run: LayoutRun, name: str):
    model = transformers_model(run, name, "warm")
    theirs = [completion_logprobs(model, row, TEMPERATURE) for row in make_pairs()[0]]
    assert_close_rows(run.result(name)["preference logprobs"][0], theirs)


def assert_same_training(ours: list[dict], theirs: list[dict], ours_after: dict, model: PreTrainedModel) -> None:
    for our_step, their_step in zip(ours, theirs, strict=True):
        assert {key: our_step[key] for key in their_step} == pytest.approx(their_step, rel=1e-4)
    assert set(ours_after) == {parameter_name for parameter_name, _ in model.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        gap = (ours_after[parameter_name] - parameter).abs().max()
        assert gap <= 1e-4 * parameter.abs().max(), parameter_name


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_supervised_loss_leaves_out_what_lies_between_two_answers(run: LayoutRun, name: str):
    """The worker ignores all of an answer but its first and its last token."""
    model = transformers_model(run, name, "initial")
    rows = [completion_logprobs(model, row, 1.0) for row in make_sequences() if len(row[0]) - row[1] > 2]
    theirs = -torch.stack([row[[0, -1]] for row in rows]).mean()
    for result in run.ranks:
        assert result[name]["evaluated"] == pytest.approx({"loss": theirs.item(), "tokens": 2 * len(rows)}, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_supervised_steps(single: LayoutRun, name: str):
    model = transformers_model(single, name, "initial")
    optimizer = adamw(model, WARM_START)
    num_tokens = sum(len(token_ids) - prompt_length for token_ids, prompt_length in make_sequences())
    theirs = []
    for index in range(SUPERVISED_STEPS):
        loss = -sum(completion_logprobs(model, row, 1.0).sum() for row in make_sequences()) / num_tokens
        theirs.append(step(model, optimizer, loss, WARM_START, index / WARM_START["steps"]))
    assert theirs[0]["grad_norm"] > 1.5 * WARM_START["clip_grad"]  # clipping must matter
    assert_same_training(single.result(name)["supervised"], theirs, single.weights(name, "warm"), model)


@pytest.mark.parametrize("name", MODELS)
def test_preference_steps(single: LayoutRun, name: str):
    model = transformers_model(single, name, "warm")
    reference = transformers_model(single, name, "warm").requires_grad_(False)
    optimizer = adamw(model, REINFORCEMENT)
    theirs = []
    for index, rows in enumerate(make_pairs()):
        ratios = [
            completion_logprobs(model, row, TEMPERATURE).sum() - completion_logprobs(reference, row, TEMPERATURE).sum()
            for row in rows
        ]
        h_P = torch.stack(ratios[0::2]) - torch.stack(ratios[1::2])
        losses_P = (h_P - 1 / (2 * BETA)) ** 2 if name.startswith("tied") else -F.logsigmoid(BETA * h_P)
        theirs.append(
            step(model, optimizer, losses_P.mean(), REINFORCEMENT, (index + 1) / RL_STEPS)
        )  # after one without pairs
    assert_same_training(single.result(name)["preferences"], theirs, single.weights(name, "final"), model)


def test_many_preference_steps(single: LayoutRun):
    """What every layout is compared with in `test_layouts.py`, beside a loop without Megatron."""
    model = transformers_model(single, "plain", "initial")
    reference = transformers_model(single, "plain", "initial").requires_grad_(False)
    optimizer = adamw(model, LONG_RUN)
    norms = []
    for index, rows in enumerate(make_long_run()):
        ratios = [
            completion_logprobs(model, row, TEMPERATURE).sum() - completion_logprobs(reference, row, TEMPERATURE).sum()
            for row in rows
        ]
        h_P = torch.stack(ratios[0::2]) - torch.stack(ratios[1::2])
        loss = -F.logsigmoid(BETA * h_P).mean()
        theirs = step(model, optimizer, loss, LONG_RUN, index / LONG_STEPS)
        ours = single.ranks[0]["long run"][index]
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-4), index
        norms.append(theirs["grad_norm"])
    assert len(norms) == LONG_STEPS
    assert min(norms) < LONG_RUN["clip_grad"] < max(norms)  # clipped in some steps, not in others


@pytest.mark.parametrize("name", IMPORTED)
def test_an_imported_model_is_exported_byte_for_byte(run: LayoutRun, name: str):
    files = sorted(Path(run.sources[name]["section"]["hf"]).glob("*.safetensors"))
    assert (len(files) > 1) is (name == "wide")
    imported = {key: tensor for file in files for key, tensor in load_file(file).items()}
    exported = run.weights(name, "initial")
    assert set(exported) == set(imported)
    for key, tensor in imported.items():
        assert exported[key].dtype == tensor.dtype
        assert torch.equal(exported[key].view(torch.int32), tensor.view(torch.int32)), key
