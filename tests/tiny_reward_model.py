"""A reward model with random weights, small enough to be made and served within a test."""

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_async_rlhf.data.tokenizer import BYTE_VOCAB_SIZE, make_byte_tokenizer


def make_reward_model(directory: Path, *, context: int = 128, labels: int = 1, seed: int = 0, **changes: int) -> Path:
    """A `LlamaForSequenceClassification` of bytes with two layers, as Transformers saves one.

    Its scores have a standard deviation of about 1, and two key-value heads for two tensor-parallel ranks.
    """
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=BYTE_VOCAB_SIZE,
        max_position_embeddings=context,
        num_labels=labels,
        pad_token_id=256,
        initializer_range=0.12,
        **(shape | {"num_key_value_heads": 2} | changes),
    )
    LlamaForSequenceClassification(config).save_pretrained(directory)
    make_byte_tokenizer(directory)
    return directory


def describe_reward_model(directory: Path, *, context: int = 128, **changes: object) -> Path:
    """As `make_reward_model`, but without weights, torch and Transformers: what a reward needs of a served model."""
    make_byte_tokenizer(directory)
    config = {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "vocab_size": BYTE_VOCAB_SIZE,
        "pad_token_id": 256,
        "id2label": {"0": "LABEL_0"},
    }
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def change_config(directory: Path, **values: object) -> None:
    """Overwrite keys of the model's config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def scores_of(directory: Path, conversations: Iterable[tuple[str, str]]) -> list[float]:
    """Logits of a prompt and a completion each, as Transformers computes them, one at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for prompt, completion in conversations:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        with torch.no_grad():
            found.append(model(torch.tensor([ids])).logits.item())
    return found
