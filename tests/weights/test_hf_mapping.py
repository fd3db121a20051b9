import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_async_rlhf.models.families import FAMILIES, Rule
from megatron_async_rlhf.models.hf_mapping import (
    copies_of_tied_embedding,
    elements_held,
    hf_shapes,
    model_mappings,
)


def transformers_shapes(arch) -> dict[str, tuple[int, ...]]:
    """Of the model's named parameters, which name a tied tensor once, as a saved model does."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch.to_hf(eos_token_id=2)))
    assert type(model).__name__ == arch.to_hf(eos_token_id=2)["architectures"][0]
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"heads": 4, "kv_heads": 1, "head_dim": 6, "layers": 3}])
def test_covers_exactly_the_tensors_of_transformers(make_arch, family: str, sizes: dict, tie_embeddings: bool):
    arch = make_arch(family=family, tie_embeddings=tie_embeddings, **sizes)
    theirs = transformers_shapes(arch)
    assert hf_shapes(arch) == theirs
    assert ("lm_head.weight" in theirs) is not tie_embeddings
    mapped = [name for mapping in model_mappings(arch, 1) for name in mapping.hf]
    assert len(mapped) == len(set(mapped))
    assert set(mapped) == set(theirs)
    assert arch.num_parameters == sum(torch.Size(shape).numel() for shape in theirs.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_fuses_what_megatron_fuses(make_arch, family: str):
    """vLLM names its tensors as Hugging Face does, but for the fused ones."""
    arch = make_arch(family=family)
    for mapping in model_mappings(arch, 2):
        fused = {re.sub(r"\b[qkv]_proj\b", "qkv_proj", name) for name in mapping.hf}
        fused = {re.sub(r"\b(gate|up)_proj\b", "gate_up_proj", name) for name in fused}
        assert fused == {mapping.vllm}
    assert len({mapping.vllm for mapping in model_mappings(arch, 2)}) == len(list(model_mappings(arch, 2)))


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_every_stage_owns_its_consecutive_layers(make_arch, stages: int, tie_embeddings: bool):
    arch = make_arch(layers=4, tie_embeddings=tie_embeddings)
    mappings = list(model_mappings(arch, stages))
    for mapping in mappings:
        name = mapping.hf[0]
        assert mapping.chunk == 0
        if "layers." in name:
            layer = int(name.split(".")[2])
            assert mapping.stage == layer * stages // 4
            assert f"decoder.layers.{layer % (4 // stages)}." in mapping.megatron
        else:
            assert mapping.stage == (0 if "embed_tokens" in name else stages - 1)
    owned = [(mapping.stage, mapping.megatron) for mapping in mappings]
    assert len(set(owned)) == len(owned)
    assert [m.hf for m in mappings] == [m.hf for m in model_mappings(arch, 1)]


def test_virtual_stages_deal_the_layers_in_turn(make_arch):
    """Megatron's interleaved schedule with 8 layers on 2 stages of 2 chunks: [0 1][4 5] and [2 3][6 7]."""
    arch = make_arch(layers=8)
    mappings = list(model_mappings(arch, 2, virtual_stages=2))
    places = {mapping.hf[0]: (mapping.stage, mapping.chunk, mapping.megatron) for mapping in mappings}
    for layer, place in enumerate([(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]):
        name = f"decoder.layers.{layer % 2}.mlp.linear_fc2.weight"
        assert places[f"model.layers.{layer}.mlp.down_proj.weight"] == (*place, name)
    assert places["model.embed_tokens.weight"][:2] == (0, 0)
    assert places["model.norm.weight"][:2] == places["lm_head.weight"][:2] == (1, 1)
    assert [m.hf for m in mappings] == [m.hf for m in model_mappings(arch, 1)]
    (copy,) = copies_of_tied_embedding(make_arch(layers=8, tie_embeddings=True), 2, virtual_stages=2)
    assert (copy.stage, copy.chunk) == (1, 1)


def test_only_a_last_stage_of_its_own_copies_the_tied_embedding(make_arch):
    (copy,) = copies_of_tied_embedding(make_arch(tie_embeddings=True), 2)
    assert (copy.megatron, copy.hf, copy.stage) == ("output_layer.weight", ("model.embed_tokens.weight",), 1)
    assert (copy.vllm, copy.rule, copy.chunk) == ("model.embed_tokens.weight", Rule.VOCAB, 0)
    assert not list(copies_of_tied_embedding(make_arch(tie_embeddings=True), 1))
    assert not list(copies_of_tied_embedding(make_arch(tie_embeddings=False), 2))


def test_receivers_together_hold_norms_and_scarce_key_value_heads_more_than_once(make_arch):
    arch = make_arch(heads=4, kv_heads=2, layers=1)  # hidden 16: a norm is 16, key or value 2 heads x 4 x 16 = 128
    held = [elements_held(arch, ranks) - arch.num_parameters for ranks in (1, 2, 4)]
    assert held == [0, 3 * 16, 3 * 3 * 16 + 2 * 128]


def test_receivers_together_hold_key_and_value_biases_as_often_as_their_heads(make_arch):
    arch = make_arch(family="qwen2", heads=4, kv_heads=2, layers=1)  # of k and v: 2 heads x 4 x (16 weights + 1 bias)
    assert elements_held(arch, 4) - arch.num_parameters == 3 * 3 * 16 + 2 * (128 + 8)
    arch = make_arch(family="qwen3", heads=4, kv_heads=2, layers=1)  # q and k norms are whole everywhere
    assert elements_held(arch, 2) - arch.num_parameters == 3 * 16 + 2 * 4
