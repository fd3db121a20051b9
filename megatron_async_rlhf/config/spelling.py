"""Values in messages, as people write them in a configuration."""

from typing import Any

import yaml


def shown(value: Any) -> str:
    """A value as YAML writes it, on one line, cut short."""
    if value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    elif isinstance(value, dict | list):
        try:
            text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True, sort_keys=False)
        except yaml.YAMLError:
            text = str(value)
    else:
        text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
