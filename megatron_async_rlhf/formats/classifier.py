"""What a Hugging Face directory says of a reward model: the family's class for sequence classification with one label.

    architectures     [<Family>ForSequenceClassification], by which vLLM takes it for a model to pool from
    id2label          one label, as Transformers writes `num_labels`
    problem_type      regression: vLLM then gives the reward itself, and not its sigmoid
    pad_token_id      Transformers reads the last token that is not this one, so the token that ends a sequence may not be it

No torch.
"""

import json
from pathlib import Path
from typing import Any

from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.models.families import FAMILIES

_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
# Both name the padding token, and Transformers reads either.
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_LABEL = "LABEL_0"


def describe_classifier(directory: Path) -> None:
    """Rewrite a language model's `config.json` as a reward model's, and the tokenizer's padding token to go with it.

    Of a model that is only described, without a tokenizer, nothing is known of the padding.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    has_tokenizer = (directory / _TOKENIZER).is_file()
    padding = Tokenizer.load(directory).padding_apart_from_end() if has_tokenizer else None
    path = directory / _CONFIG
    hf: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    hf |= {
        "architectures": [FAMILIES[hf["model_type"]].classifier_class],
        "id2label": {"0": _LABEL},
        "label2id": {_LABEL: 0},
        "problem_type": "regression",
        "pad_token_id": None if padding is None else padding[0],
    }
    hf.pop("num_labels", None)  # of files that somebody wrote by hand
    path.write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    if padding is not None:
        _name_padding(directory, padding[1])


def _name_padding(directory: Path, token: str) -> None:
    for place in (directory / name for name in _TOKENIZER_FILES):
        if place.is_file():
            settings = json.loads(place.read_text(encoding="utf-8"))
            text = json.dumps(settings | {"pad_token": token}, indent=2, ensure_ascii=False)
            place.write_text(text + "\n", encoding="utf-8")
