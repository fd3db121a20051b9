"""Text to token ids and back, without torch or Transformers.

A directory written here, or any Hugging Face directory with a `tokenizer.json`, gives the same ids as Transformers, or is
refused (`tokenizer_files`). The exception is on purpose: a special token spelled out in a prompt (`<eos>`) stays ordinary
text, so that no prompt can end a turn or open another one.

Some chat templates print today's date. A directory may say what day that is (`fix_date`), so that a run that is resumed
another day has the same prompts.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from megatron_async_rlhf.data.chat_template import ChatTemplate
from megatron_async_rlhf.data.tokenizer_files import TEMPLATE, TEMPLATES, read_tokenizer_files
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Message

_PAD, _EOS, _USER, _ASSISTANT = SPECIAL_TOKENS = ("<pad>", "<eos>", "<user>", "<assistant>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
_RAW_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first and message['role'] != 'assistant' %}{{ '\n\n' }}{% endif %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
BYTE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
DATE = "date.txt"  # not one of Hugging Face's, so an export does not have it


class Tokenizer:
    """The policy's tokenizer; make one with `Tokenizer.load`.

    Attributes:
        eos_token_id: ends a completion.
        pad_token_id: fills batches; the end-of-sequence token where the directory names no padding token.
        bos_token_id: None if the directory names none.
    """

    def __init__(self, directory: Path, now: datetime, template: Path | None = None) -> None:
        # Two instances, because whether special tokens in the input are recognised is a state of the tokenizer.
        files = read_tokenizer_files(directory, template)
        self._text_only = read_tokenizer_files(directory, template).backend
        self._with_specials, named = files.backend, files.named
        # A token with a name is never spelled by a prompt, even if the vocabulary does not call it special.
        plain = {token.content: token for token in self._text_only.get_added_tokens_decoder().values()}
        self._text_only.add_special_tokens([_special(plain[text]) for text in named.values() if text in plain])
        self._text_only.encode_special_tokens = True

        def token_id(name: str) -> int | None:
            return self._with_specials.token_to_id(named[name]) if name in named else None

        eos_token_id, pad_token_id = token_id("eos_token"), token_id("pad_token")
        assert eos_token_id is not None  # `read_tokenizer_files` looks for it
        self.eos_token_id: int = eos_token_id
        self.pad_token_id: int = eos_token_id if pad_token_id is None else pad_token_id
        self.bos_token_id: int | None = token_id("bos_token")
        added = self._text_only.get_added_tokens_decoder()
        self._specials = {index: token.content for index, token in added.items() if token.special}
        self._special_ids = set(self._specials)
        self._control_ids = self._special_ids - {token_id("unk_token")} | {self.eos_token_id}
        self._directory = directory
        self._template = ChatTemplate(files.template, named, now=now, where=str(directory))
        self._own_parts = lru_cache(maxsize=64)(self._parts)

    @classmethod
    def load(cls, directory: Path | str, *, template: Path | None = None, date_from: Path | None = None) -> "Tokenizer":
        """Read the tokenizer, its special tokens and the chat template of a directory.

        Args:
            template: file of another chat template.
            date_from: a directory with the date for the template, if it is not this one.

        Raises:
            DataError: one of them is missing or broken, or no end-of-sequence token is named.
        """
        directory = Path(directory)
        return cls(directory, _read_date(date_from or directory), template)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._with_specials.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of each token, added ones included."""
        return self._with_specials.get_vocab(with_added_tokens=True)

    @property
    def last_token(self) -> tuple[int, str]:
        """The largest id, above `vocab_size` - 1 where the vocabulary has holes, and its token."""
        return max((index, token) for token, index in self.vocabulary.items())

    def padding_apart_from_end(self) -> tuple[int, str] | None:
        """A special token that no sequence ends with, and its text: the padding token, if it is another than the
        end-of-sequence token, else one that looks like it, else the first; None if there is none.
        """
        others = {index: text for index, text in sorted(self._specials.items()) if index != self.eos_token_id}
        if self.pad_token_id in others:
            return self.pad_token_id, others[self.pad_token_id]
        return next(
            ((index, text) for index, text in others.items() if "pad" in text), next(iter(others.items()), None)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, nothing added; special tokens spelled out in it stay text.

        Raises:
            DataError: this vocabulary has no other spelling for a special token that is in the text.
        """
        ids = self._text_only.encode(text, add_special_tokens=False).ids
        if not self._control_ids.isdisjoint(ids):
            raise DataError(
                f"{self._directory}: the text {text[:60]!r} contains a special token that this tokenizer cannot spell"
                " as text; remove it from the data"
            )
        return ids

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the chat template around a conversation, up to where the assistant's answer begins.

        Raises:
            DataError: the template fails on these messages or leaves one out, or `encode` does.
        """
        return self._render(messages, is_answered=False)

    def render_conversation(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the chat template around a conversation that ends with the assistant's answer, all that it writes.

        Raises:
            DataError: as `render_prompt`.
        """
        return self._render(messages, is_answered=True)

    def render_answered(self, messages: Sequence[Message], prompt: list[int]) -> list[int]:
        """Ids of a conversation that ends with the assistant's answer, up to the end-of-sequence token behind that.

        They begin with those of `render_prompt`. A template that writes an answer in another way than it asks for one, or
        does not end it with this token, has no say: the answer's own tokens and the end follow the prompt.

        Args:
            prompt: what `render_prompt` makes of all messages but the answer.

        Raises:
            DataError: as `render_prompt`.
        """
        try:
            whole = self._render(messages, is_answered=True)
        except DataError:  # made for prompts alone
            whole = []
        if whole[: len(prompt)] == prompt and self.eos_token_id in whole[len(prompt) :]:
            return whole[: whole.index(self.eos_token_id, len(prompt)) + 1]
        return [*prompt, *self.encode(messages[-1].content), self.eos_token_id]

    def _render(self, messages: Sequence[Message], *, is_answered: bool) -> list[int]:
        rendered = self._template.render(messages, is_answered=is_answered)
        ids = self._encode_template(rendered)
        parts, specials = self._own_parts(tuple(message.role for message in messages), is_answered)
        if self._specials_of(ids) == specials or not self._brings_specials(rendered, parts):
            return ids
        # The messages brought special tokens of their own: only the template's parts may be read with them.
        contents = [message.content for message in messages]
        stripped = [content.strip() for content in contents]  # as many templates do
        for each in (contents, stripped):
            if "".join(each[part] if isinstance(part, int) else part for part in parts) == rendered:
                contents = each
        encoded = (
            self.encode(contents[part]) if isinstance(part, int) else self._encode_template(part) for part in parts
        )
        return list(chain.from_iterable(encoded))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of any ids; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        if skip_special_tokens and not self._special_ids.isdisjoint(ids):
            ids = [index for index in ids if index not in self._special_ids]
        return self._with_specials.decode(ids, skip_special_tokens=skip_special_tokens)

    def _parts(self, roles: tuple[str, ...], is_answered: bool) -> tuple[list[str | int], list[int]]:
        """What the template writes around messages of these roles, and the special tokens in it."""
        parts = self._template.parts(roles, is_answered=is_answered)
        own = (self._encode_template(part) for part in parts if isinstance(part, str))
        return parts, self._specials_of(chain.from_iterable(own))

    def _brings_specials(self, rendered: str, parts: Sequence[str | int]) -> bool:
        """Whether special tokens are spelled in a templated prompt that the template does not have by itself."""
        own = [part for part in parts if isinstance(part, str)]
        return any(rendered.count(text) > sum(part.count(text) for part in own) for text in self._specials.values())

    def _encode_template(self, text: str) -> list[int]:
        return self._with_specials.encode(text, add_special_tokens=False).ids

    def _specials_of(self, ids: Iterable[int]) -> list[int]:
        return [index for index in ids if index in self._special_ids]


def make_byte_tokenizer(directory: Path | str) -> None:
    """Write a tokenizer of 260 ids: 0 to 255 are the bytes themselves, then the special tokens."""
    _write(Path(directory), merges=[])


def train_bpe_tokenizer(directory: Path | str, texts: Iterable[str], vocab_size: int) -> None:
    """Write a byte-level BPE tokenizer of exactly `vocab_size` ids; the first 260 are those of the byte tokenizer.

    The same texts give the same tokenizer.

    Raises:
        DataError: `vocab_size` has no room for the bytes, or the texts do not have that many different pairs.
    """
    if vocab_size < BYTE_VOCAB_SIZE:
        raise DataError(
            f"model.vocab_size = {vocab_size} is too small for BPE: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            f" need at least {BYTE_VOCAB_SIZE}"
        )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    reached = BYTE_VOCAB_SIZE + len(merges)
    if reached < vocab_size:
        raise DataError(
            f"model.vocab_size = {vocab_size} is out of reach: the texts only give {reached} tokens; lower it to that"
        )
    _write(Path(directory), merges)


def set_chat_template(directory: Path | str, source: Path | Literal["none"] | None) -> None:
    """Give a tokenizer's directory another chat template: a file, or none; None leaves it its own.

    Without a template prompts are what the tokenizer makes of a text: its tokens, after those with which it begins every
    text. Messages are separated by empty lines, but an answer follows its prompt at once, and ends with its token.

    Raises:
        DataError: the file cannot be read, or the tokenizer.
    """
    if source is None:
        return
    place = Path(directory) / TEMPLATE
    shutil.rmtree(place.with_name(TEMPLATES), ignore_errors=True)  # what stands there may go before the file
    if source != "none":
        try:
            place.write_bytes(Path(source).read_bytes())
        except OSError as error:
            raise DataError(f"model.chat_template = {source}: cannot be read ({error.strerror}); correct it") from None
        return
    place.write_text(_RAW_TEMPLATE, encoding="utf-8")
    files = read_tokenizer_files(place.parent)
    begins = [token for token in files.backend.encode("").tokens if token != files.named["eos_token"]]
    place.write_text(f"{{{{ {json.dumps(''.join(begins))} }}}}{_RAW_TEMPLATE}", encoding="utf-8")


def fix_date(directory: Path | str) -> None:
    """Whenever this directory is read from now on, its chat template takes this moment for now."""
    (Path(directory) / DATE).write_text(datetime.now().isoformat(timespec="seconds") + "\n", encoding="utf-8")


def keep_date(source: Path, directory: Path) -> None:
    """The moment of another directory, if it has one."""
    if (source / DATE).is_file():
        shutil.copyfile(source / DATE, directory / DATE)


def day_in(directory: Path) -> date:
    """That a chat template prints.

    Raises:
        DataError: the directory has one that cannot be read.
    """
    return _read_date(directory).date()


def _write(directory: Path, merges: list[tuple[str, str]]) -> None:
    vocab: dict[str, int] = {}
    for token in (*_byte_symbols(), *SPECIAL_TOKENS, *(left + right for left, right in merges)):
        vocab[token] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # Words only bound what BPE may merge; without merges the whole text is one piece.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _EOS,
        "pad_token": _PAD,
        "clean_up_tokenization_spaces": False,  # the clean-up would alter what the policy wrote
    }
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table), [256]."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _read_date(directory: Path) -> datetime:
    path = directory / DATE
    if not path.is_file():
        return datetime.now()
    try:
        return datetime.fromisoformat(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory}: {DATE} cannot be read ({error}); write the day of the run's start there"
        ) from None


def _special(token: AddedToken) -> AddedToken:
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token.content, special=True, **flags)
