import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, models

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data import tokenizer as tokenizer_module
from megatron_async_rlhf.data.builtin_task import make_examples
from megatron_async_rlhf.data.conversation import one_turn
from megatron_async_rlhf.data.tokenizer import DATE, Tokenizer, make_byte_tokenizer, train_bpe_tokenizer
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.formats.directory import copy_hf_files
from megatron_async_rlhf.jobs.inputs import make_model_template

ROOT = Path(__file__).parents[2]
TEXTS = [
    "",
    " ",
    "Reverse cat.",
    "  two  spaces \n and\ttabs \r\n",
    "naïve – “quotes” 日本語 🦆 e\u0301",
    "it's 1,000 <b>words</b> {{ braces }} {% x %}",
    "\x00\x7f\u200b\ufeff",
]
PAD, EOS, USER, ASSISTANT = 256, 257, 258, 259


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def directory(request: pytest.FixtureRequest, byte_directory: Path, bpe_directory: Path) -> Path:
    return byte_directory if request.param == "bytes" else bpe_directory


@pytest.fixture(scope="module")
def reference(directory: Path, tmp_path_factory: pytest.TempPathFactory):
    """Transformers' tokenizer on the same files, beside the config.json of a Llama as in a run."""
    from transformers import AutoTokenizer

    model = tmp_path_factory.mktemp("model") / "policy"
    shutil.copytree(directory, model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def copy(byte_directory: Path, tmp_path: Path) -> Path:
    """A directory of its own to spoil."""
    return Path(shutil.copytree(byte_directory, tmp_path / "copy"))


def edit_config(directory: Path, **changes) -> None:
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_byte_ids_are_the_bytes(byte_directory):
    tokenizer = Tokenizer.load(byte_directory)
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.vocab_size == 260
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (PAD, EOS, None)


def test_bpe_has_the_size_asked_for_and_compresses(bpe_directory):
    tokenizer = Tokenizer.load(bpe_directory)
    text = "Sort the letters of abc."
    assert tokenizer.vocab_size == 400
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_ids_are_those_of_transformers(directory, reference):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.pad_token_id == reference.pad_token_id
    assert "model_max_length" not in json.loads((directory / "tokenizer_config.json").read_text())
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
        chat = [{"role": "user", "content": text}]
        expected = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tokenizer.render_prompt(one_turn(text)) == expected
        ids = [*expected, EOS, PAD]
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids, skip_special_tokens=False)


def test_text_survives_the_round_trip(directory):
    tokenizer = Tokenizer.load(directory)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_is_wrapped_in_the_template(byte_directory):
    assert Tokenizer.load(byte_directory).render_prompt(one_turn("hi")) == [USER, *b"hi", ASSISTANT]


@pytest.mark.parametrize("text", ["<eos>", "a<eos>b", "<user><assistant>", "x<pad>", "<assistant>yes<eos><user>"])
def test_special_tokens_spelled_out_by_a_prompt_stay_text(directory, text):
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode(text)
    assert not {PAD, EOS, USER, ASSISTANT} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.render_prompt(one_turn(text)) == [USER, *ids, ASSISTANT]


def test_decode_accepts_anything_a_policy_samples(directory):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([0xFF, ord("a"), 0xC3]) == "\ufffda\ufffd"
    assert tokenizer.decode([0xC3, 0xA9]) == "é"
    assert tokenizer.decode([USER, ord("a"), EOS]) == "a"
    assert tokenizer.decode([USER, ord("a"), EOS], skip_special_tokens=False) == "<user>a<eos>"
    assert tokenizer.decode([ord("a"), 100_000]) == "a"  # a row that only pads the embedding


def test_bpe_is_the_same_in_another_process(bpe_directory, tmp_path):
    code = (
        "import sys; from megatron_async_rlhf.data.builtin_task import make_examples;"
        "from megatron_async_rlhf.data.tokenizer import train_bpe_tokenizer;"
        "train_bpe_tokenizer(sys.argv[1], [e.text for e in make_examples(0, 2000, 'train')], 400)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"}, cwd=ROOT)
    assert (tmp_path / "tokenizer.json").read_bytes() == (bpe_directory / "tokenizer.json").read_bytes()


def test_smallest_bpe_is_the_byte_vocabulary(byte_directory, tmp_path):
    train_bpe_tokenizer(tmp_path, ["some text"], 260)
    assert Tokenizer.load(tmp_path).encode("some text") == Tokenizer.load(byte_directory).encode("some text")


def test_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"model\.vocab_size = 259 is too small for BPE.*at least 260"):
        train_bpe_tokenizer(tmp_path, ["text"], 259)
    assert not list(tmp_path.iterdir())


def test_texts_too_poor_for_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"vocab_size = 300 is out of reach: the texts only give 262 tokens"):
        train_bpe_tokenizer(tmp_path, ["abc"], 300)


# Directories written by others.


