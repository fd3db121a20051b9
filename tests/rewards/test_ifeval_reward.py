"""Instructions that a program can check: every type, on made and on the real prompts, and what cannot be checked."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_async_rlhf.config.rewards import IfevalRewardSection
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.rewards.ifeval import Ifeval
from megatron_async_rlhf.rewards.preflight import check_entry
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.rewards.verifier import Task
from megatron_async_rlhf.types import Completion, Prompt

IFEVAL = Path(__file__).parents[2].parent / "shared/data/ifeval/input_data.jsonl"
needs_ifeval = pytest.mark.skipif(not IFEVAL.is_file(), reason=f"the IFEval prompts are not at {IFEVAL}")
STRICT = Ifeval(mode="strict", aggregate="all")

# Of each language in the data, two sentences that langdetect knows.
SENTENCES = {
    "hi": "यह एक छोटा सा वाक्य है। मुझे किताबें पढ़ना बहुत पसंद है।",
    "kn": "ಇದು ಒಂದು ಸಣ್ಣ ವಾಕ್ಯ. ನನಗೆ ಪುಸ್ತಕಗಳನ್ನು ಓದುವುದು ತುಂಬಾ ಇಷ್ಟ.",
    "mr": "हे एक छोटे वाक्य आहे. मला पुस्तके वाचायला खूप आवडते आणि मी रोज वाचतो.",
    "vi": "Đây là một câu ngắn. Tôi rất thích đọc sách vào buổi tối.",
    "ko": "이것은 짧은 문장입니다. 저는 책 읽는 것을 아주 좋아합니다.",
    "sw": "Hii ni sentensi fupi. Ninapenda sana kusoma vitabu kila siku nyumbani.",
    "de": "Das ist ein kurzer Satz. Ich lese am Abend sehr gerne Bücher.",
    "pa": "ਇਹ ਇੱਕ ਛੋਟਾ ਵਾਕ ਹੈ। ਮੈਨੂੰ ਕਿਤਾਬਾਂ ਪੜ੍ਹਨਾ ਬਹੁਤ ਪਸੰਦ ਹੈ।",
    "fa": "این یک جمله کوتاه است. من خواندن کتاب را خیلی دوست دارم.",
    "ru": "Это короткое предложение. Я очень люблю читать книги по вечерам.",
    "bg": "Това е кратко изречение. Аз много обичам да чета книги вечер.",
    "pt": "Esta é uma frase curta. Eu gosto muito de ler livros à noite.",
    "gu": "આ એક નાનું વાક્ય છે. મને પુસ્તકો વાંચવાનું ખૂબ ગમે છે.",
    "te": "ఇది ఒక చిన్న వాక్యం. నాకు పుస్తకాలు చదవడం చాలా ఇష్టం.",
    "it": "Questa è una frase breve. Mi piace molto leggere libri la sera.",
    "ar": "هذه جملة قصيرة. أنا أحب قراءة الكتب كثيرا في المساء.",
    "ta": "இது ஒரு சிறிய வாக்கியம். எனக்கு புத்தகங்கள் படிப்பது மிகவும் பிடிக்கும்.",
    "fi": "Tämä on lyhyt lause. Pidän kovasti kirjojen lukemisesta iltaisin.",
    "ur": "یہ ایک چھوٹا سا جملہ ہے۔ مجھے کتابیں پڑھنا بہت پسند ہے۔",
    "th": "นี่คือประโยคสั้น ๆ ฉันชอบอ่านหนังสือมากในตอนเย็น",
    "ne": "यो एउटा सानो वाक्य हो। मलाई किताब पढ्न धेरै मन पर्छ र म दिनहुँ पढ्छु।",
    "bn": "এটি একটি ছোট বাক্য। আমি বই পড়তে খুব ভালোবাসি।",
}
ENGLISH = "this is a short sentence and it says that the weather is nice today"


def pair(name: str, arguments: dict) -> tuple[str, str]:
    """An answer that follows the instruction and one that does not, made from what the instruction says in words."""
    get = arguments.get

    def counted(piece: str, number: int, relation: str, filler: str = "nothing") -> tuple[str, str]:
        many, few = " ".join([piece] * number), " ".join([piece] * (number - 1)) or filler
        return (many, few) if relation == "at least" else (few, many)

    match name:
        case "keywords:existence":
            return " ".join(get("keywords")), "nothing"
        case "keywords:frequency":
            return counted(get("keyword"), get("frequency"), get("relation"))
        case "keywords:forbidden_words":
            return "0", f"0 {get('forbidden_words')[0]} 0"
        case "keywords:letter_frequency":
            return counted(get("letter"), get("let_frequency"), get("let_relation"), "0")
        case "language:response_language":
            return SENTENCES[get("language")], ENGLISH
        case "length_constraints:number_sentences":
            return counted("The cat sleeps.", get("num_sentences"), get("relation"), "")
        case "length_constraints:number_paragraphs":
            return "\n***\n".join(["text"] * get("num_paragraphs")), "\n***\n".join(
                ["text"] * (get("num_paragraphs") + 1)
            )
        case "length_constraints:number_words":
            return counted("word", get("num_words"), get("relation"), "")
        case "length_constraints:nth_paragraph_first_word":
            paragraphs = ["Other text"] * get("num_paragraphs")
            paragraphs[get("nth_paragraph") - 1] = f"{get('first_word')} and so on"
            return "\n\n".join(paragraphs), "\n\n".join(["Other text"] * get("num_paragraphs"))
        case "detectable_content:number_placeholders":
            return "[name] " * get("num_placeholders"), "[name] " * (get("num_placeholders") - 1) + "name"
        case "detectable_content:postscript":
            return f"text\n{get('postscript_marker')} more", "text"
        case "detectable_format:number_bullet_lists":
            return "* point\n" * get("num_bullets"), "* point\n" * (get("num_bullets") + 1)
        case "detectable_format:constrained_response":
            return "My answer is maybe.", "Perhaps."
        case "detectable_format:number_highlighted_sections":
            return "*part* " * get("num_highlights"), "part " * get("num_highlights")
        case "detectable_format:multiple_sections":
            parts = [f"{get('section_spliter')} {i}\ntext" for i in range(1, get("num_sections") + 1)]
            return "\n".join(parts), "text"
        case "detectable_format:json_format":
            return '```json\n{"a": [1]}\n```', "{'a': 1}"
        case "detectable_format:title":
            return "<<A title>>\ntext", "A title\ntext"
        case "combination:two_responses":
            return "one\n******\ntwo", "one\n***\ntwo"
        case "combination:repeat_prompt":
            return f"{get('prompt_to_repeat')}\ntext", "text"
        case "startend:end_checker":
            return f"text {get('end_phrase')}", f"{get('end_phrase')} text"
        case "startend:quotation":
            return f'"{ENGLISH}"', ENGLISH
        case "change_case:capital_word_frequency":
            return counted("LOUD", get("capital_frequency"), get("capital_relation"), "quiet")
        case "change_case:english_capital":
            return ENGLISH.upper(), ENGLISH
        case "change_case:english_lowercase":
            return ENGLISH, ENGLISH.upper()
        case "punctuation:no_comma":
            return "one two", "one, two"
    raise AssertionError(name)


def task(names: list[str], arguments: list[dict | None], text: str = "Say something.") -> Task:
    return Task(text, {"instruction_id_list": names, "kwargs": arguments})


def rows() -> Iterator[dict]:
    with IFEVAL.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


EVERY_KEY = {
    "num_words": None, "num_sentences": None, "relation": None, "keywords": None, "keyword": None, "frequency": None,
    "letter": None, "num_highlights": None, "language": None, "prompt_to_repeat": None,
}  # fmt: skip


@needs_ifeval
def test_of_all_541_prompts_each_instruction_has_an_answer_that_passes_and_one_that_fails():
    """Also with all keys of the table, most of them null, as Hugging Face's form of the data has them."""
    seen = set()
    for row in rows():
        assert STRICT.check(task(row["instruction_id_list"], row["kwargs"], row["prompt"])) is None, row["key"]
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            right, wrong = pair(name, arguments)
            for given in (arguments, EVERY_KEY | arguments):
                assert STRICT.judge(task([name], [given], row["prompt"]), right)[0] == 1.0, (row["key"], name, right)
                assert STRICT.judge(task([name], [given], row["prompt"]), wrong)[0] == 0.0, (row["key"], name, wrong)
            seen.add(name)
    assert len(seen) == 25


