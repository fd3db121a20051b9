"""What the files of a Hugging Face directory say of its tokenizer, put together as Transformers 5.19 does it.

    tokenizer.json             the vocabulary, and added tokens
    tokenizer_config.json      special tokens by name, more added tokens, templates, and the class
    special_tokens_map.json    as the two before, in directories of old; only counts without `added_tokens_decoder`
    added_tokens.json          likewise
    chat_template.jinja, additional_chat_templates/
                               go before the templates of tokenizer_config.json

Transformers itself is not used: importing its tokenizers takes seconds and brings torch, which the controller and a dry
run do without. What it would do and this module does not is refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megatron_async_rlhf.data.tokenizer_classes import PROBE, class_of, rebuild
from megatron_async_rlhf.errors import DataError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_OWN = "model_specific_special_tokens"
_CONFIG, _BACKEND, _MAP, _ADDED = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """
    Attributes:
        backend: with all added tokens, neither truncating nor padding.
        named: special tokens by name (`eos_token`...), as templates see them.
        template: of prompts without tools.
    """

    backend: Tokenizer
    named: dict[str, str]
    template: str


def read_tokenizer_files(directory: Path, template: Path | None = None) -> TokenizerFiles:
    """
    Args:
        template: file of another chat template.

    Raises:
        DataError: one is missing or broken, or asks for what this version does not do; one line.
    """
    if not (directory / _BACKEND).is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (directory / name).is_file()]
        only = f", only {others[0]}: save the tokenizer with Transformers' save_pretrained" if others else ""
        raise DataError(f"{directory}: no {_BACKEND} there{only or '; give a Hugging Face tokenizer directory'}")
    settings = _read_object(directory, _CONFIG) if (directory / _CONFIG).exists() else {}
    _refuse_unsupported(directory, settings)
    settings = _sorted_out(settings)
    backend = _read_backend(directory)
    padding = backend.padding
    # Both may be left over in the file from training; neither belongs here.
    backend.no_truncation()
    backend.no_padding()
    settings = _with_added_tokens(directory, settings)
    name = class_of(directory, settings.pop("tokenizer_class", None))
    if name is not None:
        backend, defaults = _rebuilt(directory, name, settings, backend)
        settings = defaults | settings
    if padding is not None:
        settings.setdefault("pad_token", padding["pad_token"])
    named, extra = _special_tokens(directory, settings)
    _check_eos(directory, backend, settings, named)
    _add_tokens(backend, settings["added_tokens_decoder"], named, extra)
    if name == "Qwen2Tokenizer":
        texts = dict.fromkeys(str(token) for token in (*named.values(), *extra))
        backend.add_tokens([AddedToken(text, special=True) for text in texts])
    names = {key: str(token) for key, token in named.items()}
    if template is not None:
        return TokenizerFiles(backend, names, _read_text(template, template.parent))
    return TokenizerFiles(backend, names, _read_template(directory, settings))


def _refuse_unsupported(directory: Path, settings: dict[str, Any]) -> None:
    where = f"{directory}: {_CONFIG}:"
    auto = settings.get("auto_map")
    if isinstance(auto, dict) and auto.get("AutoTokenizer") or isinstance(auto, list):
        raise DataError(
            f"{where} auto_map names code of the tokenizer's own, which is not run; remove it to do without"
        )
    if settings.get("split_special_tokens"):
        raise DataError(f"{where} split_special_tokens is not supported, a template could not open a turn; remove it")
    for key in ("fast_tokenizer_files", "init_inputs"):
        if settings.get(key):
            raise DataError(f"{where} {key} is not supported; save the tokenizer with Transformers' save_pretrained")
    if settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"):
        raise DataError(f"{where} a clean-up of the spaces of what was generated is not supported; turn it off")


def _sorted_out(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with one name for tokens without a name, and with tokens of the model's own names (`image_token`) apart.

    The order is Transformers'; it decides on the ids of tokens that the vocabulary lacks.
    """
    settings = dict(settings)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    own = {key: settings.pop(key) for key in list(settings) if _is_own_name(key) and isinstance(settings[key], str)}
    return _with_named_extras(settings, own)


