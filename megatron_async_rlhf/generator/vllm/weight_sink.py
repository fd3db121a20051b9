"""The receiving half of a weight push, inside every vLLM worker: vLLM's weight-transfer API, our backend."""

from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_async_rlhf.weights.buckets import TensorSpec
from megatron_async_rlhf.weights.push import receive_weights
from megatron_async_rlhf.weights.transports.gloo import GlooGroup


@dataclass
class SinkInit(WeightTransferInitInfo):
    """Where the group meets. `first_rank` is the group rank of this server's first worker."""

    host: str
    port: int
    first_rank: int
    world_size: int
    timeout_s: float


@dataclass
class SinkUpdate(WeightTransferUpdateInfo):
    """What one push holds: `tensors` are `TensorSpec`s as plain dicts, in sending order."""

    tensors: list[dict]
    staging_bytes: int
    verify: bool


class WeightSink(WeightTransferEngine[SinkInit, SinkUpdate]):
    """Loads pushed tensors through vLLM's layerwise reload, which repacks them as the first load did."""

    init_info_cls = SinkInit
    update_info_cls = SinkUpdate
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: SinkInit) -> None:
        self._group = GlooGroup(
            host=init_info.host,
            port=init_info.port,
            rank=init_info.first_rank + self.parallel_config.rank,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator after this, which a CPU worker does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SinkUpdate) -> None:
        specs = msgspec.convert(update_info.tensors, list[TensorSpec])
        with torch.device(self.device):
            receive_weights(
                self._group,
                specs,
                self.model.load_weights,
                staging_bytes=update_info.staging_bytes,
                verify=update_info.verify,
            )

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._group = None
