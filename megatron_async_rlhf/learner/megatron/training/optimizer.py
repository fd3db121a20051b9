"""Megatron's optimizer and learning-rate schedule for one stage (warm start or RL) of a run."""

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_async_rlhf.config.sections import LearnerSection, OptimizerKeys
from megatron_async_rlhf.formats.stored import DTYPES
from megatron_async_rlhf.learner.megatron.training.data_parallel import ReplicatedChunks


def build_optimizer(
    model: ReplicatedChunks, learner: LearnerSection, keys: OptimizerKeys, steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """A fresh optimizer and a schedule that reaches `min_learning_rate` of `keys` after `steps`.

    With bf16 weights Adam works on float32 ones of its own and rounds them into the model after every step.

    Step `s` of a warmup of `w` steps trains at `learning_rate * (s + 1) / (w + 1)`: no step is spent at rate 0.
    """
    warmup_steps = min(keys.warmup_steps, steps - 1)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=keys.learning_rate,
            min_lr=keys.min_learning_rate,
            weight_decay=keys.weight_decay,
            adam_beta1=keys.adam_beta1,
            adam_beta2=keys.adam_beta2,
            adam_eps=keys.adam_eps,
            clip_grad=keys.clip_grad,
            bf16=learner.precision == "bf16",
            params_dtype=DTYPES[learner.weights_dtype],
            fp8_recipe=learner.fp8.recipe if learner.fp8 else None,
            use_distributed_optimizer=learner.distributed_optimizer,
            overlap_param_gather=learner.overlap_param_gather,
            optimizer_cpu_offload=learner.optimizer_offload > 0,
            optimizer_offload_fraction=learner.optimizer_offload,
            use_torch_optimizer_for_cpu_offload=True,
            overlap_cpu_optimizer_d2h_h2d=learner.optimizer_offload > 0,
        ),
        model.chunks,
        use_gloo_process_groups=False,  # separate gloo groups only matter beside NCCL ones
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=keys.learning_rate / (warmup_steps + 1),
        max_lr=keys.learning_rate,
        min_lr=keys.min_learning_rate,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(steps, 1),
        lr_decay_style=keys.lr_decay,
        start_wd=keys.weight_decay,
        end_wd=keys.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
    return optimizer, scheduler