def _with_named_extras(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    if isinstance(settings.get("extra_special_tokens"), dict):
        own = own | settings["extra_special_tokens"]
        settings = {key: value for key, value in settings.items() if key != "extra_special_tokens"}
    return settings | {_OWN: own}


def _is_own_name(key: str) -> bool:
    return key.endswith("_token") and key not in NAMES


def _with_added_tokens(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the tokens in them as `AddedToken`, and all added ones by id as `added_tokens_decoder`."""
    try:
        if "added_tokens_decoder" in settings:
            decoder = {int(index): AddedToken(**token) for index, token in settings["added_tokens_decoder"].items()}
        else:
            settings = _with_special_tokens_map(directory, settings)
            decoder = _added_by_old_files(directory, settings)
        settings = _as_tokens(settings) | {"added_tokens_decoder": decoder}
        known = {str(token): token for token in decoder.values()}
        for name in NAMES:
            if settings.get(name) is not None:
                settings[name] = known.get(str(settings[name]), settings[name])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{directory}: an added token cannot be understood ({error}); correct {_CONFIG}") from None
    return settings


def _with_special_tokens_map(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not (directory / _MAP).exists():
        return settings
    for key, value in _read_object(directory, _MAP).items():
        if isinstance(value, dict) and key != "extra_special_tokens":
            value = AddedToken(**{name: flag for name, flag in value.items() if name != "special"}, special=True)
        elif key == "extra_special_tokens" and isinstance(value, list):
            tokens = [AddedToken(**token, special=True) if isinstance(token, dict) else token for token in value]
            before = list(settings.get(key) or [])
            value = before + [token for token in tokens if token not in before]
        settings = settings | {key: value}
    return _with_named_extras(settings, settings[_OWN])


def _added_by_old_files(directory: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    found: dict[int, AddedToken] = {}
    if (directory / _ADDED).exists():
        special = {str(settings[name]) for name in NAMES if settings.get(name)}
        special |= {str(token) for token in settings.get("extra_special_tokens") or []}
        for text, index in _read_object(directory, _ADDED).items():
            is_special = text in special
            found[int(index)] = AddedToken(text, normalized=not is_special, special=is_special)
    for entry in _read_object(directory, _BACKEND).get("added_tokens") or []:
        index = entry.pop("id")
        found[index] = AddedToken(**entry)
    return found


def _as_tokens(value: Any) -> Any:
    """Every object that says it is an `AddedToken` as one."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return AddedToken(**{key: flag for key, flag in value.items() if key != "__type"})
    if isinstance(value, dict):
        return {key: _as_tokens(entry) for key, entry in value.items()}
    return [_as_tokens(entry) for entry in value] if isinstance(value, list) else value


def _rebuilt(
    directory: Path, name: str, settings: dict[str, Any], stored: Tokenizer
) -> tuple[Tokenizer, dict[str, str | None]]:
    """What the class builds of the vocabulary in `tokenizer.json`; it has to read text as the file itself says."""
    model = _read_object(directory, _BACKEND).get("model")
    try:
        backend, defaults = rebuild(name, model, settings)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{directory}: {_BACKEND} is none of a {name} ({error}); set tokenizer_class right") from None
    before, after = (made.encode(PROBE, add_special_tokens=False).ids for made in (stored, backend))
    if before != after:
        raise DataError(
            f"{directory}: Transformers makes a {name} of this directory, which does not read text as its {_BACKEND} says; "
            f"set tokenizer_class in {_CONFIG} to PreTrainedTokenizerFast to go by {_BACKEND}, or save the tokenizer with "
            f"Transformers 5 to go by {name}"
        )
    return backend, defaults


def _special_tokens(
    directory: Path, settings: dict[str, Any]
) -> tuple[dict[str, str | AddedToken], list[str | AddedToken]]:
    """By name, in Transformers' order; and those without a name."""
    old = settings.get("additional_special_tokens")  # of special_tokens_map.json
    extra = settings.get("extra_special_tokens", old) or []
    if not isinstance(extra, list):
        raise DataError(
            f"{directory}: extra_special_tokens = {extra!r} is neither a list nor an object; correct {_CONFIG}"
        )
    # `add_bos_token` is a flag.
    late = {key: value for key, value in settings.items() if _is_own_name(key) and isinstance(value, str | AddedToken)}
    named = {name: settings[name] for name in NAMES if settings.get(name) is not None} | late | settings[_OWN]
    for key, token in (*named.items(), *(("extra_special_tokens", token) for token in extra)):
        if not isinstance(token, str | AddedToken):
            raise DataError(f'{directory}: {key} is neither a string nor an object with "__type": "AddedToken"')
    return named, extra


def _check_eos(
    directory: Path, backend: Tokenizer, settings: dict[str, Any], named: dict[str, str | AddedToken]
) -> None:
    eos = named.get("eos_token")
    added = {str(token) for token in settings["added_tokens_decoder"].values()}
    if eos is None or (backend.token_to_id(str(eos)) is None and str(eos) not in added):
        if not (directory / _CONFIG).exists():
            raise DataError(f"{directory}: no {_CONFIG} there, which names the eos token; give a complete directory")
        said = "" if eos is None else f" (it says {str(eos)!r})"
        raise DataError(f"{directory}: {_CONFIG} names no eos token of the vocabulary{said}; set its eos_token")


def _add_tokens(
    backend: Tokenizer,
    decoder: dict[int, AddedToken],
    named: dict[str, str | AddedToken],
    extra: list[str | AddedToken],
) -> None:
    """Add what the vocabulary lacks, in Transformers' order, which decides on the ids of new tokens."""
    there = backend.get_added_tokens_decoder().values()
    known = {repr(token) for token in there}
    missing: list[str | AddedToken] = [token for _, token in sorted(decoder.items()) if repr(token) not in known]
    texts = {str(token) for token in (*there, *missing)}
    for token in (*named.values(), *extra):
        if str(token) not in texts and token not in missing:
            missing.append(token)
    names = {str(token) for token in named.values()}
    tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in missing]
    for token in tokens:
        token.special = token.special or str(token) in names
    if tokens:
        backend.add_tokens(tokens)


def _read_template(directory: Path, settings: dict[str, Any]) -> str:
    templates: Any = {
        path.stem: _read_text(path, directory) for path in sorted((directory / TEMPLATES).glob("*.jinja"))
    }
    if (directory / TEMPLATE).is_file():
        templates = {"default": _read_text(directory / TEMPLATE, directory)} | templates
    if not templates:
        templates = settings.get("chat_template")
    if isinstance(templates, list):  # several by name, as some models ship a second one for tools
        entries = [entry if isinstance(entry, dict) else {} for entry in templates]
        templates = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(templates, dict):
        if not isinstance(templates.get("default"), str):
            named = ", ".join(sorted(str(name) for name in templates))
            raise DataError(f"{directory}: of its chat templates ({named}) none is called default; call one so")
        templates = templates["default"]
    if not isinstance(templates, str):
        raise DataError(
            f"{directory}: no chat template, neither {TEMPLATE} nor the chat_template key of {_CONFIG}; add one"
        )
    return templates


def _read_backend(directory: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(directory / _BACKEND))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{directory}: {_BACKEND} cannot be read ({error}); restore the file") from None


def _read_object(directory: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory}: {name} cannot be read ({error}); restore the file") from None
    if not isinstance(found, dict):
        raise DataError(f"{directory}: {name} is not a JSON object; restore the file")
    return found


def _read_text(path: Path, directory: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        name = path.relative_to(directory)
        raise DataError(f"{directory}: {name} cannot be read ({error}); restore the file") from None
