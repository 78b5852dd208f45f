"""Time a service: python -m bench.serve --url http://127.0.0.1:8000 [--clients 32] [--requests 256] [--max-tokens 64]

Streamed completions of random prompts, all of one length, three ways: `closed` (each of the clients asks again as soon
as it has its answer), `sequential` (one client), `open` (requests come by themselves, Poisson arrivals at --rate a
second, by default 70 % of what `closed` reached). The last line is one JSON object; times in seconds.

--engine RUN_DIR runs the same prompts in turns through the engine itself, in this process, without HTTP.
--against URL measures a second service in turns with the first, for example one with serve.slots=1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

END = b"0\r\n\r\n"  # of a chunked body
Result = dict[str, Any]


@dataclass
class Answer:
    """What one request brought: when it was sent, and when which bytes came."""

    sent: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str = ""

    def read(self) -> None:
        """Count tokens. The bytes are looked at only after the measurement, so that the client costs little."""
        whole = b"".join(data for _, data in self.pieces)
        self.status = int(whole[9:12] or b"0")
        if self.status != 200 and not self.failure:
            self.failure = f"status {self.status}"
        usage = whole.rfind(b'"usage":{')
        if not self.failure and usage < 0:
            self.failure = "no usage"
        self.tokens = (
            0 if self.failure else json.loads(whole[usage + 8 : whole.index(b"}", usage) + 1])["completion_tokens"]
        )
        times = [at for at, data in self.pieces if b'"text":' in data]
        self.first, self.last = (times[0], times[-1]) if times else (0.0, 0.0)
        self.gaps = [b - a for a, b in itertools.pairwise(times)]


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.done: asyncio.Future[None] | None = None
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.answer or not self.done or self.done.done():
            return
        self.answer.pieces.append((time.perf_counter(), data))
        plain = len(self.answer.pieces) == 1 and b"content-length:" in data.lower()  # an error, in one piece
        if data.endswith(END) or plain:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.answer and self.done and not self.done.done():
            self.answer.failure = "connection lost"
            self.done.set_result(None)

    async def ask(self, request: bytes) -> Answer:
        self.answer, self.done = Answer(time.perf_counter()), asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self.done
        return self.answer


class Service:
    """A service under test."""

    def __init__(self, url: str, key: str, args: argparse.Namespace):
        parts = urlsplit(url)
        self.url, self._host, self._port = url, parts.hostname or "127.0.0.1", parts.port or 80
        self._head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._head += f"Authorization: Bearer {key}\r\n" if key else ""
        self._max_tokens, self._temperature, self._top_k = args.max_tokens, args.temperature, args.top_k

    def request(self, prompt: Sequence[int], seed: int) -> bytes:
        body = {
            "prompt": list(prompt), "max_tokens": self._max_tokens, "temperature": self._temperature, "seed": seed,
            "top_k": self._top_k, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        data = json.dumps(body).encode()
        return f"{self._head}Content-Length: {len(data)}\r\n\r\n".encode() + data

    async def connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return connection


async def closed(service: Service, requests: Sequence[bytes], clients: int) -> Result:
    """Every client asks again as soon as it has its answer."""
    left, answers = list(reversed(requests)), []

    async def client() -> None:
        connection = await service.connect()
        while left:
            answers.append(await connection.ask(left.pop()))
            if connection.transport.is_closing():
                connection = await service.connect()
        connection.transport.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return summary(answers, time.perf_counter() - begun)


async def opened(service: Service, requests: Sequence[bytes], rate: float, draw: random.Random) -> Result:
    """Requests come at random, `rate` a second on average, whether the service keeps up or not."""
    idle: list[Connection] = []

    async def one(request: bytes) -> Answer:
        connection = idle.pop() if idle else await service.connect()
        answer = await connection.ask(request)
        if not connection.transport.is_closing():
            idle.append(connection)
        return answer

    tasks, due = [], time.perf_counter()
    begun = due
    for request in requests:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(request)))
    answers = await asyncio.gather(*tasks)
    result = summary(answers, time.perf_counter() - begun)
    for connection in idle:
        connection.transport.close()
    return {"rate": round(rate, 2)} | result


def summary(answers: Sequence[Answer], seconds: float) -> Result:
    """Rates over the whole, and percentiles over the answers that came."""
    for answer in answers:
        answer.read()
    good = [answer for answer in answers if not answer.failure]
    failures: dict[str, int] = {}
    for answer in answers:
        if answer.failure:
            failures[answer.failure] = failures.get(answer.failure, 0) + 1
    per_token = [(a.last - a.first) / (a.tokens - 1) for a in good if a.tokens > 1]
    return {
        "requests": len(answers),
        "failures": failures,
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 2),
        "tokens_per_second": round(sum(a.tokens for a in good) / seconds, 1),
        "first_token_seconds": percentiles([a.first - a.sent for a in good]),
        "time_per_token_seconds": percentiles(per_token),
        "between_chunks_seconds": percentiles([gap for a in good for gap in a.gaps]),
        "latency_seconds": percentiles([a.last - a.sent for a in good]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 5) for p in (50, 90, 95, 99)}


class RawEngine:
    """The same prompts through the engine in this process: what HTTP's share is measured against."""

    def __init__(self, run_dir: str, args: argparse.Namespace):
        from jaxchat.engine import Engine
        from jaxchat.engine.device import power_of_two

        self._engine = Engine.from_pretrained(run_dir, slots=power_of_two(args.clients))
        settings = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_k": args.top_k}
        self._settings: dict[str, Any] = settings | {"tools": False}
        self._engine.programs.warm_up()

    def rate(self, prompts: Sequence[Sequence[int]], rows: int) -> float:
        """Tokens a second with `rows` of the prompts under way at any time."""
        from jaxchat.engine import Request

        waiting = [Request(list(p), seed=i, **self._settings) for i, p in enumerate(prompts)]
        begun, made, running = time.perf_counter(), 0, []
        while waiting or running:
            while waiting and len(running) < rows:
                running.append(self._engine.submit(waiting.pop()))
            self._engine.step()
            made += sum(handle.made for handle in running if handle.done)
            running = [handle for handle in running if not handle.done]
        return made / (time.perf_counter() - begun)


