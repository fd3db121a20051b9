"""Prometheus: the newest value of every metric, at an address that a Prometheus server asks."""

import re
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from megatron_async_rlhf.config.telemetry import PrometheusKeys
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.telemetry.sinks.sink import numbers

_PREFIX = "async_rlhf_"


class PrometheusSink:
    """See `Sink`. `time/train_s` is `async_rlhf_time_train_s{run="..."}`, and so on."""

    def __init__(self, keys: PrometheusKeys, run: str) -> None:
        """
        Raises:
            ConfigError: the port is taken.
        """
        self._registry, self._run = CollectorRegistry(), run
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server, _ = start_http_server(keys.port, keys.host, self._registry)
        except OSError as error:
            raise ConfigError(
                f"telemetry.prometheus.port = {keys.port}: cannot be listened on at {keys.host} ({error.strerror or error}); "
                "choose another"
            ) from None

    @property
    def port(self) -> int:
        return self._server.server_port

    def warm_start(self, step: int, values: dict[str, Any]) -> None:
        self._set({f"warm_start/{name}": value for name, value in (numbers(values) | {"step": step}).items()})

    def step(self, step: int, values: dict[str, Any]) -> None:
        self._set(numbers(values) | {"step": step})

    def evaluation(self, version: int, steps: int, values: dict[str, Any]) -> None:
        self._set(numbers(values) | {"eval/version": version})

    def close(self, summary: dict[str, Any], *, failed: bool) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _set(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if name not in self._gauges:
                legal = _PREFIX + re.sub(r"\W", "_", name)
                self._gauges[name] = Gauge(legal, f"{name} of the newest step", ["run"], registry=self._registry)
            self._gauges[name].labels(run=self._run).set(value)
