"""`python -m megatron_async_rlhf` is `async-rlhf`."""

import os
import sys

if not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]  # `python -m` looks for modules where the user stands: a `random.py` there is not Python's

from megatron_async_rlhf.cli import main  # noqa: E402

main()
