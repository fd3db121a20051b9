"""`python -m megatron_async_rlhf` is `async-rlhf`."""

import sys

# `python -m` looks for modules where the user stands first, and a `random.py` there is not Python's.
if not sys.flags.safe_path:
    del sys.path[0]

from megatron_async_rlhf.entry import main  # noqa: E402

main()
