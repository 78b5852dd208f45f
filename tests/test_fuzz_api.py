"""Requests that a program makes up from the service's own OpenAPI document: no 5xx, no hang, nothing that the document
does not tell."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_service import live
from small_model import GREETING

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method", "response_headers_conformance",
)  # fmt: skip
CASES = [
    pytest.param((), 20, id="open"),
    pytest.param(("a key",), 20, id="keys"),
    pytest.param((), 500, id="long", marks=pytest.mark.slow),
]


@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="needs the dev extra: pip install -e '.[dev]'")
@pytest.mark.parametrize(("keys", "examples"), CASES)
def test_made_up_requests(keys, examples, tmp_path):
    with live(api_keys=keys, requests_per_minute=0, queue_length=64) as service:
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        paths = httpx.get(f"{service.url}/openapi.json").json()["paths"]
        guarded = {path for path, methods in paths.items() for m in methods.values() if m.get("security")}
        assert guarded == ({*paths} - {"/health", "/v1/models", "/v1/models/{name}"} if keys else set())
        command = [SCHEMATHESIS, "run", f"{service.url}/openapi.json", "--checks"]
        command += [",".join([*CHECKS, *(["ignored_auth", "missing_required_header"] if keys else [])])]
        command += ["--max-examples", examples, "--seed", 1, "--request-timeout", 60, "--no-color"]
        command += [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-1000:]
        assert "not a server error" not in done.stdout.lower() and "Tested: 10" in done.stdout
        service.wait_until_idle(60)
        answer = service.post("/v1/chat/completions", {"messages": GREETING}, headers=headers).json()
        assert answer["choices"][0]["message"]["content"] == "Hi 🙂 안녕!"
        text = httpx.get(f"{service.url}/metrics", headers=headers).text
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert f'jaxchat:{name}{{model_name="nano"}} 0.0' in text
