"""Prometheus metrics, under the names that dashboards of LLM servers know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import prometheus_client as prometheus

from jaxchat.engine import Handle

from .worker import Worker

LATENCY = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240)


class Metrics:
    """The metrics of one service, in their own registry."""

    def __init__(self, worker: Worker, model: str):
        prometheus.disable_created_metrics()
        self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)

        def metric(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            own = kind(f"jaxchat:{name}", text, ["model_name", *labels], registry=self._registry, **options)
            return own if labels else own.labels(model)

        def gauge(name: str, text: str, value: str) -> None:
            def read() -> float:
                return getattr(worker.engine, value) if worker.state in ("ready", "draining") else 0.0

            metric(prometheus.Gauge, name, text).set_function(read)

        gauge("num_requests_running", "Answers in slots", "running")
        gauge("num_requests_waiting", "Answers waiting for a slot", "waiting")
        gauge("kv_cache_usage_perc", "Share of the slots' cache positions in use, 0 to 1", "cache_usage")
        gauge("programs_compiling", "Programs that still compile since the start", "compiling")
        self._model = model
        self._prompt = metric(prometheus.Counter, "prompt_tokens", "Prompt tokens")
        self._generated = metric(prometheus.Counter, "generation_tokens", "Generated tokens")
        self._success = metric(prometheus.Counter, "request_success", "Answers by finish reason", "finished_reason")
        self._errors = metric(prometheus.Counter, "request_errors", "Requests answered with an error", "status")
        for reason in ("stop", "length", "abort"):  # abort: the client went away or stopped the answer
            self._success.labels(model, reason)

        def seconds(name: str, text: str, buckets: Sequence[float]) -> Any:
            return metric(prometheus.Histogram, f"{name}_seconds", text, buckets=buckets)

        self._first = seconds("time_to_first_token", "From the request to its first token", LATENCY)
        self._between = seconds("inter_token_latency", "Mean time between an answer's tokens", BETWEEN)
        self._whole = seconds("e2e_request_latency", "From the request to its last token", WHOLE)
        self._queue = seconds("request_queue_time", "From the request to its slot", WHOLE)

    def finished(self, handles: Sequence[Handle], prompt_tokens: int) -> None:
        """Count answers that are finished or cancelled."""
        self._prompt.inc(prompt_tokens)
        for handle in handles:
            self._generated.inc(handle.made)
            cancelled = handle.finish_reason in (None, "cancelled")
            self._success.labels(self._model, "abort" if cancelled else handle.finish_reason).inc()
            if handle.started:
                self._queue.observe(handle.started - handle.submitted)
            if handle.first_token:
                self._first.observe(handle.first_token - handle.submitted)
            if handle.finished and not cancelled:
                self._whole.observe(handle.finished - handle.submitted)
                if handle.made > 1 and handle.first_token:
                    self._between.observe((handle.finished - handle.first_token) / (handle.made - 1))

    def error(self, status: int) -> None:
        self._errors.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        return prometheus.generate_latest(self._registry)