@needs_ifeval
def test_it_agrees_with_the_evaluation_of_the_package_on_all_541_prompts():
    """`if_verifiable.evaluate_output_for_sample`, on an answer to the first instruction with marks around it.

    Left out are the two prompts whose `#` and `!` the package replaces by a random letter.
    """
    from if_verifiable import IFEvalSample, evaluate_output_for_sample

    compared = 0
    for row in rows():
        if any(given.get("letter") in ("#", "!") for given in row["kwargs"]):
            continue
        answer = f"Sure:\n{pair(row['instruction_id_list'][0], row['kwargs'][0])[0]}\n*Bye*"
        _, scores = evaluate_output_for_sample("ifeval", IFEvalSample(**row), answer)
        given = task(row["instruction_id_list"], row["kwargs"], row["prompt"])
        assert STRICT.judge(given, answer)[1] == {
            "prompt_strict": scores.binary_strict,
            "instruction_strict": scores.partial_strict,
            "prompt_loose": scores.binary_loose,
            "instruction_loose": scores.partial_loose,
        }
        compared += 1
    assert compared == 539


def test_mode_and_aggregate_choose_what_is_trained_on():
    given = task(["punctuation:no_comma", "startend:quotation"], [{}, None])
    text = 'Here, it is:\n"one, two"'  # a comma; quoted without its first line

    def reward(mode: str, aggregate: str) -> float:
        return Ifeval(mode=mode, aggregate=aggregate).judge(given, text)[0]

    assert [reward("strict", "all"), reward("strict", "fraction")] == [0.0, 0.0]
    assert [reward("loose", "all"), reward("loose", "fraction")] == [0.0, 0.5]
    assert STRICT.judge(given, '<think>a, b</think>\n"one"')[0] == 1.0
    assert STRICT.judge(given, "")[1] == dict.fromkeys(STRICT.judge(given, text)[1], 0.0)


