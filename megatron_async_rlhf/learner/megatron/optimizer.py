"""Megatron's optimizer and learning-rate schedule for one stage (warm start or RL) of a run."""

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_async_rlhf.config.sections import OptimizerKeys


def build_optimizer(
    model: DistributedDataParallel, keys: OptimizerKeys, steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """A fresh optimizer and a schedule that reaches `min_learning_rate` after `steps`.

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
            use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
        ),
        [model],
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
