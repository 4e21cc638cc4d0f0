# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that speaks the Hugging Face hub's protocol, and clients of it.

It serves files of model repositories, and takes new repositories and commits, as huggingface_hub
sends them: regular files in the commit, others through the protocol of git LFS.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

NEW, OLD = "b" * 40, "a" * 40  # commits of the repositories that a test begins with
REVISIONS = {"main": NEW, "v1": OLD, "refs/pr/7": OLD, NEW: NEW, OLD: OLD}
TOKEN = "hf_secret_of_the_tests"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves /OWNER/NAME/resolve/REVISION/FILE, and the API for uploads."""

    def do_HEAD(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.replace("%2F", "/")
        if path.startswith("/api/models/"):
            return self.send_info(path.removeprefix("/api/models/").partition("/revision/")[0])
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        if repo in self.server.failing:
            status, code = self.server.failing[repo]
            return self.send(status, code=code)
        files, head = self.server.files, self.server.heads.get(repo)
        if not any(repo == known for known, _ in files):
            return self.send(404, code="RepoNotFound")
        revisions = {"main": head, head: head} if head else REVISIONS
        revision = next((r for r in revisions if rest.startswith(f"{r}/")), None)
        commit = revisions.get(revision)
        if (repo, commit) not in files:
            return self.send(404, code="RevisionNotFound")
        content = files[repo, commit].get(rest.removeprefix(f"{revision}/"))
        if content is None:
            return self.send(404, code="EntryNotFound", commit=commit)
        if repo == "lab/short" and self.command == "GET":
            return self.send(200, content[:-1], commit=commit)
        return self.send(200, content, commit=commit)

    do_GET = do_HEAD

    def send_info(self, repo):
        if repo not in self.server.private:
            return self.send(404, code="RepoNotFound")
        return self.send_json({"id": repo, "private": self.server.private[repo]})

    def do_POST(self):
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.read_body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.send(401)
        owner, _, action = self.path.removeprefix("/api/models/").partition("/")
        name, _, action = action.partition("/")
        if self.path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self.send_json(
                {"objects": [*map(self.upload_action, json.loads(body)["objects"])]}
            )
        if action == "preupload/main":
            large = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
            files = [file["path"] for file in json.loads(body)["files"]]
            entry = lambda path: dict(path=path, uploadMode=large(path), shouldIgnore=False)
            return self.send_json({"files": [*map(entry, files)]})
        if action == "commit/main":
            return self.commit(f"{owner}/{name}", [*map(json.loads, body.splitlines())])
        return self.send(404)

    def do_PUT(self):
        self.server.asked.append(f"{self.command} /lfs")
        content = self.read_body()
        if self.server.full:
            return self.send(403)
        self.server.objects[self.path.removeprefix("/lfs/")] = content
        return self.send(200)

    def read_body(self):
        if length := self.headers["Content-Length"]:
            return self.rfile.read(int(length))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def create(self, wanted):
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "others":
            return self.send(403)
        if repo in self.server.private:
            return self.send_json({"url": f"{self.root()}/{repo}"}, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.server.private[repo] = private
        return self.send_json({"url": f"{self.root()}/{repo}"})

    def upload_action(self, wanted):
        if wanted["oid"] in self.server.objects:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.root()}/lfs/{wanted['oid']}"}}}

    def commit(self, repo, lines):
        if repo not in self.server.private:
            return self.send(404, code="RepoNotFound")
        files = dict(self.server.files.get((repo, self.server.heads.get(repo)), {}))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.server.files[repo, commit], self.server.heads[repo] = files, commit
        url = f"{self.root()}/{repo}/commit/{commit}"
        return self.send_json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def root(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def send_json(self, value, status=200):
        return self.send(status, json.dumps(value).encode())

    def send(self, status, content=b"", code=None, commit=None):
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        for name, value in {"X-Error-Code": code, "X-Repo-Commit": commit}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


class Client:
    """Processes with a cache of their own that ask `server`."""

    def __init__(self, home: pathlib.Path, server: http.server.HTTPServer):
        self.home, self.server = home, server

    def run(self, *arguments, offline=False):
        """Returns the stdout of a Python process."""
        self.server.asked.clear()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "*",
        }
        command = [sys.executable, *map(str, arguments)]
        out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert out.returncode == 0, out.stderr
        assert "B/s" not in out.stderr  # no progress bar without a terminal
        assert TOKEN not in out.stdout + out.stderr
        return out.stdout


@contextlib.contextmanager
def serve(files, failing=()):
    """Serves `files`, (repository, commit) -> {path: content}, and takes uploads.

    `failing` are the responses to downloads of some repositories: status and X-Error-Code.

    Attributes of the server: `asked`, the requests; `files`, `heads` and `private`, of each
    repository the files, the last commit pushed, and whether it is private; `full` makes uploads of
    large files fail.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.failing = [], dict(files), dict(failing)
    server.heads, server.private, server.objects, server.full = {}, {}, {}, False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