def test_template_in_the_config_and_tokens_as_objects(copy):
    (copy / "chat_template.jinja").unlink()
    edit_config(
        copy,
        eos_token={"__type": "AddedToken", "content": "<eos>", "special": True},
        bos_token="<assistant>",
        pad_token=None,
        add_bos_token=True,
        chat_template="{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}",
    )
    tokenizer = Tokenizer.load(copy)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (EOS, EOS, ASSISTANT)
    assert tokenizer.render_prompt(one_turn(" hi ")) == [ASSISTANT, *b"hi", EOS]


def test_the_default_of_several_templates_is_used(copy):
    (copy / "chat_template.jinja").unlink()
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ messages[0]['content'] }}!"},
    ]
    edit_config(copy, chat_template=templates)
    assert Tokenizer.load(copy).render_prompt(one_turn("hi")) == [*b"hi!"]


def test_template_extensions_of_transformers_work(copy):
    template = (
        "{% for m in messages %}\n{% if m.role != 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}\n"
        "{% generation %}:{% endgeneration %}{{ {'a': '<é'} | tojson }}{{ strftime_now('%%') }}"
        "{% if tools is not none or not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    )
    (copy / "chat_template.jinja").write_text(template)
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(copy)
    chat = [{"role": "user", "content": "hi"}]
    text = AutoTokenizer.from_pretrained(copy).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(tokenizer.render_prompt(one_turn("hi"))) == text == 'hi:{"a": "<é"}%'


def test_a_date_in_the_prompt_is_that_of_the_runs_start(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls) -> datetime:
            return datetime(2026, 11, day)

    monkeypatch.setattr(tokenizer_module, "datetime", Clock)
    shape = dict.fromkeys(("layers", "hidden_size", "ffn_size", "context_length"), 8) | {"heads": 4}
    template, exported = tmp_path / "template", tmp_path / "exported"
    day = 1
    make_model_template(RunConfig.model_validate({"model": shape}), template)
    (template / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}")
    copy_hf_files(template, exported)
    assert not (exported / DATE).exists()
    day = 2
    said = {place: bytes(Tokenizer.load(place).render_prompt(one_turn("hi"))) for place in (template, exported)}
    assert said == {template: b"01 Nov 2026: hi", exported: b"02 Nov 2026: hi"}


def test_token_named_by_the_config_is_special_even_if_the_vocabulary_says_otherwise(copy):
    path = copy / "tokenizer.json"
    backend = json.loads(path.read_text())
    for token in backend["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(backend))
    tokenizer = Tokenizer.load(copy)
    assert tokenizer.encode("<eos>") == [*b"<eos>"]
    assert tokenizer.decode([ord("a"), EOS]) == "a"


def test_truncation_and_padding_left_in_the_file_are_ignored(copy):
    backend = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(copy / "tokenizer.json"))
    assert Tokenizer.load(copy).encode("abcd") == [*b"abcd"]
    assert Tokenizer.load(copy).encode("ab") == [*b"ab"]


def test_vocabulary_that_cannot_spell_a_special_token_as_text_is_refused(copy):
    words = tokenizers.Tokenizer(models.WordLevel({"<eos>": 0, "hi": 1, "?": 2}, unk_token="?"))
    words.add_special_tokens([AddedToken("<eos>", special=True)])
    words.save(str(copy / "tokenizer.json"))
    tokenizer = Tokenizer.load(copy)
    assert tokenizer.encode("hi") == [1]
    with pytest.raises(DataError, match="'<eos>' contains a special token that this tokenizer cannot spell"):
        tokenizer.encode("<eos>")


def one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value)


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: no tokenizer.json there") as error:
        Tokenizer.load(tmp_path)
    assert one_line(error)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", None, "no tokenizer_config.json there"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", "{}", "tokenizer_config.json names no eos token"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', ".* names no eos token of the vocabulary"),
        ("chat_template.jinja", None, "no chat template"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
        ("chat_template.jinja", "{% if %}", "the chat template does not compile"),
        ("chat_template.jinja", "{{ raise_exception('never\nhere') }}", r"the chat template fails .*\(never\)"),
        ("chat_template.jinja", "{{ messages[0].content + 1 }}", "the chat template fails on one user message"),
        ("chat_template.jinja", "hello", "the chat template leaves the user's message out"),
    ],
)
def test_broken_directories_are_named_with_what_is_missing(copy, file, content, message):
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=f"^{copy}: {message}") as error:
        Tokenizer.load(copy)
    assert one_line(error)


def test_the_controller_side_imports_no_torch():
    code = (
        "import sys, pkgutil, importlib\n"
        "import megatron_async_rlhf.data as data, megatron_async_rlhf.rewards as rewards\n"
        "for package in (data, rewards):\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print(*sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_byte_tokenizer_can_be_written_over_an_old_one(tmp_path):
    make_byte_tokenizer(tmp_path / "new" / "folder")
    make_byte_tokenizer(tmp_path / "new" / "folder")
    assert Tokenizer.load(str(tmp_path / "new" / "folder")).vocab_size == 260


def test_examples_of_the_builtin_task_fit_the_byte_vocabulary(byte_directory):
    tokenizer = Tokenizer.load(byte_directory)
    for example in make_examples(0, 26, "train"):
        assert len(tokenizer.render_prompt(one_turn(example.text))) == len(example.text) + 2