async def measure(args: argparse.Namespace) -> Result:
    services = {"service": Service(args.url, args.key, args)}
    if args.against:
        services["against"] = Service(args.against, args.key, args)
    draw = random.Random(args.seed)
    prompts = [[draw.randrange(args.vocab) for _ in range(args.prompt)] for _ in range(args.requests)]
    few = prompts[: max(4, args.requests // 16)]
    raw = RawEngine(args.engine, args) if args.engine else None
    runs: dict[str, list[Result]] = {}
    rates: dict[str, list[float]] = {"rows": [], "one_row": []}

    async def noted(name: str, result: Awaitable[Result]) -> Result:
        runs.setdefault(name, []).append(await result)
        return runs[name][-1]

    for service in services.values():
        await closed(service, [service.request(p, 0) for p in few], args.clients)  # warm
    for repeat in range(args.repeats):
        for name, service in services.items():
            requests = [service.request(prompt, repeat * len(prompts) + i) for i, prompt in enumerate(prompts)]
            full = await noted(f"{name}.closed", closed(service, requests, args.clients))
            await noted(f"{name}.sequential", closed(service, requests[: len(few)], 1))
            rate = args.rate or 0.7 * full["requests_per_second"]
            if rate > 0:
                await noted(f"{name}.open", opened(service, requests, rate, draw))
        if raw:
            rates["rows"].append(raw.rate(prompts, args.clients))
            rates["one_row"].append(raw.rate(few, 1))
    result: Result = {}
    for name, results in runs.items():
        owner, kind = name.split(".")
        result.setdefault(owner, {})[kind] = middle(results)
    if raw:
        result["engine"] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
        share: Callable[[str, str], float] = lambda kind, rows: round(  # noqa: E731
            statistics.median(
                run["tokens_per_second"] / rate
                for run, rate in zip(runs[f"service.{kind}"], rates[rows], strict=True)
            ), 3,
        )  # fmt: skip
        result["share_of_engine"] = {"clients": share("closed", "rows"), "one_client": share("sequential", "one_row")}
    return result


def middle(results: Sequence[Result]) -> Result:
    """The repeat with the median rate, and the rates of all."""
    ordered = sorted(results, key=lambda result: result["tokens_per_second"])
    return ordered[len(ordered) // 2] | {"all_tokens_per_second": [r["tokens_per_second"] for r in results]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--vocab", type=int, default=256, help="prompts are made of token ids below this")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--rate", type=float, default=0.0, help="of `open`: requests a second")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key", default="", help="one of serve.api_keys")
    parser.add_argument("--engine", metavar="RUN_DIR")
    parser.add_argument("--against", metavar="URL")
    args = parser.parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name != "key"}
    try:
        result = asyncio.run(measure(args))
    except OSError as error:
        parser.exit(3, f"error: {args.url}: {error.strerror or error}; start it with launch.py --serve\n")
    machine = {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 2), "jax": version("jax")}
    print(json.dumps(settings | machine | result))


if __name__ == "__main__":
    main()
