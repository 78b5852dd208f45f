"""A real service on a free port, for tests: uvicorn in a thread, the tiny model that knows two answers."""

import contextlib
import dataclasses
import threading
import time

import httpx
import pytest
from small_model import CONFIG, SHAPES, learned, tokenizer
from starlette.applications import Starlette

from jaxchat.config import load_config
from jaxchat.engine import Engine
from jaxchat.scaling import resolve
from serve.app import Server, bind, make_app
from serve.service import Service
from serve.worker import Worker

try:
    import openai
except ImportError:
    openai = None
needs_openai = pytest.mark.skipif(openai is None, reason="needs the dev extra: pip install -e '.[dev]'")


def config(**settings):
    """The small model's configuration; `settings` are keys of `serve`."""
    sets = [f"model.{k}={getattr(CONFIG, k)}" for k in SHAPES] + ["train.batch_tokens=128", "train.steps=1"]
    whole = resolve(load_config("nano", sets))
    given = {"slots": 4, "max_tokens": 100, "temperature": 0.0, "top_k": 0} | settings
    return dataclasses.replace(whole, serve=dataclasses.replace(whole.serve, **given))


def small_engine(settings):
    return Engine(CONFIG, learned(), tokenizer(), slots=settings.slots, queue_limit=settings.queue_length, chunk=4)


class Live:
    """What a test needs of a running service."""

    def __init__(self, server, service, port):
        self.server, self.service, self.worker, self.port = server, service, service.worker, port
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path, body, **options):
        return httpx.post(self.url + path, json=body, **({"timeout": 60} | options))

    def stream(self, path, body):
        """A context manager: the answer while it comes."""
        return httpx.stream("POST", self.url + path, json=body | {"stream": True}, timeout=60)

    def gauge(self, name):
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"jaxchat:{name}{{")).split()[-1])

    def wait_until_idle(self, seconds=10.0):
        """How long until nothing is being answered."""
        begin = time.monotonic()
        while self.worker.busy or self.service.answering:
            assert time.monotonic() < begin + seconds, "still answering"
            time.sleep(0.005)
        return time.monotonic() - begin


@contextlib.contextmanager
def live(make_engine=None, make_page=None, **settings):
    """A service with these settings under `serve`; it is ready when the body begins, unless `make_engine` is slow."""
    whole = config(**settings)
    worker = Worker(make_engine or (lambda worker: small_engine(whole.serve)))
    service = Service(whole, worker)
    listening = bind("127.0.0.1", 0)
    server = Server(make_app(service, lambda: make_page(service) if make_page else Starlette()), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    if not make_engine:
        worker.loaded.result(120)
    try:
        yield Live(server, service, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        worker.close()
        assert not thread.is_alive(), "the server does not end"


@contextlib.contextmanager
def slowed(worker, seconds):
    """So much time for every chunk: enough to do something before an answer ends by itself."""
    step = worker.engine.step

    def slow():
        time.sleep(seconds if worker.engine.running or worker.engine.waiting else 0)
        return step()

    worker.engine.step = slow
    try:
        yield
    finally:
        del worker.engine.step
