"""A small Hub on the loopback address: the few endpoints that downloading a repository asks for."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def entry(path, folder):
    """A file or a folder as the Hub lists it."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(b"").hexdigest()}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}


class Hub:
    """Serves the folders of `repositories` ({"datasets/you/name" or "you/name": folder}).

    uploads: a folder in which repositories may be created. As a context manager it yields itself;
    `url` is what HF_ENDPOINT has to be, `asked` the paths.
    """

    def __init__(self, repositories, uploads=None):
        hub, self.asked, self.uploads = self, [], uploads

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path = unquote(urlsplit(self.path).path).strip("/")
                hub.asked.append(path)
                for name, folder in repositories.items():
                    if f"{path}/".startswith(f"api/{hub.api_name(name)}/"):
                        return self.describe(path, name, Path(folder))
                    if path.startswith(f"{name}/resolve/"):
                        file = Path(folder, path.removeprefix(f"{name}/resolve/").split("/", 1)[1])
                        if file.is_file():
                            return self.answer(file.read_bytes())
                        return self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})
                return self.answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})

            do_HEAD = do_GET

            def do_POST(self):
                """paths-info, what is known of some files; and what an upload needs."""
                asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if hub.uploads is not None and "paths-info" not in self.path:
                    answer = hub.take(urlsplit(self.path).path.strip("/"), asked)
                    return self.answer(json.dumps(answer).encode())
                wanted = (
                    parse_qs(asked)["paths"] if "paths=" in asked else json.loads(asked)["paths"]
                )
                path = unquote(urlsplit(self.path).path).strip("/")
                hub.asked.append(path)
                for name, folder in repositories.items():
                    if path.startswith(f"api/{hub.api_name(name)}/paths-info/"):
                        return self.describe(path, name, Path(folder), wanted)
                return self.answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})

            def describe(self, path, name, folder, wanted=None):
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                if wanted is not None:
                    known = [
                        p for p in folder.rglob("*") if p.relative_to(folder).as_posix() in wanted
                    ]
                    listing = [entry(p, folder) for p in known]
                elif "/tree/" in path:
                    _, _, below = path.partition("/tree/")[2].partition("/")  # of the commit
                    everything = "recursive=True" in self.path or "recursive=true" in self.path
                    found = (folder / below).glob("**/*" if everything else "*")
                    listing = [entry(p, folder) for p in sorted(found)]
                else:
                    siblings = [{"rfilename": p.relative_to(folder).as_posix()} for p in files]
                    short = name.removeprefix("datasets/")
                    listing = {"id": short, "sha": COMMIT, "siblings": siblings, "tags": []}
                    listing |= {"private": False, "downloads": 0, "likes": 0}
                self.answer(json.dumps(listing).encode(), **{"Content-Type": "application/json"})

            def answer(self, body, status=200, **headers):
                self.send_response(status)
                headers["Content-Length"] = str(len(body))
                headers["X-Repo-Commit"] = COMMIT
                headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, path, asked):
        """Create a repository, or take a commit of small files: they go to `uploads`."""
        self.asked.append(path)
        if path == "api/repos/create":
            name = "/".join(
                filter(None, (json.loads(asked).get("organization"), json.loads(asked)["name"]))
            )
            (self.uploads / name).mkdir(parents=True)
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if "/preupload/" in path:
            files = json.loads(asked)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return {"files": [{"path": file["path"], **modes} for file in files]}
        if "/commit/" in path:
            name = path.removeprefix("api/models/").partition("/commit/")[0]
            folder = self.uploads / name
            for line in filter(None, asked.splitlines()):
                value = json.loads(line)["value"]
                if json.loads(line)["key"] == "file":
                    target = folder / value["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(value["content"]))
            return {
                "commitUrl": f"{self.url}/{name}/commit/{COMMIT}",
                "commitOid": COMMIT,
                "success": True,
            }
        return {"errors": [], "warnings": []}  # validate-yaml

    @staticmethod
    def api_name(name):
        return name if name.startswith("datasets/") else f"models/{name}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
