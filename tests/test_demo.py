"""experiments/demo.py in a real browser: Chromium, without a window. Skipped where gradio,
playwright or Chromium is missing; none of them is a requirement."""

import io
import shlex
import shutil
import socket
import threading
import time
import urllib.request

import pytest
import torch
from conftest import ROOT, call, refused, start
from PIL import Image

from common import load_model
from experiments.demo import command, grids_on_the_way

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LAPTOP = ROOT / "assets" / "laptop"


def test_a_bad_checkpoint_or_a_missing_gradio_is_one_line(tmp_path):
    extra = {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "gradio.py").write_text("")
    line = refused("experiments/demo.py", "--checkpoint", tmp_path, cwd=tmp_path, **extra)
    assert f"no model in {tmp_path}" in line
    (tmp_path / "gradio.py").write_text("raise ImportError")  # said before a model is loaded
    line = refused("experiments/demo.py", "--checkpoint", tmp_path, cwd=tmp_path, **extra)
    assert "pip install -U gradio" in line


def test_an_error_while_sampling_is_not_lost():
    frames = grids_on_the_way(load_model(LAPTOP), 75 + 1, 2, steps=3, cfg_scale=3.0, seed=0)
    with pytest.raises(IndexError):  # no such class
        list(frames)


def test_sampling_ends_when_nobody_looks_any_more():
    before = set(threading.enumerate())
    frames = grids_on_the_way(load_model(LAPTOP), 3, 1, steps=100_000, cfg_scale=3.0, seed=0)
    next(frames)
    (sampling,) = set(threading.enumerate()) - before
    frames.close()
    sampling.join(timeout=30)
    assert not sampling.is_alive()


def test_the_command_can_be_pasted(tmp_path):
    (tmp_path / "my network").symlink_to(LAPTOP)
    line = command("my network", 3, num_images=1, steps=2, cfg_scale=1.0, seed=4, eta=0.5)
    assert shlex.split(line)[:2] == ["python", "sample.py"]
    call("sample.py", *shlex.split(line)[2:], cwd=tmp_path)
    (grid,) = (tmp_path / "samples").iterdir()
    assert grid.name == "class-3-seed-4-my-network-images-1-steps-2-cfg-scale-1-eta-0.5.png"


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def page(tmp_path):
    """The demo with the laptop's network, open in Chromium."""
    pytest.importorskip("gradio", reason="needs pip install gradio")
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    port = free_port()
    flags = ["--checkpoint", LAPTOP, "--port", port, "--device", "cpu"]
    process = start("experiments/demo.py", *flags, cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert process.poll() is None, process.communicate()
            try:
                urllib.request.urlopen(url, timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        with api.sync_playwright() as playwright:
            options = ["--no-sandbox"]  # Chromium refuses its sandbox to root
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.goto(url)
            yield page
            browser.close()
    finally:
        process.kill()
        process.communicate()


# The button cannot be clicked while pictures come.
CLICK_AND_WAIT = """button => new Promise(done => {
    let busy = false;
    new MutationObserver(() => {
        if (button.disabled) busy = true;
        else if (busy) done();
    }).observe(button, {attributes: true});
    button.click();
})"""


def sampled(page):
    """Click, wait for the last picture, and return its pixels."""
    page.get_by_role("button", name="Sample").evaluate(CLICK_AND_WAIT)
    source = page.locator("img[src*='/file=']").first.get_attribute("src")
    content = page.request.get(source).body()
    with Image.open(io.BytesIO(content)) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()))


def choose_class(page, name):
    page.get_by_label("class", exact=True).first.click()
    page.get_by_role("option", name=name, exact=True).click()


def test_the_page_samples_what_is_chosen(page):
    first = sampled(page)
    assert torch.equal(sampled(page), first)  # the same seed
    choose_class(page, "yellow-spots-tailed")
    other_class = sampled(page)
    assert other_class.shape == first.shape and not torch.equal(other_class, first)
    text = page.locator(".cm-content").inner_text()
    assert "--class-id 74 " in text and "--num-images 4" in text and "--seed 0" in text
    page.get_by_label("seed", exact=True).fill("5")
    other_seed = sampled(page)
    assert not torch.equal(other_seed, other_class)
    assert "--seed 5" in page.locator(".cm-content").inner_text()
    page.get_by_label("number input for fresh noise in each step").fill("1")
    assert not torch.equal(sampled(page), other_seed)
    assert "--seed 5 --eta 1" in page.locator(".cm-content").inner_text()
