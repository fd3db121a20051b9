"""Solutions as training rows for the supervised warm start."""

from collections.abc import Sequence as Seq

from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Prompt, Sequence


def solved_prompts(prompts: Seq[Prompt], tokenizer: Tokenizer, context_length: int) -> dict[int, Sequence]:
    """Prompt, solution and end-of-sequence token as one row, by prompt index; too long ones are left out.

    Raises:
        DataError: not one prompt has a solution that fits the context.
    """
    solved = {}
    for prompt in prompts:
        if prompt.solution is None:
            continue
        token_ids = [*prompt.token_ids, *tokenizer.encode(prompt.solution), tokenizer.eos_token_id]
        if len(token_ids) <= context_length:
            solved[prompt.index] = Sequence(token_ids=token_ids, prompt_length=len(prompt.token_ids))
    if not solved:
        raise DataError(
            f"none of the {len(prompts)} training prompts has a solution that fits the context of {context_length} "
            "tokens; set warm_start.steps = 0 or raise model.context_length"
        )
    return solved
