"""docs/: the page draws what sample.py draws, asks no other host for anything, and says what is
missing.

Its slow tests need Chromium and onnxruntime-web, the page's library: the folder of its files may be
named by the environment variable ORT_WEB, or else npm downloads them into a temporary folder.
"""

import contextlib
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import tarfile
import threading
import types
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call, refused

import sample
from experiments import export_onnx
from model import DiT

DOCS = ROOT / "docs"
PAGE = (DOCS / "index.html").read_text("utf-8")
LAPTOP = ROOT / "assets" / "laptop"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"


# The files


def test_the_page_is_one_short_file_whose_library_cannot_change():
    assert len(PAGE.splitlines()) <= 300
    assert re.findall(r"https://cdn[^\"]*", PAGE)[-1].startswith("https://cdn.jsdelivr.net/npm/")
    assert re.search(r"/onnxruntime-web@\d+\.\d+\.\d+/", PAGE)
    assert PAGE.count('"sha384-') == 2  # its script and its WebAssembly


def test_the_page_links_to_sections_of_the_lesson():
    lesson = (ROOT / "lesson.ipynb").read_text("utf-8")
    sections = re.findall(r'<a href="../lesson.ipynb">Lesson, section (\d+)</a>', PAGE)
    assert len(sections) == 4
    for section in sections:
        assert f'"## {section}. ' in lesson


def test_the_page_has_the_network_of_drawn_butterflies():
    model = DiT.from_pretrained(LAPTOP)
    facts = json.loads((DOCS / "butterflies.json").read_text("utf-8"))
    assert facts == {name: getattr(model, name) for name in export_onnx.FACTS}
    network = DOCS / "butterflies.onnx"
    assert network.stat().st_size <= 4e6
    onnxruntime = pytest.importorskip("onnxruntime")
    z, t, y = export_onnx.inputs(model, 5)
    feeds = {"z": z.numpy(), "t": t.numpy(), "y": y.numpy()}
    (v,) = onnxruntime.InferenceSession(network).run(None, feeds)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(v), model(z, t, y), atol=1e-3, rtol=1e-4)


# The export


@pytest.mark.slow
def test_any_network_is_exported(trained, tmp_path):
    for package in export_onnx.PACKAGES:
        pytest.importorskip(package)
    out, _ = call("experiments.export_onnx", trained / "out", "new/small.onnx", cwd=tmp_path)
    assert float(re.search(r"at most (\S+) of 255", out)[1]) < 1
    assert json.loads((tmp_path / "new" / "small.json").read_text())["image_size"] == 16


def test_the_export_says_what_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(export_onnx, "PACKAGES", ("not_there", "onnx"))
    error = refused("experiments.export_onnx", LAPTOP, "new.onnx", cwd=tmp_path)
    assert "not_there is missing: pip install not_there onnx" in error


# The page in a browser


@pytest.fixture(scope="session")
def browser():
    """The path of Chromium."""
    paths = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    if not any(paths):
        pytest.skip("Chromium is missing")
    return next(filter(None, paths))


@pytest.fixture(scope="session")
def library(browser, tmp_path_factory):
    """The folder with the files of onnxruntime-web."""
    if "ORT_WEB" in os.environ:
        return Path(os.environ["ORT_WEB"])
    if not shutil.which("npm"):
        pytest.skip("onnxruntime-web is missing: set ORT_WEB to its folder, or install npm")
    folder = tmp_path_factory.mktemp("npm")
    package = re.search(r"onnxruntime-web@[\d.]+", PAGE)[0]
    packed = subprocess.run([shutil.which("npm"), "pack", "--silent", package], cwd=folder)
    if packed.returncode:
        pytest.skip(f"{package} is missing: set ORT_WEB to its folder, or let npm download it")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "dist"


class Server(http.server.BaseHTTPRequestHandler):
    """Serves the page with a script at its end, which may fetch `numbers` and posts its answers."""

    def do_GET(self):
        path = self.path.split("?")[0]
        case = self.server.case
        if path == "/":
            content = PAGE + f"<script>{case.script}</script>"
            self.answer(200, content.encode(), "text/html")
        elif path == "/numbers":
            self.answer(200, case.numbers)
        else:
            file = case.library / path[5:] if path.startswith("/ort/") else DOCS / path[1:]
            there = file.is_file() and file.name not in case.without
            self.answer(200 if there else 404, file.read_bytes() if there else b"")

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.case.answers.put(content)
        self.answer(200, b"")

    def answer(self, status, content, kind="application/octet-stream"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


POST = 'const post = (body) => fetch("/answer", { method: "POST", body });'


@pytest.fixture
def browse(browser, library, tmp_path):
    """A function that opens the page, with a script at its end, and returns what that posts."""

    def open_page(script, numbers=b"", without=()):
        script = f"{POST} (async () => {{ {script} }})().catch((error) => post(String(error)));"
        case = {"script": script, "numbers": numbers, "without": without, "library": library}
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        server.case = types.SimpleNamespace(answers=queue.Queue(), **case)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [browser, *FLAGS.split(), f"--user-data-dir={tmp_path}"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # no other host
        address = f"http://127.0.0.1:{server.server_port}/?local"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, address], **quiet)
        try:
            return server.case.answers.get(timeout=120)
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
            server.server_close()

    return open_page


