"""`python -m megatron_async_rlhf` is `async-rlhf`."""

from megatron_async_rlhf.cli import main

main()