def test_a_mark_is_counted_as_the_letter_it_is_in_place_of_a_random_one():
    given = task(["keywords:letter_frequency"], [{"letter": "#", "let_frequency": 2, "let_relation": "at least"}])
    assert {STRICT.judge(given, "#a #b")[0] for _ in range(20)} == {1.0}
    assert {STRICT.judge(given, "abcdefghijklmnopqrstuvwxyz" * 2)[0] for _ in range(20)} == {0.0}


@pytest.mark.parametrize(
    ("names", "arguments", "says"),
    [
        (["punctuation:no_coma"], [{}], "no instruction 'punctuation:no_coma'; did you mean .*punctuation:no_comma"),
        (["startend:end_checker"], [{}], "startend:end_checker lack end_phrase"),
        (["startend:end_checker"], [{"end_phrase": None}], "lack end_phrase"),
        (["punctuation:no_comma"], [{"num_words": 3}], "no_comma are refused: .*num_words"),
        (["length_constraints:number_words"], [{"num_words": 9, "relation": "about"}], "are refused: .*about"),
        (
            ["length_constraints:number_words"],
            [{"num_words": -9, "relation": "at least"}],
            "num_words = -9 would be repl",
        ),
        (["punctuation:no_comma"], [], "not a list of 1 mappings"),
        (["punctuation:no_comma"], ["{}"], "are '{}', not a mapping"),
        ([], [], "is not a list of names"),
        ("punctuation:no_comma", [{}], "is not a list of names"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_the_run(names: object, arguments: list, says: str):
    wrong = STRICT.check(task(names, arguments))
    assert wrong is not None and re.search(says, wrong) and "\n" not in wrong


def prompt(names: list[str], arguments: list[dict]) -> Prompt:
    reference = {"instruction_id_list": names, "kwargs": arguments}
    return Prompt(index=0, text="Say it.", token_ids=[1], reference=reference, origin="train.jsonl:5")


def completion(text: str) -> Completion:
    return Completion(token_ids=[1], logprobs=[0.0], versions=[0], finished=True, text=text)


def test_workers_score_completions_and_what_they_fail_on_earns_nothing():
    """The model of sentences comes from its package, as no data of NLTK's is here."""
    section = IfevalRewardSection(workers=1)
    sentences = prompt(["length_constraints:number_sentences"], [{"num_sentences": 2, "relation": "at least"}])
    refused = prompt(["punctuation:no_comma"], [{"num_words": 3}])
    check_entry("reward", section, [sentences])
    with pytest.raises(DataError, match=r"train.jsonl:5 \('Say it.'\): its kwargs of punctuation:no_comma are refused"):
        check_entry("reward", section, [sentences, refused])

    async def go() -> None:
        reward = make_reward([section])
        try:
            right, wrong = await reward.score(
                sentences, [completion("Dr. A came. He left."), completion("Dr. A came.")]
            )
            assert (right.reward, wrong.reward) == (1.0, 0.0)
            assert right.metrics.keys() == set(section.metrics) and right.metrics["reward_failed"] == 0.0
            (failed,) = await reward.score(refused, [completion("a")])
            assert failed.metrics == dict.fromkeys(section.metrics, 0.0) | {"reward_failed": 1.0}
            assert "reward ifeval raised TypeError" in failed.failure and "train.jsonl:5" in failed.failure
        finally:
            reward.close()

    asyncio.run(go())
