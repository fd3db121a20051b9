"""Model directories as people have them: what is in each, what Transformers makes of it, and what this project does.

Every case is built from a tiny model by one change. `docs/model_directories.md` is this table in words; write it with

    .venv/bin/python tests/model_directories/directory_cases.py
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        what: is in the directory, in words; names the case.
        config: keys of `config.json` the model is made with.
        change: what is done to the directory then.
        theirs: `loads`; `random`: with weights that the files lack; `refuses`; of its tokenizer for cases of that.
        ours: empty if it is loaded; else a part of the line it is refused with.
    """

    group: str
    what: str
    ours: str = ""
    theirs: str = "loads"
    family: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    change: Change = lambda directory: None


def edit(name: str, **changes: Any) -> Change:
    """Set keys of a JSON file; `...` removes one."""

    def change(directory: Path) -> None:
        path = directory / name
        content = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def config(**changes: Any) -> Change:
    return edit("config.json", **changes)


def tokenizer_config(**changes: Any) -> Change:
    return edit("tokenizer_config.json", **changes)


def both(*changes: Change) -> Change:
    def change(directory: Path) -> None:
        for one in changes:
            one(directory)

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def apply(directory: Path) -> None:
        path = directory / SINGLE
        save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, {"format": "pt"})

    return apply


def rename(change: Callable[[str], str]) -> Change:
    return tensors(lambda found: {change(name): tensor for name, tensor in found.items()})


def add(name: str, make: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Change:
    return tensors(lambda found: found | {name: make(found)})


def drop(name: str) -> Change:
    return tensors(lambda found: {other: tensor for other, tensor in found.items() if other != name})


def cast(dtype: torch.dtype, only: str = "") -> Change:
    return tensors(lambda found: {n: t.to(dtype) if only in n else t for n, t in found.items()})


def shards(change: Callable[[dict[str, str]], dict[str, str]] = lambda index: index, keep: str = "") -> Change:
    """Two shards and an index; `change` spoils the index, `keep` is a tensor that both shards have."""

    def apply(directory: Path) -> None:
        found = load_file(directory / SINGLE)
        files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(found)}
        for file in set(files.values()):
            part = {name: t for name, t in found.items() if files[name] == file or name == keep}
            save_file(part, directory / file, {"format": "pt"})
        (directory / SINGLE).unlink()
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": change(files)}))

    return apply


def bytes_of(change: Callable[[bytes], bytes], name: str = SINGLE) -> Change:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


def files(**content: str | None) -> Change:
    """Write text files, or remove them; `__` stands for a dot in a name."""

    def change(directory: Path) -> None:
        for name, text in content.items():
            path = directory / name.replace("__", ".")
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text)

    return change


def move(source: str, target: str) -> Change:
    return lambda directory: (directory / source).rename(directory / target)


def linked(directory: Path) -> None:
    """As in the cache of the Hugging Face hub."""
    blob = directory / "blobs" / "1f2e"
    blob.parent.mkdir()
    (directory / SINGLE).rename(blob)
    (directory / SINGLE).symlink_to(blob)


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / SINGLE), directory / "pytorch_model.bin")
    (directory / SINGLE).unlink()


def gap(raw: bytes) -> bytes:
    """Eight bytes that belong to no tensor, before the first one."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8) + raw[8 + length :]


def header(change: Callable[[bytes], bytes]) -> Change:
    def spoil(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        text = change(raw[8 : 8 + length])
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return bytes_of(spoil)


def hole(directory: Path) -> None:
    """260 tokens, the last of them with id 300."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["<assistant>"] = 300
    for token in content["added_tokens"]:
        token["id"] = content["model"]["vocab"][token["content"]]
    path.write_text(json.dumps(content))


