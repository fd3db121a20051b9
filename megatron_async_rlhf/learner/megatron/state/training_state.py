"""What of a learner goes into a checkpoint, as Megatron's sharded state dicts, and back out of one.

    model            every chunk's `sharded_state_dict`
    optimizer        Adam's state and, below float32, its main parameters, one entry per model parameter
    value            the same two of a value model, whose tensors' names begin with `value.`
    rng              each rank's generators; read back only by the same number of ranks
    common           policy version, steps that the optimizer made (less those without sequences), number of ranks: the same on all

Layers of Transformer Engine have an extra state beside their weights (scales of FP8). Where a checkpoint has none, of
layers from elsewhere, they begin with fresh ones; other layers pass over it.

The optimizer's entries have the same keys and shapes whether data-parallel ranks divide it or not, so that either kind
reads what the other wrote. What lies beside the tensors (groups, rates, step counts) is not saved: it follows from the
config, and for the rates from the version.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
)
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_async_rlhf.errors import LearnerError
from megatron_async_rlhf.formats.directory import TENSORS
from megatron_async_rlhf.formats.metadata import read_metadata
from megatron_async_rlhf.learner.megatron.state.divided_optimizer import fill, gathered_state, requested_state
from megatron_async_rlhf.learner.megatron.state.host_copy import on_host
from megatron_async_rlhf.learner.megatron.training.trained_model import TrainedModel

_METADATA = {"chained_optim_avoid_prefix": True}
_VALUE = "value"
_EXTRA_STATE = "_extra_state"


def weights_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state dict of the weights alone, of bare model chunks."""
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=dict(_METADATA))}
    return {f"model{i}": chunk.sharded_state_dict(metadata=dict(_METADATA)) for i, chunk in enumerate(chunks)}


def training_state(models: Sequence[TrainedModel], version: int, *, snapshot: bool) -> dict[str, Any]:
    """Sharded state dict of everything training continues from. Collective: a divided optimizer is gathered.

    Args:
        models: the policy, and the value model if there is one, which has made as many steps.
        snapshot: what this rank writes of it is a copy in host memory, which stays as it is while training continues.
    """
    policy, *others = models
    steps = policy.steps
    state = _model_state(policy, steps, snapshot=snapshot)
    for value_model in others:
        state[_VALUE] = _model_state(value_model, steps, _VALUE, snapshot=snapshot)
    state["rng"] = _rng_state()
    state["common"] = {"version": version, "steps": steps, "ranks": dist.get_world_size()}
    return state


def load_training_state(directory: Path, models: Sequence[TrainedModel], control: dist.ProcessGroup) -> int:
    """Fill models, fresh optimizers and fresh schedules, which keep the rates of their own config; the policy version.

    Collective.

    Args:
        models: as those of `training_state`.
        control: all ranks, to be of one mind about errors.

    Raises:
        LearnerError: no checkpoint of a run, or one whose optimizer belongs to other weights.
    """
    common = dist_checkpointing.load_common_state_dict(str(directory)).get("common")
    if common is None:
        raise LearnerError(f"{directory} holds weights, but no training state to continue from")
    steps = common["steps"]
    policy, *others = models
    request, kept = _request(policy, steps)
    for value_model in others:
        request[_VALUE], kept[_VALUE] = _request(value_model, steps, _VALUE)
    if common["ranks"] == dist.get_world_size():
        request["rng"] = _rng_state()
    _ask_for_saved_extra_states(request, directory)
    # A rank asks for what it keeps of a divided optimizer, which Megatron would take for gaps.
    loaded = dist_checkpointing.load(request, str(directory), validate_access_integrity=False)
    _load_model(policy, loaded, kept, steps)
    for value_model in others:
        _load_model(value_model, loaded[_VALUE], kept[_VALUE], steps)
    for model in models:
        model.steps = steps
        model.schedule.step(increment=common["version"])
    pairs = (pair for model in models for pair in _main_parameters(model))
    differing = torch.tensor(sum(not torch.equal(main.to(own.dtype), own) for main, own in pairs))
    dist.all_reduce(differing, group=control)
    if differing:
        raise LearnerError(
            f"{directory}: the float32 weights of its optimizer are not those of its model, as some layouts with "
            f"learner.distributed_optimizer once saved them; begin another run with model.hf = {directory}"
        )
    if "rng" in loaded:
        _set_rng_state(loaded["rng"])
    return common["version"]


def _model_state(model: TrainedModel, steps: int, name: str = "", *, snapshot: bool) -> dict[str, Any]:
    state, of_optimizer = _named_weights(model, name), {}
    if steps:  # before its first step Adam has no state
        inner = _inner(model.optimizer)
        if isinstance(inner, DistributedOptimizer):
            of_optimizer["optimizer"] = gathered_state(inner, state)
        else:
            sharded, _ = _undivided_state(inner, state, is_loading=False)
            of_optimizer["optimizer"] = on_host(sharded) if snapshot else sharded
    return (on_host(state) if snapshot else state) | of_optimizer


