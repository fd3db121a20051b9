"""From a template to one HTML file with everything inside it."""

import base64
import gzip
import json
from importlib import resources
from typing import Any

_PACKAGE = "megatron_async_rlhf"


def render(template: str, **values: Any) -> str:
    """
    Args:
        template: such as `report/page.html.jinja`, below the package; it includes scripts and styles with `asset(path)`.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader(_PACKAGE, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["asset"] = _text_of
    return environment.get_template(template).render(**values)


def packed(data: Any) -> str:
    """JSON, compressed, as text that a page's `unpacked()` reads. NaN and infinities are null there."""
    text = json.dumps(_finite(data), separators=(",", ":"), ensure_ascii=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def _text_of(path: str) -> str:
    return resources.files(_PACKAGE).joinpath(path).read_text(encoding="utf-8")


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity, and browsers refuse Python's."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data