def token(text: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": text, "special": True} | plain | flags


def added(*texts: str) -> dict[str, Any]:
    """`added_tokens_decoder` of the byte tokenizer's own special tokens and more."""
    own = ("<pad>", "<eos>", "<user>", "<assistant>")
    return {str(256 + i): token(text) for i, text in enumerate((*own, *texts))}


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{{ messages[0].content }}:"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
ROPE = {"rope_scaling": ..., "rope_parameters": ..., "rope_theta": ...}  # none of them
BIASES = {f"model.layers.{i}.self_attn.{p}_proj.bias": (64 if p in "qo" else 32) for i in (0, 1) for p in "qkvo"}


# One row a case, so that they can be read as a table.
# fmt: off
def _config_cases() -> Iterator[Case]:
    group = "config.json"
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        yield Case(group, f"a whole {family} model", family=family)
    yield Case(group, "tied embeddings", config={"tie_word_embeddings": True})
    yield Case(group, "a rope base at the top", change=config(**ROPE | {"rope_theta": 5e5}))
    yield Case(group, "no rope base at all", change=config(**ROPE))
    yield Case(group, "a rope base in rope_parameters", change=config(**ROPE | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}))
    yield Case(group, "a rope base at the top and another in rope_parameters", change=config(**ROPE | {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}))
    yield Case(group, "llama3 in rope_scaling (old style)", change=config(**ROPE | {"rope_theta": 5e5, "rope_scaling": LLAMA3}))
    yield Case(group, "llama3 in rope_parameters (new style)", change=config(**ROPE | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}))
    yield Case(group, "rope_scaling and another rope_parameters", change=config(**ROPE | {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}))
    yield Case(group, "rope_scaling with type = default", change=config(**ROPE | {"rope_scaling": {"type": "default"}}))
    yield Case(group, "rope_theta = null", "rope_theta = None", "refuses", change=config(**ROPE | {"rope_theta": None}))
    yield Case(group, "linear rope scaling", "rope scaling 'linear'", change=config(**ROPE | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    yield Case(group, "yarn rope scaling", "rope scaling 'yarn'", change=config(**ROPE | {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}}))
    yield Case(group, "llama3 without its numbers", "low_freq_factor", "refuses", change=config(**ROPE | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}))
    yield Case(group, "original_max_position_embeddings beside rope_scaling", "original_max_position_embeddings", change=config(**ROPE | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}))
    yield Case(group, "partial_rotary_factor = 0.5", "partial_rotary_factor = 0.5", change=config(partial_rotary_factor=0.5))
    yield Case(group, "attention_bias = true, and biases", "attention_bias", change=both(config(attention_bias=True), *(add(n, lambda found, size=size: torch.ones(size)) for n, size in BIASES.items())))
    yield Case(group, "mlp_bias = true, and no biases", "mlp_bias", "random", change=config(mlp_bias=True))
    yield Case(group, "head_dim = 32 of a hidden size of 96 and 2 heads", config={"hidden_size": 96, "head_dim": 32})
    yield Case(group, "head_dim = null", change=config(head_dim=None))
    yield Case(group, "head_dim left out", change=config(head_dim=...))
    yield Case(group, "head size 16 (on a CPU)", "head size 16", config={"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    yield Case(group, "hidden_size that is not a multiple of the heads", "multiple of num_attention_heads", "refuses", change=config(hidden_size=65))
    yield Case(group, "num_key_value_heads left out, as many as heads", config={"num_key_value_heads": 2}, change=config(num_key_value_heads=...))
    yield Case(group, "num_key_value_heads = null, as many as heads", config={"num_key_value_heads": 2}, change=config(num_key_value_heads=None))
    yield Case(group, "num_key_value_heads = null in a mistral model", "num_key_value_heads = None", "refuses", family="mistral", config={"num_key_value_heads": 2}, change=config(num_key_value_heads=None))
    yield Case(group, "head_dim = null in a qwen3 model", "head_dim = None", "refuses", family="qwen3", change=config(head_dim=None))
    yield Case(group, "num_key_value_heads left out of a mistral model", "num_key_value_heads = 8", "refuses", family="mistral", change=config(num_key_value_heads=...))
    yield Case(group, "a sliding window below the context", "sliding_window = 16", family="mistral", change=config(sliding_window=16))
    yield Case(group, "a sliding window as long as the context", family="mistral", change=config(sliding_window=96))
    yield Case(group, "use_sliding_window = true", "use_sliding_window", family="qwen2", change=config(use_sliding_window=True, sliding_window=16))
    yield Case(group, "layers of sliding attention", "layer_types", "refuses", family="qwen3", change=config(layer_types=["full_attention", "sliding_attention"], sliding_window=16, use_sliding_window=False))
    yield Case(group, "torch_dtype = float16, and weights in float32", change=config(torch_dtype="float16", dtype=...))
    yield Case(group, "hidden_act = gelu", "hidden_act 'gelu'", change=config(hidden_act="gelu"))
    yield Case(group, "rms_norm_eps left out", change=config(rms_norm_eps=...))
    yield Case(group, "pretraining_tp = 2", change=config(pretraining_tp=2))
    yield Case(group, "a key of other models (embedding_multiplier)", change=config(embedding_multiplier=12.0))
    yield Case(group, "architectures of a classifier", "architectures = ['LlamaForSequenceClassification']", change=config(architectures=["LlamaForSequenceClassification"]))
    yield Case(group, "architectures of another family", "architectures = ['MistralForCausalLM']", change=config(architectures=["MistralForCausalLM"]))
    yield Case(group, "architectures left out", change=config(architectures=...))
    yield Case(group, "quantization_config", "quantization_config", "refuses", change=config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))
    yield Case(group, "quantization_config without a method", "quantization_config", "refuses", change=config(quantization_config={}))
    yield Case(group, "a text_config, as of models that see", "text_config", "refuses", change=config(text_config={}))
    yield Case(group, "attention_bias = null", "attention_bias", "refuses", change=config(attention_bias=None))
    yield Case(group, "use_sliding_window = null", "use_sliding_window", "refuses", family="qwen2", change=config(use_sliding_window=None))
    yield Case(group, "layer_types for another number of layers", "layer_types", "refuses", change=config(layer_types=["full_attention"] * 3))
    yield Case(group, "layer_types in a mistral model", "layer_types", "refuses", family="mistral", change=config(layer_types=["full_attention"] * 2))
    yield Case(group, "head_dim = null in a qwen2 model", "head_dim = None", "refuses", family="qwen2", change=config(head_dim=None))
    yield Case(group, "rms_norm_eps = 1, a whole number", "rms_norm_eps = 1", "refuses", change=config(rms_norm_eps=1))
    yield Case(group, "tie_word_embeddings = null", "tie_word_embeddings = None", "refuses", change=config(tie_word_embeddings=None))
    yield Case(group, "vocab_size above the rows", f"{EMBEDDING} has shape", "refuses", change=config(vocab_size=320))
    yield Case(group, "vocab_size below the rows", f"{EMBEDDING} has shape", "refuses", change=config(vocab_size=264))
    yield Case(group, "fewer layers than are stored", "model.layers.1.", change=config(num_hidden_layers=1))
    yield Case(group, "more layers than are stored", "no tensor model.layers.2.", "random", change=config(num_hidden_layers=3))
    yield Case(group, "a number as a string", "hidden_size = '64'", "refuses", change=config(hidden_size="64"))
    yield Case(group, "another model_type", "'gpt2' is not supported", "random", change=config(model_type="gpt2"))
    yield Case(group, "a mixture of experts", "mixture of experts", change=config(num_local_experts=8))
    yield Case(group, "transformers_weights", "transformers_weights", change=both(move(SINGLE, "other.safetensors"), config(transformers_weights="other.safetensors")))
    yield Case(group, "no config.json", "no config.json", "refuses", change=files(config__json=None))
    yield Case(group, "a config.json cut short", "config.json cannot be read", "refuses", change=bytes_of(lambda raw: raw[:50], "config.json"))
    yield Case(group, "a config.json that is a list", "not a JSON object", "refuses", change=files(config__json="[]"))


def _tensor_cases() -> Iterator[Case]:
    group, tied = "weights", {"tie_word_embeddings": True}
    yield Case(group, "tied, and lm_head.weight equal to the embedding", config=tied, change=add(OUTPUT, lambda found: found[EMBEDDING].clone()))
    yield Case(group, "tied, and another lm_head.weight", "is not equal to model.embed_tokens.weight", config=tied, change=add(OUTPUT, lambda found: found[EMBEDDING] + 1))
    yield Case(group, "tied, and lm_head.weight equal but in another dtype", "is not equal to model.embed_tokens.weight", config=tied, change=both(cast(torch.bfloat16), add(OUTPUT, lambda found: found[EMBEDDING].float())))
    yield Case(group, "tied, and lm_head.weight alone", f"no tensor {EMBEDDING}", config=tied, change=rename(lambda name: OUTPUT if name == EMBEDDING else name))
    yield Case(group, "not tied, and no lm_head.weight", f"no tensor {OUTPUT}", "random", change=drop(OUTPUT))
    yield Case(group, "a layer's tensor missing", "no tensor model.layers.1.mlp.up_proj.weight", "random", change=drop("model.layers.1.mlp.up_proj.weight"))
    yield Case(group, "a tensor of another shape", "has shape (3, 3)", "refuses", change=add("model.layers.1.mlp.up_proj.weight", lambda found: torch.ones(3, 3)))
    yield Case(group, "a tensor too many", "v_head.weight has no place", change=add("v_head.weight", lambda found: torch.ones(1, 64)))
    yield Case(group, "biases that the family lacks", "q_proj.bias has no place", change=add("model.layers.0.self_attn.q_proj.bias", lambda found: torch.ones(64)))
    yield Case(group, "rotary tables of old files", change=add("model.layers.0.self_attn.rotary_emb.inv_freq", lambda found: torch.ones(16)))
    yield Case(group, "names without the prefix model.", "but embed_tokens.weight", config=tied, change=rename(lambda name: name.removeprefix("model.")))
    yield Case(group, "names with the prefix model. twice", "but model.model.embed_tokens.weight", change=rename(lambda name: f"model.{name}"))
    yield Case(group, "names with the prefix language_model.", "but language_model.model.embed_tokens.weight", "random", change=rename(lambda name: f"language_model.{name}"))
    yield Case(group, "weights in bfloat16", change=cast(torch.bfloat16))
    yield Case(group, "weights in float16", change=cast(torch.float16))
    yield Case(group, "matrices in bfloat16, norms in float32", change=both(cast(torch.bfloat16), cast(torch.float32, "norm")))
    yield Case(group, "weights in float64", "is F64", change=cast(torch.float64))
    yield Case(group, "one matrix in float8", "is F8_E4M3", change=cast(torch.float8_e4m3fn, "layers.0.mlp.up_proj"))
    yield Case(group, "one matrix in int8", "is I8", change=cast(torch.int8, "layers.0.mlp.up_proj"))


def _file_cases() -> Iterator[Case]:
    group = "weight files"
    yield Case(group, "two shards and an index", change=shards())
    yield Case(group, "a single file beside the index of other shards", change=files(model__safetensors__index__json='{"weight_map": {"x": "gone.safetensors"}}'))
    yield Case(group, "an index that names a shard that is not there", "gone.safetensors is missing", "refuses", change=shards(lambda index: index | {"model.norm.weight": "gone.safetensors"}))
    yield Case(group, "an index that names a tensor that no shard has", "has no tensor x", change=shards(lambda index: index | {"x": index[EMBEDDING]}))
    yield Case(group, "an index that leaves out a tensor of its shards", change=shards(lambda index: {n: f for n, f in index.items() if n != "model.norm.weight"}))
    yield Case(group, "an index that leaves out a shard", "no tensor", "random", change=shards(lambda index: {n: f for n, f in index.items() if "00001" in f}))
    yield Case(group, "a tensor in two shards", "and so has", change=shards(keep="model.norm.weight"))
    yield Case(group, "an index that is no JSON", "index.json cannot be read", "refuses", change=both(shards(), files(model__safetensors__index__json="{")))
    yield Case(group, "an index without weight_map", "index.json cannot be read", "refuses", change=both(shards(), files(model__safetensors__index__json="{}")))
    yield Case(group, "consolidated.safetensors beside the model", change=lambda directory: save_file({"x": torch.ones(1)}, directory / "consolidated.safetensors"))
    yield Case(group, "one safetensors file of another name", "only pytorch.safetensors", "refuses", change=move(SINGLE, "pytorch.safetensors"))
    yield Case(group, "model.fp16.safetensors alone", "only model.fp16.safetensors", "refuses", change=move(SINGLE, "model.fp16.safetensors"))
    yield Case(group, "pytorch_model.bin alone", "only pytorch_model.bin", change=pickled)
    yield Case(group, "a GGUF file alone", "only model.gguf", "refuses", change=move(SINGLE, "model.gguf"))
    yield Case(group, "a LoRA adapter alone", "holds an adapter", "refuses", change=both(move(SINGLE, "adapter_model.safetensors"), files(adapter_config__json='{"peft_type": "LORA", "base_model_name_or_path": "base"}')))
    yield Case(group, "a LoRA adapter beside the model", "holds an adapter", change=files(adapter_config__json='{"peft_type": "LORA", "base_model_name_or_path": "base"}'))
    yield Case(group, "links to files, as in the cache of the hub", change=linked)
    yield Case(group, "a link to a file that is not there", "is a link to a file that is not there", "refuses", change=lambda directory: ((directory / SINGLE).unlink(), (directory / SINGLE).symlink_to("gone")))
    yield Case(group, "a pointer of Git LFS", "pointer of Git LFS", "refuses", change=files(model__safetensors="version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"))
    yield Case(group, "an empty file", "not a safetensors file", "refuses", change=bytes_of(lambda raw: b""))
    yield Case(group, "a file cut short", "copy it again", "refuses", change=bytes_of(lambda raw: raw[:-100]))
    yield Case(group, "a file cut short in its header", "only the beginning of one", "refuses", change=bytes_of(lambda raw: raw[:100]))
    yield Case(group, "a file with bytes too many", "copy it again", "refuses", change=bytes_of(lambda raw: raw + b"12345678"))
    yield Case(group, "a header that begins with a space", change=header(lambda text: b" " + text))
    yield Case(group, "a header with a number about the file", "its header cannot be read", "refuses", change=header(lambda text: text.replace(b'"pt"', b"1")))
    yield Case(group, "a file with a gap between its tensors", "begins at byte 8", "refuses", change=bytes_of(gap))


def _tokenizer_cases() -> Iterator[Case]:
    group = "tokenizer"
    template = files(chat_template__jinja=CHATML)
    yield Case(group, "tokens of the template only in added_tokens_decoder", change=both(template, tokenizer_config(added_tokens_decoder=added("<|im_start|>", "<|im_end|>"))))
    yield Case(group, "tokens of the template only in additional_special_tokens", change=both(template, tokenizer_config(additional_special_tokens=["<|im_start|>", "<|im_end|>"])))
    yield Case(group, "tokens of the template only in extra_special_tokens, by name", change=both(template, tokenizer_config(extra_special_tokens={"start_token": "<|im_start|>", "end_token": "<|im_end|>"})))
    yield Case(group, "tokens of the template only in special_tokens_map.json", change=both(template, edit("special_tokens_map.json", additional_special_tokens=["<|im_start|>", "<|im_end|>"])))
    yield Case(group, "special_tokens_map.json beside added_tokens_decoder, which then counts alone", change=both(template, edit("special_tokens_map.json", additional_special_tokens=["<|im_start|>"]), tokenizer_config(added_tokens_decoder=added("<|im_end|>"))))
    yield Case(group, "tokens of the template only in added_tokens.json", change=both(template, edit("added_tokens.json", **{"<|im_start|>": 260, "<|im_end|>": 261})))
    yield Case(group, "the eos token only in special_tokens_map.json", change=both(tokenizer_config(eos_token=...), edit("special_tokens_map.json", eos_token=token("<eos>"))))
    yield Case(group, "special_tokens_map.json and tokenizer_config.json of different minds", change=edit("special_tokens_map.json", eos_token="<user>", pad_token="<eos>"))
    yield Case(group, "a token of the model's own name in the template", change=both(files(chat_template__jinja="{{ image_token }}" + PLAIN), tokenizer_config(image_token="<user>")))
    yield Case(group, "a padding token only in the padding of tokenizer.json", change=both(tokenizer_config(pad_token=...), edit("tokenizer.json", padding={"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 258, "pad_type_id": 0, "pad_token": "<user>"})))
    yield Case(group, "no eos token", "names no eos token", change=tokenizer_config(eos_token=...))
    yield Case(group, "an eos token that the vocabulary lacks", "names no eos token of the vocabulary (it says '</s>')", change=tokenizer_config(eos_token="</s>"))
    yield Case(group, "an eos token as an object that does not say it is one", "eos_token is neither a string", "refuses", change=tokenizer_config(eos_token={"content": "<eos>"}))
    yield Case(group, "an eos token as an object", change=tokenizer_config(eos_token=token("<eos>") | {"__type": "AddedToken"}))
    yield Case(group, "add_bos_token = true and a bos token", change=tokenizer_config(add_bos_token=True, bos_token="<user>"))
    yield Case(group, "several eos ids in generation_config.json", change=edit("generation_config.json", eos_token_id=[257, 258]))
    yield Case(group, "a vocabulary with a hole: 260 tokens, one with id 300", "'<assistant>' has id 300, the model only 272", change=hole)
    yield Case(group, "more tokens than embeddings", "has id 273, the model only 272", change=tokenizer_config(added_tokens_decoder=added(*(f"<{i}>" for i in range(14)))))
    yield Case(group, "split_special_tokens = true", "split_special_tokens", change=tokenizer_config(split_special_tokens=True))
    yield Case(group, "auto_map with code of its own", "auto_map", change=tokenizer_config(auto_map={"AutoTokenizer": ["tokenization.Own", None]}))
    yield Case(group, "a tokenizer_class that Transformers builds otherwise", "tokenizer_class 'GemmaTokenizer'", "refuses", change=tokenizer_config(tokenizer_class="GemmaTokenizer"))
    yield Case(group, "a tokenizer_class that Transformers does not know", "tokenizer_class 'OwnTokenizer'", change=tokenizer_config(tokenizer_class="OwnTokenizer"))
    yield Case(group, "LlamaTokenizer over a byte-level vocabulary", "Transformers makes a LlamaTokenizer", change=tokenizer_config(tokenizer_class="LlamaTokenizerFast"))
    yield Case(group, "GPT2Tokenizer over a byte-level vocabulary", change=tokenizer_config(tokenizer_class="GPT2Tokenizer"))
    yield Case(group, "a qwen2 model with any tokenizer_class", family="qwen2", change=tokenizer_config(tokenizer_class="PreTrainedTokenizerFast"))
    yield Case(group, "a mistral model with tekken.json", "tekken.json", "refuses", family="mistral", change=files(tekken__json="{}"))
    yield Case(group, "a mistral model with LlamaTokenizer, which Transformers does not heed", family="mistral", change=tokenizer_config(tokenizer_class="LlamaTokenizer"))
    yield Case(group, "tokenizer.model alone", "no tokenizer.json there, only tokenizer.model", "refuses", change=both(move("tokenizer.json", "tokenizer.model")))
    yield Case(group, "no tokenizer", "no tokenizer.json there", "refuses", change=files(tokenizer__json=None, tokenizer_config__json=None, chat_template__jinja=None))
    yield Case(group, "a tokenizer.json cut short", "tokenizer.json cannot be read", "refuses", change=bytes_of(lambda raw: raw[:100], "tokenizer.json"))
    yield Case(group, "no chat template", "no chat template", "refuses", change=files(chat_template__jinja=None))
    yield Case(group, "the template only in chat_template.json", "no chat template", "refuses", change=files(chat_template__jinja=None, chat_template__json=json.dumps({"chat_template": PLAIN})))
    yield Case(group, "the template in tokenizer_config.json", change=both(files(chat_template__jinja=None), tokenizer_config(chat_template=PLAIN)))
    yield Case(group, "a template in tokenizer_config.json, another in chat_template.jinja", change=tokenizer_config(chat_template=PLAIN))
    yield Case(group, "templates by name, one of them default", change=both(files(chat_template__jinja=None), tokenizer_config(chat_template=[{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": PLAIN}])))
    yield Case(group, "templates by name, none of them default", "none is called default", "refuses", change=both(files(chat_template__jinja=None), tokenizer_config(chat_template=[{"name": "rag", "template": PLAIN}])))
    yield Case(group, "additional_chat_templates/default.jinja beside chat_template.jinja", change=lambda directory: files(**{"additional_chat_templates/default.jinja": PLAIN})(directory))
    yield Case(group, "additional_chat_templates/ without a default", "none is called default", "refuses", change=both(files(chat_template__jinja=None), tokenizer_config(chat_template=PLAIN), lambda directory: files(**{"additional_chat_templates/rag.jinja": PLAIN})(directory)))
    yield Case(group, "a template with all that its environment offers", change=files(chat_template__jinja=(
        "{% if tools is none and documents is none %}{{ {'b': 'é<', 'a': [1]} | tojson(indent=1, sort_keys=true, ensure_ascii=true) }}{% endif %}"
        "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}{{ strftime_now('%%') }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}"
        "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ enable_thinking is defined }}"
    )))
    yield Case(group, "a template that does not allow a single user message", "the chat template fails", "refuses", change=files(chat_template__jinja="{{ raise_exception('a system message comes first') }}"))
# fmt: on


CASES = [*_config_cases(), *_tensor_cases(), *_file_cases(), *_tokenizer_cases()]
_THEIRS = {
    "loads": "loads it", "random": "takes random weights for what is missing, and warns", "refuses": "refuses it",
}  # fmt: skip


def build(case: Case, directory: Path, tokenizer: Path) -> None:
    """A model of two layers and 272 embeddings with the byte tokenizer in `tokenizer`, as the case has it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 272, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 96, "sliding_window": None, "tie_word_embeddings": False,
        "head_dim": 32, "eos_token_id": 257, "bos_token_id": None, "pad_token_id": 256,
    }  # fmt: skip
    made = AutoConfig.for_model(case.family, **shape | case.config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    for path in tokenizer.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    case.change(directory)


def as_markdown() -> str:
    """The table of the docs."""
    lines = []
    for group in dict.fromkeys(case.group for case in CASES):
        lines += ["", f"## {group[0].upper()}{group[1:]}" if group != "config.json" else f"## `{group}`", ""]
        lines += ["| In the directory | Transformers 5.19 | Here |", "|---|---|---|"]
        for case in CASES:
            if case.group == group:
                ours = f"refused: `... {case.ours} ...`" if case.ours else "loaded, equal to Transformers"
                lines.append(f"| {case.what} | {_THEIRS[case.theirs]} | {ours} |")
    return "\n".join(lines) + "\n"


DOCS = Path(__file__).parents[2] / "docs" / "model_directories.md"
BEGIN = "<!-- The tables below are written by tests/model_directories/directory_cases.py. -->\n"

if __name__ == "__main__":
    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(text[: text.index(BEGIN)] + BEGIN + as_markdown(), encoding="utf-8")
    sys.stdout.write(f"wrote {os.path.relpath(DOCS)}: {len(CASES)} cases\n")
