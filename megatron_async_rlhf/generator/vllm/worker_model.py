"""One vLLM worker's model as a place to put already sharded weights, whatever the device made of them.

On a GPU a parameter is plain memory and slices go straight into it. On a CPU vLLM repacks the matrix of a linear layer
for oneDNN and drops the original: there a new matrix is put together beside it and packed when it is complete.
"""

import torch

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.layout import generator_pieces, parameter_shapes
from megatron_async_rlhf.weights.receive import Check

_PLAIN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "NoneType"}


class WorkerModel:
    """See `weights.receive.Target`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())  # a tied embedding once, under its first name
        self._packers = {name: self._modules_packing(name) for name in self._parameters}
        self._assembled: dict[str, torch.Tensor] = {}

    @property
    def in_place(self) -> bool:
        return not any(self._packers.values())

    def check(self, arch: Architecture, ranks: int, rank: int, dtype: str) -> None:
        """Refuse a model that a push would not fill, or not completely.

        Raises:
            TransferError: names the first parameter that is missing, surplus, of another shape, type or quantized.
        """
        planned = parameter_shapes(generator_pieces(arch, ranks, rank))
        for name, parameter in self._parameters.items():
            method = type(getattr(self._owner(name), "quant_method", None)).__name__
            if method not in _PLAIN_METHODS:
                raise TransferError(f"{name} is quantized by {method}; only unquantized generators can be pushed to")
            is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
            if name not in planned and not is_vocabulary:  # a worker's share of the vocabulary may be all padding
                raise TransferError(f"no weights are planned for {name}; the family's table lacks it")
            shape = self._shape(name)
            expected = planned.get(name, shape)
            fits = shape[0] >= expected[0] if is_vocabulary else shape[0] == expected[0]
            if not fits or shape[1] != expected[1]:
                raise TransferError(f"{name} is {list(shape)} on this worker, the plan says {list(expected)}")
            if name.endswith("weight") and str(parameter.dtype) != f"torch.{dtype}":
                raise TransferError(f"{name} is {parameter.dtype}, the learner sends {dtype}; set generator.dtype")
        missing = sorted(set(planned) - set(self._parameters))
        if missing:
            raise TransferError(f"this worker has no parameter {missing[0]}")

    def open(self, parameter: str) -> torch.Tensor:
        live = self._parameters[parameter]
        if live.numel():
            return live.data
        if parameter not in self._assembled:
            self._assembled[parameter] = torch.empty(self._shape(parameter), dtype=live.dtype, device=live.device)
        return self._assembled[parameter]

    def complete(self, parameter: str, check: Check) -> None:
        check(self.open(parameter))
        for module in self._packers[parameter]:
            module.cpu_linear = None  # frees the old packed matrix before the new one is made
            if parameter in self._assembled:
                module.weight = torch.nn.Parameter(self._assembled.pop(parameter), requires_grad=False)
            module.quant_method.process_weights_after_loading(module)
            self._parameters[parameter] = module.weight

    def resident(self, parameter: str) -> torch.Tensor:
        """What the engine computes with, [rows, columns].

        A packed matrix is multiplied with the identity: exact for finite weights, but a zero loses its sign.
        """
        live = self._parameters[parameter]
        if not self._packers[parameter]:
            return live.data.view(live.shape[0], -1)
        rows, cols = self._shape(parameter)
        module = self._packers[parameter][0]
        blocks = torch.eye(cols, dtype=live.dtype).split(256)
        return torch.cat([module.cpu_linear(block, module.weight, None) for block in blocks]).t().contiguous()

    def _owner(self, parameter: str) -> torch.nn.Module:
        return self._model.get_submodule(parameter.rpartition(".")[0])

    def _modules_packing(self, parameter: str) -> list[torch.nn.Module]:
        """Modules that multiply with a packed copy of this parameter: its layer, and the head if they are tied."""
        live = self._parameters[parameter]
        sharing = (module for module in self._model.modules() if module._parameters.get("weight") is live)
        packing = [module for module in sharing if hasattr(module, "cpu_linear")]
        # vLLM packs embeddings too; one that is only looked up in never uses that copy.
        only_looked_up = self._model.model.embed_tokens
        if only_looked_up in packing and only_looked_up is not self._model.lm_head:
            only_looked_up.cpu_linear = None
            packing.remove(only_looked_up)
        return packing

    def _shape(self, parameter: str) -> tuple[int, int]:
        """Rows and columns as the model was loaded; a repacked matrix no longer knows its own."""
        live = self._parameters[parameter]
        if not live.numel():
            from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

            live = get_layerwise_info(self._owner(parameter)).restore_metadata[0]["weight"]
        return live.shape[0], live.numel() // live.shape[0] if live.shape[0] else 1
