import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_async_rlhf.weights.hf_mapping import (
    bytes_held,
    copies_of_tied_embedding,
    hf_shapes,
    llama_mappings,
    tensor_specs,
)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"heads": 4, "kv_heads": 1, "head_dim": 6, "layers": 3}])
def test_covers_exactly_the_tensors_of_transformers(make_arch, sizes: dict, tie_embeddings: bool):
    arch = make_arch(tie_embeddings=tie_embeddings, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**arch.to_hf(eos_token_id=2)))
    # Named parameters name a tied tensor once, as a saved model does.
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert hf_shapes(arch) == theirs
    assert ("lm_head.weight" in theirs) is not tie_embeddings
    mapped = [name for mapping in llama_mappings(arch, 1) for name in mapping.hf]
    assert len(mapped) == len(set(mapped))
    assert set(mapped) == set(theirs)
    assert arch.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_every_stage_owns_its_consecutive_layers(make_arch, stages: int, tie_embeddings: bool):
    arch = make_arch(layers=4, tie_embeddings=tie_embeddings)
    mappings = list(llama_mappings(arch, stages))
    for mapping in mappings:
        name = mapping.hf[0]
        if "layers." in name:
            layer = int(name.split(".")[2])
            assert mapping.stage == layer * stages // 4
            assert f"decoder.layers.{layer % (4 // stages)}." in mapping.megatron
        else:
            assert mapping.stage == (0 if "embed_tokens" in name else stages - 1)
    owned = [(mapping.stage, mapping.megatron) for mapping in mappings]
    assert len(set(owned)) == len(owned)
    assert [m.hf for m in mappings] == [m.hf for m in llama_mappings(arch, 1)]


def test_only_a_last_stage_of_its_own_copies_the_tied_embedding(make_arch):
    (copy,) = copies_of_tied_embedding(make_arch(tie_embeddings=True), 2)
    assert (copy.megatron, copy.hf, copy.stage) == ("output_layer.weight", ("model.embed_tokens.weight",), 1)
    assert not list(copies_of_tied_embedding(make_arch(tie_embeddings=True), 1))
    assert not list(copies_of_tied_embedding(make_arch(tie_embeddings=False), 2))


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_push_announces_every_tensor_in_sending_order(make_arch, tie_embeddings: bool):
    arch = make_arch(tie_embeddings=tie_embeddings)
    specs = tensor_specs(arch)
    assert [spec.name for spec in specs] == [name for mapping in llama_mappings(arch, 2) for name in mapping.hf]
    assert sum(spec.num_bytes for spec in specs) == 4 * arch.num_parameters
    assert all(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)).nbytes == spec.num_bytes for spec in specs)


def test_receivers_together_hold_norms_and_scarce_key_value_heads_more_than_once(make_arch):
    arch = make_arch(heads=4, kv_heads=2, layers=1)  # hidden 16: a norm is 64 bytes, k or v 2 heads x 4 x 16 x 4 = 512
    whole = 4 * arch.num_parameters
    assert [bytes_held(arch, ranks) - whole for ranks in (1, 2, 4)] == [0, 3 * 64, 3 * 3 * 64 + 2 * 512]
