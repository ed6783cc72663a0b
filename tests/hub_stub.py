"""A Hub on the loopback: the endpoints that huggingface_hub pushes to and fetches from."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

LFS = (".safetensors", ".onnx", ".png")


class Hub:
    """Repositories in memory, and what happens to requests.

    `may_read` and `may_write` say which tokens do; none stands for everybody. `trouble` is a status
    that all are answered.
    """

    def __init__(self):
        self.repositories = {}
        self.private = set()
        self.objects = {}
        self.requests = []
        self.may_read = self.may_write = self.trouble = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def commit(self, repository):
        content = sorted((k, v.hex()) for k, v in self.repositories[repository].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def _handler(hub):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self, b"")

            do_GET = do_HEAD  # noqa: N815

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                hub.answer(self, body)

            do_PUT = do_POST  # noqa: N815

        return Handler

    def answer(self, request, body):
        path = request.path.split("?")[0]
        self.requests.append((request.command, path))
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.trouble:
            return Reply(request)(self.trouble, {"error": "in trouble"})
        for pattern, action in ROUTES:
            if found := re.fullmatch(pattern, path):
                return action(self, Reply(request), *found.groups(), body=body, token=token)
        return Reply(request)(404, {"error": "no such endpoint"})

    def create(self, reply, body, token):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.may_write is not None and token != self.may_write:
            return reply(403 if token else 401, {"error": "no right to write"})
        if name in self.repositories:
            return reply(409, {"error": "exists", "url": f"{self.endpoint}/{name}"})
        self.repositories[name] = {}
        if asked.get("visibility") == "private":
            self.private.add(name)
        return reply(200, {"url": f"{self.endpoint}/{name}", "name": name, "id": name})

    def validate(self, reply, body, token):
        content = json.loads(body)["content"]
        wrong = not content.startswith("---\n") or "license: nonsense" in content
        found = [{"message": '"license" must be one of apache-2.0, mit'}] if wrong else []
        return reply(400 if wrong else 200, {"errors": found, "warnings": []})

    def info(self, reply, name, body, token):
        if name not in self.repositories:
            return self._absent(reply)
        return reply(200, {"id": name, "private": name in self.private, "siblings": []})

    def preupload(self, reply, name, revision, body, token):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return reply(200, {"files": files})

    def batch(self, reply, name, body, token):
        objects = [
            each | {"actions": {"upload": {"href": f"{self.endpoint}/objects/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        return reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, reply, oid, body, token):
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        return reply(200, {})

    def take(self, reply, name, revision, body, token):
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self.objects[value["oid"]]
        oid = self.commit(name)
        return reply(200, {"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, reply, name, revision, file, body, token):
        if name not in self.repositories or self.may_read not in (None, token):
            return self._absent(reply)
        commit = self.commit(name)
        headers = {"X-Repo-Commit": commit}
        if revision not in ("main", commit):
            return reply(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if file not in self.repositories[name]:
            return reply(404, {}, headers | {"X-Error-Code": "EntryNotFound"})
        content = self.repositories[name][file]
        return reply(200, content, headers | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def _absent(self, reply):
        # The Hub says the same of what is not there and of what is not yours.
        return reply(401, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})


class Reply:
    """Sends one answer."""

    def __init__(self, request):
        self.request = request

    def __call__(self, status, content, headers=()):
        request = self.request
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        request.send_response(status)
        for name, value in dict(headers).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("/api/repos/create", Hub.create),
    ("/api/validate-yaml", Hub.validate),
    (f"/api/models/{NAME}", Hub.info),
    (f"/api/models/{NAME}/preupload/([^/]+)", Hub.preupload),
    (f"/api/models/{NAME}/commit/([^/]+)", Hub.take),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("/objects/([0-9a-f]+)", Hub.upload),
    (f"/{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
]