# (guidance, eta, share of the other class)
WAYS = {"guided": (3, 0, 0), "plain": (1, 0, 0), "fresh noise": (3, 1, 0), "mixed": (3, 0, 0.25)}
SAMPLE = """
const all = new Float32Array(await (await fetch("/numbers")).arrayBuffer());
const size = 6 * 3 * 64 * 64;
const draws = Array.from({ length: STEPS + 1 }, (_, i) => all.slice(i * size, (i + 1) * size));
const times = Array.from({ length: STEPS + 1 }, (_, step) => 1 - step / STEPS);
await turn;
const velocity = guided(network, Y, CFG_SCALE, Y_OTHER, SHARE);
let state;
for await (state of euler_states(velocity, draws.shift(), times, ETA, () => draws.shift()));
await post(state.x);
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_page_draws_what_sample_draws(browse, way):
    cfg_scale, eta, share = WAYS[way]
    steps, y, y_other = 10, [3, 6, 26, 41, 50, 68], [74] * 6
    model = DiT.from_pretrained(LAPTOP)

    def mixed(z, t, y):
        other = torch.where(y == model.num_classes, y, 74)
        return (1 - share) * model(z, t, y) + share * model(z, t, other)

    mixed.num_classes = model.num_classes
    network = mixed if share > 0 else model
    randn_like = sample.randn_like_of_places(5, range(6))
    draws = [randn_like(torch.empty(6, 3, 64, 64)) for _ in range(steps + 1)]
    randn_like = sample.randn_like_of_places(5, range(6))
    noise = randn_like(draws[0])
    how = {"eta": eta, "randn_like": randn_like}
    expected = sample.sample_conditional_cfg(network, y, steps, cfg_scale, noise, **how)

    script = SAMPLE
    values = {"STEPS": steps, "CFG_SCALE": cfg_scale, "ETA": eta, "SHARE": share}
    for name, value in {**values, "Y_OTHER": y_other, "Y": y}.items():
        script = re.sub(rf"\b{name}\b", str(value), script)
    answer = browse(script, torch.stack(draws).numpy().tobytes())
    assert len(answer) == 4 * expected.numel(), answer[:200]
    x = torch.frombuffer(bytearray(answer), dtype=torch.float32).view_as(expected)
    difference = (x - expected).abs().max() * 127.5
    print(f"{way}: largest difference {difference:.2g} of 255")
    assert difference < 2


USE = """
await turn;
const look = () => document.querySelector("canvas").toDataURL();
const settled = () => new Promise((resolve) => setTimeout(resolve, 50)).then(() => turn);
const pictures = [look()];
document.querySelector("[value=blue]").click();
await settled();
pictures.push(look());
element("new_noises").click();
await settled();
pictures.push(look());
element("back").click();
pictures.push(look());
const controls = [...document.querySelectorAll("button, input, select")];
const name = (e) => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent;
await post(JSON.stringify({
  pictures,
  t: element("t").value,
  text: element("status").textContent,
  unnamed: controls.filter((control) => !name(control)).length,
  hosts: performance.getEntriesByType("resource").map((entry) => new URL(entry.name).host),
  host: location.host,
  cookies: document.cookie,
}));
"""


@pytest.mark.slow
def test_the_page_is_used_and_asks_no_other_host(browse):
    seen = json.loads(browse(USE))
    assert len(set(seen["pictures"])) == 4
    assert seen["t"] == "t = 0.04"
    assert seen["text"].startswith("Six butterflies in 25 steps")
    assert seen["unnamed"] == 0
    assert set(seen["hosts"]) == {seen["host"]}
    assert not seen["cookies"]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["butterflies.onnx", "ort-wasm-simd-threaded.wasm"])
def test_the_page_says_which_file_is_missing(browse, file):
    script = "await turn.catch(() => null); await pause(50);"
    text = browse(script + "await post(element('status').textContent);", without=[file]).decode()
    assert re.fullmatch(rf"Sorry: \S*{file} cannot be loaded \(.+\)\.", text), text
