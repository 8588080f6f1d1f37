"""What a server tells Prometheus. Every metric's name stands in this file; no name, text or key of a caller is a label.

Shares are left to the query, so that they can be summed over servers: the padding share is
`1 - rate(classer_batch_tokens_total) / rate(classer_batch_padded_tokens_total)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...data.errors import InputError
from ...data.extras import missing_packages

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# From a millisecond to half a minute.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Batch(Protocol):
    """What the metrics need of `scheduler.BatchRun`."""

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
    """How long a text waited for the device, and how long its batch ran, in seconds."""

    queue: float
    compute: float


def new_registry() -> CollectorRegistry:
    """A registry with this process's own figures (memory, CPU time, open files) in it.

    Raises:
      InputError: the package is missing.
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
    """What is counted of calls, at a server or a gateway."""

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
        """Counts a call that has ended; `texts` are its texts by status, `refused` those of a batch by reason."""
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
        """Counts where the time of an answered call went."""
        self._stage_seconds.labels("queue").observe(stages.queue)
        self._stage_seconds.labels("compute").observe(stages.compute)
        self._stage_seconds.labels("rest").observe(max(0.0, seconds - stages.queue - stages.compute))


class DeviceMetrics:
    """What is counted of the device and its queue.

    Args:
      registry: where.
      waiting_tokens, max_waiting_tokens, alive: asked whenever Prometheus asks.
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

    def ran(self, batch: Batch) -> None:
        """Counts a batch; a scheduler's `on_batch`."""
        bucket = str(batch.bucket)
        self._batches.labels(bucket).inc()
        self._texts.labels(bucket).inc(batch.texts)
        self._rows.labels(bucket).inc(batch.rows)
        self._tokens.labels(bucket).inc(batch.tokens)
        self._padded.labels(bucket).inc(batch.rows * batch.bucket)
        self._seconds.labels(bucket).inc(batch.seconds)


class MetricsServer:
    """Answers Prometheus over HTTP, at /metrics, in a thread.

    Args:
      registry: what to tell.
      host, port: where; port 0 picks a free one.

    Raises:
      InputError: the address cannot be listened on.

    Attributes:
      port: the real one.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        from prometheus_client import start_http_server

        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except (OSError, OverflowError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise InputError(f"Cannot listen on {host}:{port} for metrics: {reason}. Choose another port.") from None
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
