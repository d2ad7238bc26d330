"""A small Hub on the loopback address: the few endpoints that downloads and `hf upload` ask for."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ERRORS = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}


def entry(path, folder):
    """A file or a folder as the Hub lists it."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(b"").hexdigest()}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}


class Hub:
    """Serves repositories {"datasets/you/name" or "you/name": folder}; an HTTP status in the place
    of a folder is what all requests are answered with. As a context manager it yields itself; `url`
    is what HF_ENDPOINT has to be, `asked` the paths.
    """

    def __init__(self, repositories):
        self.repositories, self.asked = repositories, []
        self.broken = None  # a word in the paths of files that it then fails to send
        handler = type("HandlerOfOne", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.note_path()
        for name, folder in self.hub.repositories.items():
            kind = "" if name.startswith("datasets/") else "models/"
            if f"{path}/".startswith(f"api/{kind}{name}/"):
                return self.describe(path, name, folder)
            if path.startswith(f"{name}/resolve/"):
                file = folder / path.removeprefix(f"{name}/resolve/").split("/", 1)[1]
                if self.hub.broken and self.hub.broken in path:
                    return self.refuse(403)
                if file.is_file():
                    return self.answer(file.read_bytes())
                return self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})
        return self.refuse(404)

    do_HEAD = do_GET

    def do_POST(self):
        path = self.note_path()
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        name = path.removeprefix("api/").removeprefix("models/").rsplit("/", 2)[0]
        folder = self.hub.repositories.get(name)
        answer = {"warnings": [], "errors": []}  # of validate-yaml: the head of a card
        if path == "api/repos/create":
            request = json.loads(asked)
            answer = {"url": f"{self.hub.url}/{request['organization']}/{request['name']}"}
        elif "/paths-info/" in path:  # what is known of some files
            wanted = parse_qs(asked)["paths"] if "paths=" in asked else json.loads(asked)["paths"]
            known = [folder / file for file in wanted if (folder / file).exists()]
            answer = [entry(path, folder) for path in known]
        elif "/preupload/" in path:  # in which way each of some files is to be sent
            request = json.loads(asked)
            way = {"uploadMode": "regular", "shouldIgnore": "gitIgnore" in request}
            answer = {"files": [{"path": file["path"], **way} for file in request["files"]]}
        elif "/commit/" in path:  # a line for each file
            for line in map(json.loads, asked.splitlines()):
                if line["key"] == "file":
                    file = folder / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            answer = {"commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}"}
        self.answer(json.dumps(answer).encode(), **{"Content-Type": "application/json"})

    def note_path(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(path)
        return path

    def describe(self, path, name, folder):
        """Answer with the files of a repository, or of a folder in it."""
        if isinstance(folder, int):
            return self.refuse(folder)
        if "/tree/" in path:
            _, _, below = path.partition("/tree/")[2].partition("/")  # of the commit
            everything = "recursive=true" in self.path.lower()
            found = (folder / below).glob("**/*" if everything else "*")
            listing = [entry(path, folder) for path in sorted(found)]
        else:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
            short = name.removeprefix("datasets/")
            listing = {"id": short, "sha": COMMIT, "siblings": siblings, "tags": []}
            listing |= {"private": False, "downloads": 0, "likes": 0}
        self.answer(json.dumps(listing).encode(), **{"Content-Type": "application/json"})

    def refuse(self, status):
        self.answer(b"", status, **{"X-Error-Code": ERRORS[status]})

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
