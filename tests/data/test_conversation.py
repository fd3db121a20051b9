"""Conversations of every form, and what chat templates make of them, beside what Transformers makes of them."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from templates_in_use import TEMPLATES_IN_USE
from transformers import AutoTokenizer

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.data.conversation import one_turn, read_conversation, split_answer, text_of
from megatron_async_rlhf.data.source import completed, load_examples
from megatron_async_rlhf.data.tokenizer import Tokenizer, set_chat_template
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Message

# The chat templates of many models, as TRL ships them: without those for training, which only mark what the assistant
# said, and those that want images.
FOLDER = Path(find_spec("trl").origin).parent / "chat_templates"
TEMPLATES = [
    path
    for path in sorted(FOLDER.glob("*.jinja"))
    if not path.stem.endswith(("_training", "idefics3", "llava_next", "vlm"))
]
QUESTIONS = Path(__file__).parents[3] / "shared" / "data" / "mt_bench" / "question.jsonl"


def conversation(*contents: str, system: str | None = None) -> list[Message]:
    """The user begins, the assistant answers, and so on."""
    turns = [Message(("user", "assistant")[place % 2], content) for place, content in enumerate(contents)]
    return turns if system is None else [Message("system", system), *turns]


CONVERSATIONS = [
    one_turn("Hello"),
    one_turn(" spaces around \n"),
    one_turn("Größe 😀 e\u0301 \u200b中文"),
    one_turn("{{ not a template }} {% if %}"),
    conversation("Hi", "Hello.", "How old are you?"),
    conversation("Hi", "", "And now?"),
    conversation("Hi", "  Hello. \n", "Bye"),
    conversation("What is it?", system="Be brief."),
    conversation("a", "b", "c", "d", "e", system=" Answer\nin verse. "),
    conversation("x", system=""),
    conversation("x", system=" \n"),
    conversation("", "An answer.", "And now?"),
    conversation(" \n", "", "x\n\n"),
    conversation("same", "same", "same", system="same"),
    conversation("\u202eשלום\u202c", "👩‍👩‍👧 ẛ̣ ﬁ", "\u2028\u00a0\ufeff\x7f", system="İstanbul"),
    conversation("[INST] x [/INST]", "</s><|im_end|>", "[SYSTEM_PROMPT]", system="<|im_start|>system"),
    conversation('"quoted" \\n \\u0041 {"a": [1]}', "<think>\nno\n</think>\n\nYes.", "ok"),
]


def real_conversations() -> list[list[Message]]:
    lines = QUESTIONS.read_text().splitlines() if QUESTIONS.is_file() else []
    return [
        conversation(turns[0], "I do not know.", turns[1]) for turns in (json.loads(line)["turns"] for line in lines)
    ]


def with_template(directory: Path, source: str, form: str) -> Path:
    """A tokenizer's directory with this template, in one of the forms in which directories have it."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"bos_token": "<pad>"}
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    other = "{{ messages[0].content }} with {{ tools }}"
    if form == "in a file":
        (directory / "chat_template.jinja").write_text(source)
    elif form == "in the configuration":
        config["chat_template"] = source
    elif form == "in a list by name":
        named = {"tool_use": other, "default": source, "rag": other}
        config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    else:
        (directory / "chat_template.jinja").write_text(source)
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates/tool_use.jinja").write_text(other)
    path.write_text(json.dumps(config))
    return directory


def check_equal(directory: Path, conversations: list[list[Message]]) -> int:
    """Hold our rendering to that of Transformers; how many conversations the template does not refuse."""
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.load(directory)
    equal = 0
    for messages in conversations:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        except Exception:  # templates raise anything
            with pytest.raises(DataError, match="the chat template fails on") as error:
                ours.render_prompt(messages)
            assert "\n" not in str(error.value)
            continue
        assert ours.render_prompt(messages) == expected, messages
        equal += 1
    return equal


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_templates_give_what_transformers_gives(byte_directory: Path, tmp_path: Path, template: Path):
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    with_template(directory, template.read_text(), "in a file")
    assert check_equal(directory, CONVERSATIONS + real_conversations()) >= 5