def _request(model: TrainedModel, steps: int, name: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """What to read of a model and its optimizer, and what of the optimizer is not saved."""
    request = _named_weights(model, name)
    kept: dict[str, Any] = {}
    if steps:
        _allocate_adam(model.optimizer, steps)
        inner = _inner(model.optimizer)
        if isinstance(inner, DistributedOptimizer):
            request["optimizer"], kept["optimizer"] = requested_state(inner, request), {}
        else:
            request["optimizer"], kept["optimizer"] = _undivided_state(inner, request, is_loading=True)
    return request, kept


def _ask_for_saved_extra_states(request: dict[str, Any], directory: Path) -> None:
    """Put nothing in the place of those that are not in the checkpoint, for which Megatron would refuse it."""
    saved = read_metadata(directory / TENSORS).state_dict_metadata

    def choose(entry: Any) -> Any:
        is_missing = (
            isinstance(entry, ShardedObject) and entry.key.endswith(_EXTRA_STATE) and entry.unique_key not in saved
        )
        return LocalNonpersistentObject(None) if is_missing else entry

    dict_list_map_inplace(choose, request)


def _named_weights(model: TrainedModel, name: str) -> dict[str, Any]:
    """The optimizer names its entries after these."""
    state = weights_state(model.chunks)
    if name:
        add_prefix_for_sharding(state, f"{name}.")
    return state


def _load_model(model: TrainedModel, loaded: dict[str, Any], kept: dict[str, Any], steps: int) -> None:
    load_chunks(model.chunks, loaded)
    if steps:
        _load_optimizer(model.optimizer, merge(kept["optimizer"], loaded["optimizer"]))
    else:
        for main, own in _main_parameters(model):
            main.copy_(own)
    adam = _inner(model.optimizer).optimizer
    if isinstance(adam, HybridDeviceOptimizer):
        for parameter, offloaded in adam.gpu_params_map_cpu_copy.items():
            offloaded.data.copy_(parameter)


def _main_parameters(model: TrainedModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Float32 parameters that the optimizer has of its own, and the model's that they are of; flat."""
    inner = _inner(model.optimizer)
    for parameter in (parameter for chunk in model.chunks for parameter in chunk.parameters()):
        main = getattr(parameter, "main_param", None)
        if main is None:
            continue
        own = parameter.detach().flatten()
        if isinstance(inner, DistributedOptimizer):
            part = inner._get_model_param_range_map(parameter)["param"]
            own = own[part.start : part.end]
        yield main.detach().flatten(), own


def load_chunks(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"])


def _inner(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """The one optimizer that Megatron puts into a chain of one for a dense model."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(chained) != 1:
        raise LearnerError(f"only one optimizer can be saved, not a chain of {len(chained)}")
    return chained[0]


def _undivided_state(inner: MegatronOptimizer, model_state: dict, *, is_loading: bool) -> tuple[dict, dict]:
    """The sharded part of the optimizer's state, and the rest, which is not saved."""
    state = inner.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(_METADATA))
    return extract_matching_values(state, lambda value: isinstance(value, ShardedBase))


def _load_optimizer(optimizer: MegatronOptimizer, state: dict) -> None:
    inner = _inner(optimizer)
    if isinstance(inner, DistributedOptimizer):
        fill(inner, state)
        return
    dict_list_map_inplace(lambda v: v.unwrap() if isinstance(v, LocalNonpersistentObject) else v, state)
    inner.load_state_dict(state)


def _allocate_adam(optimizer: MegatronOptimizer, steps: int) -> None:
    """Make room for the state that is about to be loaded; the step count is what it will be then.

    Torch's Adam has it in every parameter's state, Apex's and Transformer Engine's in the groups.
    """
    adam = _inner(optimizer).optimizer
    is_hybrid = isinstance(adam, HybridDeviceOptimizer)
    for part in adam.sub_optimizers if is_hybrid else [adam]:
        is_torch = isinstance(part, torch.optim.Adam)
        for group in part.param_groups:
            if not is_torch:
                group["step"] = steps
            for parameter in group["params"]:
                state = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                if is_torch:
                    device = parameter.device if group["fused"] else None
                    state["step"] = torch.tensor(float(steps), device=device)
                part.state[parameter] = state
    if is_hybrid:  # its own `load_state_dict` fails on float32 parameters
        adam._sync_sub_optimizers_state_to_hdo()


def _rng_state() -> ShardedObject:
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng_state", state, (dist.get_world_size(),), (dist.get_rank(),))


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    tracker = get_cuda_rng_tracker()
    if state["tracker"].keys() == tracker.get_states().keys():  # a CPU's, which draws nothing, has none
        tracker.set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
