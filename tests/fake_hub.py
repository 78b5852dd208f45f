"""A real HTTP server on loopback that speaks the hub's routes for one data set, and misbehaves where told to."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests to `hub`."""

    hub: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass


class Server:
    """A server on a free port of loopback, in a thread, for a `with` block."""

    handler: type[Handler]

    def __enter__(self):
        handler = type("Own", (self.handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class DataHandler(Handler):
    def do_GET(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.answer()

    do_HEAD = do_GET

    def answer(self):
        if self.hub.gone:  # a connection from before
            self.close_connection = True
            return self.connection.close()
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/"):
            return self.api(path)
        match = re.fullmatch(rf"/datasets/{self.hub.repo}/resolve/{COMMIT}/(.+)", path)
        if match is None or match[1] not in self.hub.files:
            return self.send(b"", 404, X_Error_Code="EntryNotFound")
        return self.file(match[1])

    def fault(self, name):
        waiting = self.hub.faults.get(name)
        return waiting.pop(0) if waiting else "ok"

    def api(self, path):
        if (fault := self.fault("api")) != "ok":
            return self.refuse(fault)
        if path.startswith(f"/api/datasets/{self.hub.repo}/revision/"):
            revision = path.rsplit("/", 1)[1]
            if revision not in ("main", "v1", COMMIT):
                return self.send(b"{}", 404, X_Error_Code="RevisionNotFound")
            return self.json({"id": self.hub.repo, "sha": COMMIT})
        if path == f"/api/datasets/{self.hub.repo}/tree/{COMMIT}":
            return self.json(self.hub.tree())
        return self.send(b"{}", 404, X_Error_Code="RepoNotFound")

    def file(self, name):
        content = self.hub.files[name]
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{self.hub.digest(name)}"', "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.send(content, **headers)
        fault = self.fault(name)
        if fault[0].isdigit():
            return self.refuse(fault)
        if fault == "wrong":
            content = bytes(b ^ 1 for b in content)
        code, start = 200, 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            code, start = 206, int(found[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send(content[start:], code, fault, **headers)

    def refuse(self, fault):
        code, _, kind = fault.partition(" ")
        said = {"X_Error_Code": kind, "X_Error_Message": "Said by the hub."} if kind else {}
        self.send(b"", int(code), Retry_After=str(self.hub.retry_after), **said)

    def json(self, value):
        self.send(json.dumps(value).encode(), Content_Type="application/json")

    def send(self, body, code=200, fault="ok", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        elif fault == "slow":
            for i in range(0, len(body), max(1, len(body) // 8)):
                self.wfile.write(body[i : i + max(1, len(body) // 8)])
                self.wfile.flush()
                time.sleep(self.hub.pause)
        else:
            self.wfile.write(body)


class FakeHub(Server):
    """`files`: path -> bytes. `faults`: path (or "api") -> what the next requests for it get, one after another:

    "429" (with `retry_after`), "500", "404", "drop" (half of the body, then silence and a closed connection), "wrong"
    (bytes flipped), "slow" (a piece every `pause` seconds), "ok", "403 GatedRepo" (with code and words).
    """

    handler = DataHandler

    def __init__(self, files, repo="someone/texts"):
        self.files, self.repo, self.faults, self.asked = dict(files), repo, {}, []
        self.retry_after, self.pause, self.small, self.lie = 0, 0.05, set(), False
        self.gone = False

    def close(self):
        """Gone: the next request finds nobody."""
        self.gone = True
        self.__exit__()

    def digest(self, name):
        return "f" * 64 if self.lie else hashlib.sha256(self.files[name]).hexdigest()

    def tree(self):
        entries = [{"type": "directory", "path": "folder", "oid": "0" * 40}]
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": name, "size": len(content), "oid": blob}
            if name not in self.small:  # small files lie in git itself and have no digest of their own
                entry["lfs"] = {"oid": self.digest(name), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def gets(self, name):
        """(method, range) of the requests for a file's content."""
        return [(method, reach) for method, path, reach in self.asked if path.endswith(f"/{name}") and method == "GET"]


class PushHandler(Handler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(self.path.split("?")[0])
        code, value, headers = self.hub.answer(self.command, path, body, self.headers)
        text = json.dumps(value).encode()
        self.send_response(code)
        more = {"Content-Length": str(len(text)), "Content-Type": "application/json"} | headers
        for name, field in more.items():
            self.send_header(name, field)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_GET = do_HEAD = do_POST = do_PUT = answer


class FakeRepositories(Server):
    """The hub's routes to push: creates repositories and takes commits, with what large files need (Git LFS).

    `repositories`: "models/OWNER/NAME" -> {path: bytes}; `created`: the bodies of what created them; `faults`:
    beginning of a path -> status of every answer there; `token`: the one that is accepted, for owner "me" alone.
    """

    handler, token = PushHandler, "hf_right"

    def __init__(self):
        self.repositories, self.created, self.faults, self.lfs, self.commits = {}, [], {}, {}, 0

    def answer(self, method, path, body, headers):
        """(status, JSON value, headers) of the answer to a request."""
        for start, code in self.faults.items():
            if path.startswith(start):
                return code, {"error": "Said by the hub."}, {"X-Error-Code": "RepoNotFound"} if code == 404 else {}
        if path.startswith("/lfs/"):
            self.lfs[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if headers.get("Authorization") not in (f"Bearer {self.token}", f"Basic {self.token}"):
            return 401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            if name in self.repositories or asked["organization"] != "me":
                code = 409 if name in self.repositories else 403
                return code, {"error": "Said by the hub."}, {"X-Error-Message": "Said by the hub."}
            self.created.append(asked)
            self.repositories[name] = {".gitattributes": b""}
            return 200, {"url": f"{self.url}/{name}"}, {}
        if found := re.fullmatch(r"/(?:spaces/)?me/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, {}
        found = re.fullmatch(r"/api/((?:models|spaces)/[^/]+/[^/]+)(/\w+)?(?:/main)?", path)
        files = self.repositories.get(found[1]) if found else None
        if files is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if found[2] == "/tree":
            return 200, [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()], {}
        if found[2] == "/preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".html")) else "regular"}
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]}, {}
        if found[2] == "/commit":
            self.commits += 1
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.lfs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            url = f"{self.url}/{found[1].removeprefix('models/')}/commit/{COMMIT}"
            return 200, {"success": True, "commitUrl": url, "commitOid": COMMIT}, {}
        return 200, {"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]}, {}
