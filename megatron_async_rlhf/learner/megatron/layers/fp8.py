"""FP8 through Transformer Engine: what Megatron is told, and which device can do which recipe."""

from typing import Any

from megatron_async_rlhf.config.sections import Fp8Keys, Fp8Recipe, LearnerSection

# Tokens of a micro-batch must be a multiple: products of matrices come in tiles, and each block has one scale.
TOKEN_MULTIPLE: dict[Fp8Recipe, int] = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}

# First compute capability with the instructions.
_SINCE: dict[Fp8Recipe, tuple[int, int]] = {
    "delayed": (8, 9),
    "tensorwise": (8, 9),
    "blockwise": (9, 0),
    "mxfp8": (10, 0),
}


def fp8_keys(fp8: Fp8Keys) -> dict[str, Any]:
    """The keys of Megatron's `TransformerConfig`."""
    return {
        "fp8": "hybrid",  # E4M3 forward, E5M2 for gradients, which need the range
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": 1024 if fp8.recipe == "delayed" else 1,
        "fp8_amax_compute_algo": "max" if fp8.recipe == "delayed" else "most_recent",
        "first_last_layers_bf16": fp8.bf16_layers > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_layers,
        "num_layers_at_end_in_bf16": fp8.bf16_layers,
    }


def for_forward_passes(learner: LearnerSection) -> LearnerSection:
    """The section for a model that is never trained.

    Transformer Engine chooses scales of `delayed` from the passes before, but only where gradients are enabled:
    elsewhere they would stay at 1. `tensorwise` multiplies the same numbers with scales of its own.
    """
    if learner.fp8 is None or learner.fp8.recipe != "delayed":
        return learner
    return learner.model_copy(update={"fp8": learner.fp8.model_copy(update={"recipe": "tensorwise"})})


def fp8_problem(recipe: Fp8Recipe, capability: tuple[int, int], device: str) -> str | None:
    """Why a GPU cannot run a recipe, with the nearest one that it can; None if it can.

    Args:
        capability: compute capability of the GPU.
        device: its name.
    """
    if capability >= _SINCE[recipe]:
        return None
    possible = [other for other in ("blockwise", "tensorwise") if capability >= _SINCE[other]]
    way_out = f"set learner.fp8.recipe = {possible[0]}" if possible else "remove learner.fp8 to train in bf16"
    needed, found = (".".join(str(number) for number in version) for version in (_SINCE[recipe], capability))
    return f"learner.fp8.recipe = {recipe} needs compute capability {needed}, and {device} has {found}: {way_out}"


def possible_recipes(capability: tuple[int, int]) -> list[Fp8Recipe]:
    """What a GPU of this compute capability can run."""
    return [recipe for recipe, since in _SINCE.items() if capability >= since]
