"""The weights of a running generator as a `WeightHolder`: its workers hash what they compute with. No vllm import."""

import json
import urllib.error
import urllib.request
from typing import Any

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.holder import Box
from megatron_async_rlhf.formats.stored import TensorSpec
from megatron_async_rlhf.run_secret import VARIABLE, request_headers
from megatron_async_rlhf.run_tls import client_tls

# A generator is never behind a proxy, whatever `http_proxy` says: the one on this machine would be asked for its own.
_NO_PROXY = urllib.request.ProxyHandler({})
_TIMEOUT_S = 600.0  # hashing a packed matrix on a CPU means multiplying with it


class LiveWeights:
    """What the workers of one generator hold now; see `WeightHolder`."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            CheckpointError: nothing answers there, or not a generator of this project.
        """
        self.label = url.rstrip("/")
        workers = self._ask_workers()
        self.exact = all(worker["exact"] for worker in workers)
        self._dtype = workers[0]["dtype"]
        self.tensors = {
            name: TensorSpec(name=name, shape=tuple(shape), dtype=self._dtype) for name, shape in workers[0]["shapes"]
        }
        self._digests: dict[Box, bytes] = {}
        for rank, worker in enumerate(workers):
            for tensor, top, bottom, left, right, value in worker["boxes"]:
                where = f"{self.label} rank {rank}"
                self._digests[Box(tensor, (top, bottom), (left, right), where)] = bytes.fromhex(value)
        self.boxes = list(self._digests)

    def digest(self, box: Box, dtype: str, *, exact: bool) -> bytes:
        """As `WeightHolder.digest`, of one of `boxes` and in the generator's own dtype only."""
        if dtype != self._dtype:
            raise CheckpointError(
                f"{self.label} hashes its weights in {self._dtype}; compare it with weights in that dtype, not {dtype}"
            )
        return self._digests[box]

    def _ask_workers(self) -> list[dict[str, Any]]:
        body = json.dumps({"method": "weight_digests"}).encode()
        request = urllib.request.Request(
            f"{self.label}/collective_rpc", data=body, headers={"Content-Type": "application/json"} | request_headers()
        )
        try:
            opener = urllib.request.build_opener(_NO_PROXY, urllib.request.HTTPSHandler(context=client_tls()))
            with opener.open(request, timeout=_TIMEOUT_S) as response:
                results = json.load(response)["results"]
        except urllib.error.HTTPError as error:
            if error.code == 401:
                raise CheckpointError(
                    f"{self.label} answers the processes of its run alone; set {VARIABLE} to the file .secret in the run's "
                    "directory"
                ) from None
            raise CheckpointError(
                f"{self.label} answered {error.code}: it is not a generator that this project started"
            ) from None
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "reason", error)
            raise CheckpointError(f"{self.label}: no generator answers there ({reason})") from None
        if not results or not all(isinstance(result, dict) for result in results):
            raise CheckpointError(f"{self.label}: its workers did not tell what weights they hold")
        return results