@pytest.mark.parametrize(
    "form", ["in a file", "in the configuration", "in a list by name", "in a file, others in a folder"]
)
@pytest.mark.parametrize("name", TEMPLATES_IN_USE)
def test_templates_in_every_form_give_what_transformers_gives(
    byte_directory: Path, tmp_path: Path, name: str, form: str
):
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    with_template(directory, TEMPLATES_IN_USE[name], form)
    without_system = sum(messages[0].role != "system" for messages in CONVERSATIONS)
    equal = check_equal(directory, CONVERSATIONS)
    assert equal == (without_system if name == "Mistral v1" else len(CONVERSATIONS))
    assert check_equal(directory, real_conversations()) == len(real_conversations())


def test_contents_in_parts_are_what_a_template_makes_of_them(byte_directory: Path, tmp_path: Path):
    """Of one that takes parts; they are joined here, so that any other can take them as well."""
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    with_template(directory, TEMPLATES_IN_USE["Mistral v7"], "in a file")
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Größe "}, {"type": "text", "text": "of x?\n"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "Sure?"}]},
    ]
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert Tokenizer.load(directory).render_prompt(read_conversation(chat, "f:1")) == expected


def test_a_message_that_a_template_leaves_out_is_an_error(byte_directory: Path, tmp_path: Path):
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}{{ messages[-1].content }}")
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.render_prompt(conversation("a", system="b")) == list(b"ba")
    with pytest.raises(DataError, match=r"leaves message 2 of 3 \(assistant\) out"):
        tokenizer.render_prompt(conversation("a", "b", "c"))


@pytest.mark.parametrize("content", ["<eos>", "a<eos>b", "x<user>y<assistant>"])
def test_no_message_can_end_a_turn_or_open_another_one(byte_directory: Path, content: str):
    tokenizer = Tokenizer.load(byte_directory)
    for place in range(3):
        contents = ["first", "second", "third"]
        contents[place] = content
        messages = conversation(*contents)
        expected = []
        for message in messages:
            (role,) = tokenizer._encode_template(f"<{message.role}>")
            expected += [role, *content_ids(message.content)]
            expected += [tokenizer.eos_token_id] if message.role == "assistant" else []
        assert tokenizer.render_prompt(messages) == [*expected, *tokenizer._encode_template("<assistant>")]


def content_ids(text: str) -> list[int]:
    """Of the tokenizer of bytes: no special token among them."""
    return list(text.encode())


def test_a_template_that_strips_strips_what_brings_special_tokens(byte_directory: Path, tmp_path: Path):
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    (directory / "chat_template.jinja").write_text("{% for m in messages %}<user>{{ m.content | trim }}{% endfor %}")
    tokenizer = Tokenizer.load(directory)
    (user,) = tokenizer._encode_template("<user>")
    assert tokenizer.render_prompt(one_turn(" <eos> ")) == [user, *b"<eos>"]


LIST = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ("text", one_turn("text")),
        (LIST, conversation("u", "a", system="s")),
        ([{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], conversation("u", "a")),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], one_turn("ab")),
        ([{"role": "user", "content": ["a", "b"]}], one_turn("ab")),
        ([{"role": None, "content": None, "from": "human", "value": "u"}], one_turn("u")),
        ([{"role": "user", "content": "u", "from": None, "value": None}], one_turn("u")),
        ([{"role": "user", "content": "u", "name": "x", "tool_calls": None}], one_turn("u")),
    ],
)
def test_conversations_are_read(value: object, messages: list[Message]):
    assert read_conversation(value, "f:1") == messages


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "f:1 is a number, neither text nor a list of messages"),
        (["hi"], "f:1, message 1, is a string, not a mapping"),
        ([{"role": "user"}], "message 1, has 'role', and not `role` and `content`"),
        ([{}], "message 1, has nothing, and not"),
        ([{"role": 3, "content": "x"}], "has a number as its role"),
        ([{"role": None, "content": "x"}], "has null as its role"),
        ([{"role": "user", "content": None}], "has null as its content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of the content that is of the type 'image'"),
        ([{"role": "user", "content": [3]}], "a part of the content that is a number"),
        ([{"role": "user", "content": "\ud800"}], "message 1, is not valid Unicode"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(value: object, message: str):
    with pytest.raises(DataError) as error:
        read_conversation(value, "f:1")
    assert message in str(error.value) and str(error.value).startswith("f:1") and "\n" not in str(error.value)


def test_the_prompt_is_what_comes_before_the_last_answer():
    assert split_answer(conversation("a", "b", "c", "d"), "f:1") == (conversation("a", "b", "c"), "d")
    assert split_answer(conversation("a", "b", "c"), "f:1") == (conversation("a", "b", "c"), None)
    assert split_answer(conversation("a", "", system="s"), "f:1") == (conversation("a", system="s"), "")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "has no message to answer"),
        ([Message("assistant", "a")], "has no message to answer"),
        ([Message("system", "s")], "of the role 'system'"),
        ([Message("system", "s"), Message("assistant", "a")], "of the role 'system'"),
        ([Message("user", "u"), Message("assistant", "a"), Message("assistant", "b")], "of the role 'assistant'"),
        (one_turn(" \n"), "is empty"),
    ],
)
def test_without_a_message_to_answer_there_is_no_prompt(messages: list[Message], message: str):
    with pytest.raises(DataError, match=message):
        split_answer(messages, "f:1")


