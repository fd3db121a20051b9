from pathlib import Path

import pytest

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
