"""Rules inside the learner's section that need no model, with the arithmetic in the message.

Pydantic turns the `ValueError`s into the one line a user sees.
"""

from megatron_async_rlhf.config.sections import Device, Fp8Keys, LearnerSection


def check_parallelism(learner: LearnerSection) -> None:
    """Refuse ranks that cannot be arranged, and switches that have nothing to act on."""
    product = (
        f"tensor_parallel x pipeline_parallel x context_parallel = {learner.tensor_parallel} x "
        f"{learner.pipeline_parallel} x {learner.context_parallel} = {learner.model_ranks}"
    )
    if learner.world_size % learner.model_ranks:
        raise ValueError(f"learner.ranks = {learner.world_size} is not a multiple of {product}")
    if learner.sequence_parallel and learner.tensor_parallel == 1:
        raise ValueError(
            "learner.sequence_parallel divides tokens over the tensor-parallel ranks: learner.tensor_parallel = 1 "
            "must be at least 2"
        )
    if learner.virtual_stages > 1 and learner.pipeline_parallel == 1:
        raise ValueError(
            f"learner.virtual_stages = {learner.virtual_stages} interleaves chunks of pipeline stages: "
            "learner.pipeline_parallel = 1 must be at least 2"
        )
    if learner.copies == 1:
        for key, purpose in (
            ("distributed_optimizer", "divides Adam's state over data-parallel ranks"),
            ("overlap_grad_reduce", "hides the reduction over data-parallel ranks"),
        ):
            if getattr(learner, key):
                raise ValueError(
                    f"learner.{key} {purpose}: learner.ranks = {learner.world_size} / ({product}) = 1 must be at least 2"
                )
    if learner.share_prompts and learner.context_parallel > 1:
        raise ValueError(
            f"learner.share_prompts = true needs whole sequences on a rank, and learner.context_parallel = "
            f"{learner.context_parallel} divides them: set share_prompts = false, or context_parallel = 1"
        )
    if learner.overlap_param_gather and not (learner.distributed_optimizer and learner.overlap_grad_reduce):
        raise ValueError(
            "learner.overlap_param_gather hides what learner.distributed_optimizer has to gather: set that and "
            "learner.overlap_grad_reduce too"
        )


def check_device(device: Device, learner: LearnerSection) -> None:
    """Refuse what only a GPU can do, and what does not go together on one."""
    if device == "cpu":
        for key, value, off in (
            ("optimizer_offload", learner.optimizer_offload, 0),
            ("fp8", learner.fp8, None),
        ):
            if value != off:
                what = value.recipe if isinstance(value, Fp8Keys) else value
                raise ValueError(f"learner.{key} = {what} needs GPUs: set run.device = cuda, or remove it")
    if device == "cuda" and learner.share_prompts:
        raise ValueError(
            "learner.share_prompts = true takes attention that Transformer Engine lacks: set it to false, or run.device = cpu"
        )
    if learner.optimizer_offload and not learner.distributed_optimizer:
        raise ValueError(
            f"learner.optimizer_offload = {learner.optimizer_offload} is a kind of Megatron's distributed optimizer: set "
            "learner.distributed_optimizer = true, which takes learner.ranks that hold the same weights, or optimizer_offload = 0"
        )
    if device == "cuda" and learner.context_parallel > 1 and learner.precision == "fp32":
        raise ValueError(
            f"learner.context_parallel = {learner.context_parallel} on GPUs takes attention that has no float32: set "
            "learner.precision = bf16, or context_parallel = 1"
        )
    if learner.fp8 is not None and learner.precision != "bf16":
        raise ValueError(f"learner.fp8 goes with learner.precision = bf16, not {learner.precision}")
