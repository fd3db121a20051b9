"""Whether the shell, container or pod that a command is started in lets a run be what its configuration says."""

import os

from megatron_async_rlhf.environment import environment_problems, ignored_line
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.limits import limit_problems


def check_surroundings(*further: str | None) -> list[str]:
    """Lines about what is ignored.

    Args:
        further: problems that somebody else has found; None where there was none.

    Raises:
        ConfigError: a line for each thing that a run can neither work with nor ignore.
    """
    found = [*environment_problems(os.environ), *limit_problems(), *filter(None, further)]
    if found:
        raise ConfigError("\n".join(found))
    return list(filter(None, [ignored_line(os.environ)]))
