import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from megatron_async_rlhf.data.builtin_task import make_examples
from megatron_async_rlhf.data.tokenizer import make_byte_tokenizer, train_bpe_tokenizer


@pytest.fixture(scope="session")
def byte_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bytes")
    make_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def bpe_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe_tokenizer(directory, [example.text for example in make_examples(0, 2000, "train")], 400)
    return directory


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary as SentencePiece makes it: spaces as ▁, bytes to fall back on."""
    directory = tmp_path_factory.mktemp("llama")
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"
    merges = [("▁", "t"), ("t", "h"), ("▁", "a"), ("i", "n"), ("e", "r"), ("o", "n"), ("▁", "s")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in merges)]
    vocab = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(
        "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]{{ eos_token }}x"
    )
    return directory
