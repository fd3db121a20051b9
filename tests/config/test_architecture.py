import dataclasses
import json
from pathlib import Path

import pytest
import torch
from published_models import LLAMA_3_1_8B, MISTRAL_7B_V0_3, PUBLISHED, QWEN_2_5_7B, QWEN_3_8B
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.models.architecture import Architecture, RopeScaling, architecture_of, architecture_of_hf
from megatron_async_rlhf.models.families import FAMILIES
from megatron_async_rlhf.models.layout_rules import check_layouts

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def refused(action, *parts: str) -> None:
    with pytest.raises(ConfigError) as error:
        action()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def write_hf(directory: Path, **changes) -> Path:
    config = {
        "model_type": "llama", "vocab_size": 99, "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-4,
        "rope_theta": 5000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    merged = {key: value for key, value in (config | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(merged))
    return directory


def test_a_fresh_model_takes_its_defaults(load):
    arch = architecture_of(load().model, 261)
    assert arch == Architecture(
        vocab_size=261, layers=4, hidden_size=128, ffn_size=96, heads=4, kv_heads=4, head_dim=32, context_length=96,
        rope_theta=10000.0, norm_eps=1e-5, tie_embeddings=False, init_std=0.02,
    )  # fmt: skip


def test_a_hugging_face_directory_gives_its_shape(tmp_path: Path):
    assert architecture_of_hf(write_hf(tmp_path)) == Architecture(
        vocab_size=99, layers=3, hidden_size=48, ffn_size=80, heads=6, kv_heads=2, head_dim=8, context_length=128,
        rope_theta=5000.0, norm_eps=1e-4, tie_embeddings=True, init_std=0.02,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", [None, SCALING])
def test_it_reads_what_transformers_writes_and_the_other_way_round(
    tmp_path: Path, family: str, scaling: RopeScaling | None
):
    head_dim = 10 if FAMILIES[family].free_head_size else 8
    arch = architecture_of_hf(write_hf(tmp_path, model_type=family, head_dim=head_dim, sliding_window=None))
    arch = dataclasses.replace(arch, rope_scaling=scaling, context_length=16384)
    assert arch.family == family
    AutoConfig.for_model(**arch.to_hf(eos_token_id=2)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in written and written["rope_parameters"]["rope_theta"] == 5000.0  # the new style
    assert architecture_of_hf(tmp_path) == arch
    (tmp_path / "config.json").write_text(json.dumps(arch.to_hf(eos_token_id=2)))  # the old style
    assert architecture_of_hf(tmp_path) == arch
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 5000.0
    assert theirs.rope_parameters["rope_type"] == ("llama3" if scaling else "default")
    assert theirs.rope_parameters.get("low_freq_factor") == (scaling and 1.0)
    assert (theirs.head_dim, theirs.num_key_value_heads, theirs.rms_norm_eps) == (head_dim, 2, 1e-4)
    assert getattr(theirs, "sliding_window", None) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_keys_mean_what_they_mean_to_transformers(tmp_path: Path, family: str):
    left_out = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    changes = {"model_type": family, "num_attention_heads": 64, "hidden_size": 4096, **dict.fromkeys(left_out, ...)}
    arch = architecture_of_hf(write_hf(tmp_path, **changes))
    theirs = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    head_dim = model.model.layers[0].self_attn.head_dim
    assert (arch.kv_heads, arch.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (arch.norm_eps, arch.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
    assert arch.tie_embeddings == theirs.tie_word_embeddings
    assert arch.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(tmp_path: Path, name: str):
    config, num_parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = architecture_of_hf(tmp_path)
    assert arch.num_parameters == num_parameters
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(model).__name__ == FAMILIES[arch.family].hf_class
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert model.model.layers[0].self_attn.head_dim == arch.head_dim
    assert (arch.rope_theta, arch.context_length) == (config.get("rope_theta", 1e4), config["max_position_embeddings"])
    assert arch.tie_embeddings == config["tie_word_embeddings"]


def test_the_numbers_of_rope_scaling_are_read(tmp_path: Path):
    old = write_hf(tmp_path, **LLAMA_3_1_8B)
    assert architecture_of_hf(old).rope_scaling == SCALING
    scaling = LLAMA_3_1_8B["rope_scaling"]
    new = LLAMA_3_1_8B | {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": scaling | {"rope_theta": 7.0}}
    arch = architecture_of_hf(write_hf(tmp_path, **new))
    assert (arch.rope_scaling, arch.rope_theta) == (SCALING, 7.0)
    incomplete = {key: value for key, value in scaling.items() if key != "low_freq_factor"}
    refused(lambda: architecture_of_hf(write_hf(tmp_path, rope_scaling=incomplete)), "no low_freq_factor")


@pytest.mark.parametrize("sliding_window", [32768, 40000, None])
def test_a_window_as_long_as_the_context_is_none(tmp_path: Path, sliding_window: int | None):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B_V0_3 | {"sliding_window": sliding_window}))
    assert architecture_of_hf(tmp_path).family == "mistral"


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "llama"])
@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_a_mixture_of_experts_is_refused(tmp_path: Path, model_type: str, key: str):
    refused(
        lambda: architecture_of_hf(write_hf(tmp_path, model_type=model_type, **{key: 8})),
        repr(model_type), "mixture of experts", "llama, mistral, qwen2, qwen3",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "only llama, mistral, qwen2, qwen3"]),
        ({"model_type": ...}, ["None", "only llama"]),
        ({"model_type": "qwen2_moe"}, ["mixture of experts"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["'linear'", "only default and llama3"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, ["'dynamic'", "only default and llama3"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["'yarn'", "only default and llama3"]),
        (QWEN_2_5_7B | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["'yarn'", "only default and llama3"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["differ between layers"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor = 0.5"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ({"attention_bias": True}, ["attention_bias", "only Qwen2"]),
        (QWEN_3_8B | {"attention_bias": True}, ["attention_bias", "only Qwen2"]),
        ({"mlp_bias": True}, ["mlp_bias", "without biases"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "only silu"]),
        (MISTRAL_7B_V0_3 | {"sliding_window": 4096}, ["sliding_window = 4096", "max_position_embeddings = 32768"]),
        (MISTRAL_7B_V0_3 | {"sliding_window": ...}, ["sliding_window = 4096", "max_position_embeddings = 32768"]),
        (QWEN_2_5_7B | {"use_sliding_window": True}, ["use_sliding_window", "only full attention"]),
        (QWEN_2_5_7B | {"head_dim": 64}, ["head_dim = 64", "hidden_size / num_attention_heads = 128"]),
        (QWEN_3_8B | {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "plain weights"]),
        ({"intermediate_size": ...}, ["no intermediate_size"]),
    ],
)
def test_an_unsupported_family_or_feature_is_named(tmp_path: Path, changes: dict, named: list[str]):
    refused(lambda: architecture_of_hf(write_hf(tmp_path, **changes)), f"model.hf = {tmp_path}", *named)


def test_a_directory_without_a_readable_config_is_named(tmp_path: Path):
    missing = tmp_path / "none"
    refused(lambda: architecture_of_hf(missing), f"model.hf = {missing}", "no config.json")
    (tmp_path / "config.json").write_text("{not json")
    refused(lambda: architecture_of_hf(tmp_path), f"model.hf = {tmp_path}", "cannot be read")


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"learner": {"tensor_parallel": 3}}, ["learner.tensor_parallel = 3", "divide the 4 attention heads"]),
        ({"generator": {"tensor_parallel": 8}}, ["generator.tensor_parallel = 8", "divide the 4 attention heads"]),
        (
            {"learner": {"tensor_parallel": 2}, "model": {"ffn_size": 95}},
            ["learner.tensor_parallel = 2", "divide the feed-forward size 95"],
        ),
        (
            {"generator": {"tensor_parallel": 2}, "model": {"heads": 6, "hidden_size": 60, "kv_heads": 3}},
            ["generator.tensor_parallel = 2", "3 key-value heads"],
        ),
        ({"learner": {"pipeline_parallel": 5}}, ["learner.pipeline_parallel = 5", "above the 4 layers"]),
        ({"learner": {"pipeline_parallel": 3}}, ["learner.pipeline_parallel = 3", "divide", "4 / 3 leaves 1"]),
        ({"generator": {"max_new_tokens": 96}}, ["generator.max_new_tokens = 96", "context of 96"]),
        ({"learner": {"micro_batch_tokens": 191}}, ["learner.micro_batch_tokens = 191", "2 x 96 = 192"]),
        ({"model": {"hidden_size": 62}}, ["model.hidden_size = 62", "multiple of model.heads = 4"]),
        ({"model": {"hidden_size": 60, "heads": 4}}, ["head size 15", "even"]),
        ({"model": {"hidden_size": 64}}, ["head size 16", "32, 64"]),
        ({"model": {"kv_heads": 3}}, ["model.kv_heads = 3", "divide model.heads = 4"]),
        ({"model": {"kv_heads": 8}}, ["model.kv_heads = 8", "divide model.heads = 4"]),
    ],
)
def test_a_layout_that_cannot_hold_the_model_is_refused(load, sections: dict, named: list[str]):
    config = load(**{"generator": {"max_new_tokens": 28}} | sections)
    refused(lambda: check_layouts(config, architecture_of(config.model, 261)), *named)


ON_GPUS = {"run": {"device": "cuda"}, "weights": {"transport": "nccl"}, "generator": {"max_new_tokens": 28}}


@pytest.mark.parametrize(
    ("learner", "model", "named"),
    [
        ({"fp8": {"bf16_layers": 2}}, {"layers": 4}, ["bf16_layers = 2", "none of the 4 layers"]),
        ({"pipeline_parallel": 4, "fp8": {"bf16_layers": 3}}, {"layers": 8}, ["bf16_layers = 3", "8 / 4 = 2 layers"]),
        ({"fp8": {}}, {"ffn_size": 104}, ["fp8.recipe = tensorwise", "multiples of 16", "feed-forward size", "104"]),
        ({"fp8": {}, "tensor_parallel": 2}, {"ffn_size": 80}, ["80 / 2 = 40", "lower learner.tensor_parallel"]),
        ({"fp8": {}, "tensor_parallel": 4}, {"hidden_size": 96}, ["query size", "96 / 4 = 24"]),
        (
            {"fp8": {"recipe": "mxfp8"}},
            {"hidden_size": 48},
            ["fp8.recipe = mxfp8", "multiples of 32", "hidden size", "48"],
        ),
        (
            {"fp8": {"recipe": "blockwise"}, "tensor_parallel": 2, "sequence_parallel": True},
            {"hidden_size": 192},
            ["fp8.recipe = blockwise", "whole blocks of 128", "192", "learner.sequence_parallel = false"],
        ),
    ],
)
def test_what_fp8_cannot_divide_is_refused(load, learner: dict, model: dict, named: list[str]):
    plain = {"layers": 12, "hidden_size": 128, "ffn_size": 256, "heads": 4}
    config = load(**ON_GPUS, learner={"precision": "bf16"} | learner, model=plain)
    check_layouts(config, architecture_of(config.model, 261))  # the change below is what it refuses
    config = load(**ON_GPUS, learner={"precision": "bf16"} | learner, model=plain | model)
    refused(lambda: check_layouts(config, architecture_of(config.model, 261)), *named)


def test_a_block_of_128_may_be_cut_short_where_nothing_is_gathered(load):
    """Transformer Engine 2.11 asks for 16 there (`cublaslt_gemm.cu`), and for 128 in `Float8BlockQuantizer.is_quantizable`."""
    model = {"layers": 4, "hidden_size": 192, "ffn_size": 288, "heads": 4}
    learner = {"precision": "bf16", "tensor_parallel": 2, "fp8": {"recipe": "blockwise"}}
    config = load(**ON_GPUS, learner=learner, model=model)
    check_layouts(config, architecture_of(config.model, 261))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"learner": {"tensor_parallel": 4, "pipeline_parallel": 4, "micro_batch_tokens": 192}},
        {"learner": {"tensor_parallel": 4}, "model": {"kv_heads": 1}},
        {"learner": {"tensor_parallel": 4}, "model": {"kv_heads": 2}},
        {"learner": {"tensor_parallel": 2}, "generator": {"tensor_parallel": 4, "max_new_tokens": 95}},
    ],
)
def test_a_layout_that_fits_is_accepted(load, sections: dict):
    config = load(**{"generator": {"max_new_tokens": 28}} | sections)
    check_layouts(config, architecture_of(config.model, 261))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_fit_the_usual_layouts(load, tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][0]))
    arch = architecture_of_hf(tmp_path)
    ranks = 2 if "0.5B" in name or name == "Qwen2.5-7B" else 8  # of 14 and of 28 heads
    learner = {"tensor_parallel": ranks, "pipeline_parallel": 2, "micro_batch_tokens": 2 * arch.context_length}
    check_layouts(load(learner=learner, generator={"tensor_parallel": ranks}), arch)


def test_an_explicit_head_size_frees_the_hidden_size_from_the_number_of_heads(load, tmp_path: Path):
    arch = architecture_of_hf(write_hf(tmp_path, model_type="qwen3", head_dim=32, hidden_size=80))
    assert arch.hidden_size % arch.heads
    check_layouts(load(generator={"max_new_tokens": 28}), arch)
