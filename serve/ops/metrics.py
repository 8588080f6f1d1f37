"""The Prometheus metrics of servers and gateways. All names stand in this file; callers' texts and keys are no labels.

Shares are left to the query, so that they can be summed over servers. The padding share is
`1 - rate(classer_batch_tokens_total) / rate(classer_batch_padded_tokens_total)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...data.extras import missing_packages
from .listening import bind

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# From a millisecond to half a minute.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class BatchProtocol(Protocol):
    """The part of `work.BatchRun` that the metrics use."""

    @property
    def bucket(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def texts(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class Stages(NamedTuple):
    """Seconds that a text was queued for the device, and that its batch ran."""

    queue: float
    compute: float


def new_registry() -> CollectorRegistry:
    """A registry with the metrics of this process: memory, CPU time, open files.

    Raises:
      InputError: prometheus_client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
    except ImportError:
        raise missing_packages("The metrics port", "prometheus_client", "serve") from None
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


class CallMetrics:
    """The metrics of calls, in a server or a gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._calls = Counter("classer_calls", "Calls, by method and status.", ["method", "code"], registry=registry)
        self._refusals = Counter(
            "classer_refusals", "Calls that failed, by the reason in their ErrorInfo.", ["reason"], registry=registry
        )
        self._refused_texts = Counter(
            "classer_refused_texts",
            "Texts that failed by themselves in a batch that was answered, by the reason in their ErrorInfo.",
            ["reason"],
            registry=registry,
        )
        self._texts = Counter("classer_texts", "Texts, by what became of them.", ["code"], registry=registry)
        self._key_texts = Counter("classer_key_texts", "Texts asked for, by API key.", ["key"], registry=registry)
        self._call_seconds = Histogram(
            "classer_call_seconds", "Time a call took.", ["method"], buckets=_SECONDS, registry=registry
        )
        self._stage_seconds = Histogram(
            "classer_stage_seconds",
            "Time an answered call spent waiting for the device (queue), on it (compute), and otherwise (rest).",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight_calls = Gauge("classer_in_flight_calls", "Calls being worked on.", registry=registry)
        self.in_flight_bytes = Gauge("classer_in_flight_bytes", "Bytes of their requests.", registry=registry)
        for stage in ("queue", "compute", "rest"):
            self._stage_seconds.labels(stage)

    def ended(
        self,
        method: str,
        code: str,
        seconds: float,
        reason: str,
        key: str,
        texts: Mapping[str, int],
        refused: Mapping[str, int],
    ) -> None:
        """Counts a call at its end; `texts` are its texts by status, `refused` a batch's failed texts by reason."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)
        if code != "OK":
            self._refusals.labels(reason or code).inc()
        for outcome, count in texts.items():
            self._texts.labels(outcome).inc(count)
        for why, count in refused.items():
            self._refused_texts.labels(why).inc(count)
        if key and texts:
            self._key_texts.labels(key).inc(sum(texts.values()))

    def staged(self, seconds: float, stages: Stages) -> None:
        """Records the stages of an answered call that took `seconds`."""
        self._stage_seconds.labels("queue").observe(stages.queue)
        self._stage_seconds.labels("compute").observe(stages.compute)
        self._stage_seconds.labels("rest").observe(max(0.0, seconds - stages.queue - stages.compute))


class DeviceMetrics:
    """The metrics of the device and its queue.

    Args:
      registry: the registry of the metrics.
      waiting_tokens: the tokens in the queues now; called at each scrape.
      max_waiting_tokens: how many there may be.
      alive: whether the device works; called at each scrape.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        waiting_tokens: Callable[[], int],
        max_waiting_tokens: int,
        alive: Callable[[], bool],
    ) -> None:
        from prometheus_client import Counter, Gauge

        def counter(name: str, what: str) -> Any:
            return Counter(name, what, ["bucket"], registry=registry)

        self._batches = counter("classer_batches", "Batches that ran, by length bucket.")
        self._texts = counter("classer_batch_texts", "Texts in them.")
        self._rows = counter("classer_batch_rows", "Rows of their programs, filled or not.")
        self._tokens = counter("classer_batch_tokens", "Tokens of their texts.")
        self._padded = counter("classer_batch_padded_tokens", "Tokens that their programs computed, padding included.")
        self._seconds = counter("classer_device_seconds", "Time the device took over them.")
        waiting = Gauge("classer_queue_tokens", "Tokens waiting for the device.", registry=registry)
        waiting.set_function(waiting_tokens)
        limit = Gauge("classer_queue_tokens_limit", "Tokens that may wait before calls are refused.", registry=registry)
        limit.set(max_waiting_tokens)
        living = Gauge(
            "classer_device_alive",
            "1 while the device goes on; 0 once it is lost, or while it is stuck.",
            registry=registry,
        )
        living.set_function(lambda: float(alive()))

    def ran(self, batch: BatchProtocol) -> None:
        """Counts a batch; an `on_batch` of the scheduler."""
        bucket = str(batch.bucket)
        self._batches.labels(bucket).inc()
        self._texts.labels(bucket).inc(batch.texts)
        self._rows.labels(bucket).inc(batch.rows)
        self._tokens.labels(bucket).inc(batch.tokens)
        self._padded.labels(bucket).inc(batch.rows * batch.bucket)
        self._seconds.labels(bucket).inc(batch.seconds)


class MetricsServer:
    """Serves /metrics over HTTP, in a thread.

    Args:
      registry: the metrics to serve.
      host, port: the address; port 0 picks a free one.

    Raises:
      InputError: the address cannot be listened on.

    Attributes:
      port: the real port.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        from prometheus_client import start_http_server

        self._server, self._thread = bind(
            host,
            port,
            "--metrics-port",
            lambda host, port: start_http_server(port, host, registry),
            host_option="--metrics-host",
        )
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
