"""Solutions as training rows for the supervised warm start."""

from collections.abc import Sequence as Seq

from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Prompt, Sequence


def solved_prompts(prompts: Seq[Prompt], tokenizer: Tokenizer, context_length: int) -> dict[int, Sequence]:
    """Prompt, solution and end-of-sequence token as one row, by prompt index; too long ones are left out.

    Raises:
        DataError: not one prompt has a solution, or none that fits the context.
    """
    solved = {}
    for prompt in prompts:
        if prompt.solution is None:
            continue
        token_ids = [*prompt.token_ids, *tokenizer.encode(prompt.solution), tokenizer.eos_token_id]
        if len(token_ids) <= context_length:
            solved[prompt.index] = Sequence(token_ids=token_ids, prompt_length=len(prompt.token_ids))
    if all(prompt.solution is None for prompt in prompts):
        raise DataError(
            f"the warm start trains on solutions, and none of the {len(prompts)} training prompts has one; set "
            "data.solution_field to the field with good answers, or warm_start.steps = 0"
        )
    if not solved:
        shortest = min(
            len(prompt.token_ids) + len(tokenizer.encode(prompt.solution)) + 1
            for prompt in prompts
            if prompt.solution is not None
        )
        raise DataError(
            f"with its solution none of the {len(prompts)} training prompts fits the context of {context_length} tokens, "
            f"the shortest has {shortest}; raise model.context_length, or set warm_start.steps = 0"
        )
    return solved
