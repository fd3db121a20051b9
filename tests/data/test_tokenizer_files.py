"""Random tokenizer directories: the same ids, special tokens and prompts as Transformers, or refused in one line."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from megatron_async_rlhf.data.conversation import one_turn
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import DataError

DIRECTORIES = 240
TEXTS = [
    "hello there",
    " Sort the letters of abc 123.",
    "a <think> b",
    "naïve e\u0301 日本語 🦆\n\n x",
    "  two  spaces ",
]
TOKENS = ["<eos>", "<user>", "<|im_start|>", "<|im_end|>", "<think>", "</s>", "<|endoftext|>", "ab"]
CLASSES = [
    "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer",
    "Qwen2TokenizerFast", "PreTrainedTokenizer", "NoSuchTokenizer", "BertTokenizer",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ bos_token }}{{ image_token }}"
    "{{ pad_token }}{{ unk_token }}{{ cls_token }}{{ my_token }}{% endfor %}"
)


class Spoiler:
    """Changes of a directory drawn from a seed."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory, self._random = directory, random.Random(seed)
        self._config: dict[str, Any] = json.loads((directory / "tokenizer_config.json").read_text())
        self._backend: dict[str, Any] = json.loads((directory / "tokenizer.json").read_text())

    def spoil(self) -> None:
        self._spoil_names()
        self._spoil_added_tokens()
        self._spoil_old_files()
        self._spoil_backend()
        self._spoil_template()
        self._write("tokenizer_config.json", self._config)
        model_type = self._random.choice(["llama", "mistral", "qwen2", "qwen3", None])
        if model_type is not None:
            self._write("config.json", {"model_type": model_type})

    def _spoil_names(self) -> None:
        if self._likely(0.4):
            self._config["tokenizer_class"] = self._random.choice(CLASSES)
        for name in ("eos_token", "bos_token", "pad_token", "unk_token", "image_token", "cls_token"):
            if self._likely(0.2):
                self._config[name] = self._random.choice([self._token(), self._entry("AddedToken"), None])
        for key in ("add_prefix_space", "legacy", "add_bos_token", "clean_up_tokenization_spaces"):
            if self._likely(0.1):
                self._config[key] = self._likely(0.5)

    def _spoil_added_tokens(self) -> None:
        size = len(self._backend["model"]["vocab"])
        if self._likely(0.35):
            kept = self._backend["added_tokens"] if self._likely(0.7) else []
            decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in kept}
            for index in self._random.sample([size, size + 1, size + 5, 300, 7], k=2):
                decoder[str(index)] = self._entry()
            self._config["added_tokens_decoder"] = decoder
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if self._likely(0.25):
                named = {"image_token": "<|image|>", "boi_token": self._token()}
                self._config[key] = self._random.choice([[self._token()], [self._entry("AddedToken")], named, None])

    def _spoil_old_files(self) -> None:
        if self._likely(0.3):
            names = ("eos_token", "pad_token", "my_token")
            found: dict[str, Any] = {
                name: self._random.choice([self._token(), self._entry()]) for name in names if self._likely(0.4)
            }
            if self._likely(0.4):
                found["additional_special_tokens"] = [self._token()]
            self._write("special_tokens_map.json", found)
        if self._likely(0.25):
            size = len(self._backend["model"]["vocab"])
            self._write("added_tokens.json", {self._token(): self._random.choice([size, size + 9, 300])})

    def _spoil_backend(self) -> None:
        if self._likely(0.15):
            backend = tokenizers.Tokenizer.from_str(json.dumps(self._backend))
            backend.enable_padding(pad_token="<user>", pad_id=258)
            backend.enable_truncation(4)
            self._backend = json.loads(backend.to_str())
        if self._likely(0.2):
            for token in self._backend["added_tokens"]:
                token["special"] = self._likely(0.7)
        self._write("tokenizer.json", self._backend)

    def _spoil_template(self) -> None:
        jinja = self._directory / "chat_template.jinja"
        others = [{"name": "default", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        match self._random.randrange(6):
            case 0:
                jinja.write_text(TEMPLATE)
            case 1:
                jinja.unlink()
                self._config["chat_template"] = self._random.choice(
                    [TEMPLATE, others, {"default": TEMPLATE, "rag": "x"}]
                )
            case 2:
                (self._directory / "additional_chat_templates").mkdir()
                name = self._random.choice(["rag", "default"])
                (self._directory / f"additional_chat_templates/{name}.jinja").write_text(TEMPLATE)

    def _likely(self, share: float) -> bool:
        return self._random.random() < share

    def _token(self) -> str:
        return self._random.choice(TOKENS)

    def _entry(self, kind: str | None = None) -> dict[str, Any]:
        flags = {flag: self._likely(0.2) for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        return {"content": self._token()} | flags | ({} if kind is None else {"__type": kind})

    def _write(self, name: str, content: Any) -> None:
        (self._directory / name).write_text(json.dumps(content))


def prompt_of(tokenizer: Any, text: str) -> list[int] | None:
    chat = [{"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    except Exception:  # templates raise anything
        return None


def test_random_directories_are_read_as_transformers_reads_them_or_refused(
    byte_directory: Path, bpe_directory: Path, llama_directory: Path, tmp_path: Path
):
    read = 0
    for seed in range(DIRECTORIES):
        directory = tmp_path / str(seed)
        shutil.copytree((byte_directory, bpe_directory, llama_directory)[seed % 3], directory)
        Spoiler(directory, seed).spoil()
        try:
            ours = Tokenizer.load(directory)
        except DataError as error:
            assert "\n" not in str(error) and str(directory) in str(error)
            continue
        read += 1
        theirs = AutoTokenizer.from_pretrained(directory)
        assert ours.eos_token_id == theirs.eos_token_id, seed
        assert ours.pad_token_id == (theirs.eos_token_id if theirs.pad_token is None else theirs.pad_token_id), seed
        assert ours.bos_token_id == theirs.bos_token_id, seed
        vocabulary = theirs.get_vocab()
        assert ours.vocab_size == len(theirs)
        assert ours.last_token == max((index, token) for token, index in vocabulary.items()), seed
        special = [str(token) for token in theirs.added_tokens_decoder.values() if token.special]
        for text in TEXTS:
            if not any(
                token in text for token in (*special, *theirs.all_special_tokens)
            ):  # else it stays text, see below
                assert ours.render_prompt(one_turn(text)) == prompt_of(theirs, text), (seed, text)
    assert read > DIRECTORIES / 3


@pytest.mark.parametrize("legacy", [True, False, None])
def test_the_class_of_llama_is_built_as_transformers_builds_it(
    llama_directory: Path, tmp_path: Path, legacy: bool | None
):
    """From `legacy` on depends whether a space comes before every piece between special tokens, or before the first."""
    directory = Path(shutil.copytree(llama_directory, tmp_path / "copy"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({} if legacy is None else {"legacy": legacy})))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    assert type(theirs).__name__ == "LlamaTokenizer"
    for text in TEXTS:
        ids = ours.render_prompt(one_turn(text))
        assert ids == prompt_of(theirs, text)
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_what_a_named_generation_block_sets_stays_inside(byte_directory: Path, tmp_path: Path):
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    template = (
        "{% set x = 'o' %}{% generation %}{% set x = 'i' %}{{ x }}{% endgeneration %}{{ x }}{{ messages[0].content }}"
    )
    (directory / "chat_template.jinja").write_text(template)
    assert bytes(Tokenizer.load(directory).render_prompt(one_turn("!"))) == b"io!"


def test_a_special_token_that_only_stands_alone_does_not_cut_a_prompt_in_two(byte_directory: Path, tmp_path: Path):
    """Right before a letter it is no token for Transformers, although it is one before the mark of the prompt's place."""
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    path = directory / "tokenizer.json"
    backend = json.loads(path.read_text())
    for token in backend["added_tokens"]:
        token["single_word"] = True
    path.write_text(json.dumps(backend))
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in ("hi", " hi "):
        assert ours.render_prompt(one_turn(text)) == prompt_of(theirs, text)