def test_text_is_what_the_user_said():
    assert text_of(conversation("a", system="s")) == "a"
    assert text_of(conversation("a", "b", "c", system="s")) == "user: a\n\nassistant: b\n\nuser: c"


def test_records_with_messages_become_examples(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    others = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "v"}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in (LIST, others)))
    data = DataSection(train=str(path), eval="builtin", prompt_field="messages")
    first, second = load_examples(data, "train", 0)
    assert (first.messages, first.solution, first.reference) == (conversation("u", system="s"), "a", {"solution": "a"})
    assert (second.messages, second.solution, second.reference) == (conversation("u", "b", "v"), None, {})
    data = data.model_copy(update={"system_prompt": "Be kind.", "instruction": "Answer in one word."})
    first, second = load_examples(data, "train", 0)
    assert first.messages == conversation("u\n\nAnswer in one word.", system="s")
    assert second.messages == conversation("u", "b", "v\n\nAnswer in one word.", system="Be kind.")


def test_the_instruction_follows_what_the_user_said_not_a_tool():
    data = DataSection(instruction="Answer in one word.")
    said = completed([*conversation("u", "b", "v"), Message("assistant", ""), Message("tool", "3")], data)
    assert said[2:] == [Message("user", "v\n\nAnswer in one word."), Message("assistant", ""), Message("tool", "3")]


def test_the_same_words_to_another_system_message_are_another_prompt(tmp_path: Path):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    turns = [[{"role": "system", "content": name}, {"role": "user", "content": "u"}] for name in ("s", "t")]
    train.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    held_out.write_text(json.dumps({"messages": turns[0]}) + "\n")
    data = DataSection(train=str(train), eval=str(held_out), eval_prompts=1, prompt_field="messages")
    (example,) = load_examples(data, "train", 0)
    assert example.messages == conversation("u", system="t")


def test_another_chat_template_takes_the_place_of_the_models_own(byte_directory: Path, tmp_path: Path):
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "default.jinja").write_text("{{ messages[0].content }}!")
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}?")
    set_chat_template(directory, None)
    assert bytes(Tokenizer.load(directory).render_prompt(one_turn("a"))) == b"a!"
    set_chat_template(directory, tmp_path / "own.jinja")
    assert bytes(Tokenizer.load(directory).render_prompt(one_turn("a"))) == b"a?"
    with pytest.raises(DataError, match=r"model.chat_template = .*gone.jinja: cannot be read \(No such file"):
        set_chat_template(directory, tmp_path / "gone.jinja")


@pytest.mark.parametrize("kind", ["bytes", "bpe", "llama"])
def test_without_a_template_prompts_are_what_the_tokenizer_makes_of_a_text(
    kind: str, byte_directory: Path, bpe_directory: Path, llama_directory: Path, tmp_path: Path
):
    source = {"bytes": byte_directory, "bpe": bpe_directory, "llama": llama_directory}[kind]
    directory = Path(shutil.copytree(source, tmp_path / "copy"))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    theirs = AutoTokenizer.from_pretrained(directory)
    set_chat_template(directory, "none")
    ours = Tokenizer.load(directory)
    for text in ("Hello", "Größe: 3", " spaces ", "SUBREDDIT: r/x\n\nTL;DR:"):
        assert ours.render_prompt(one_turn(text)) == theirs(text)["input_ids"]
    assert ours.render_prompt(conversation("a", system="b")) == theirs("b\n\na")["input_ids"]
