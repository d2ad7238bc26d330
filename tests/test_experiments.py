"""experiments/: what is measured, drawn and played there, against closed forms."""

import ast
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

from support.settings import UserError

import pytest
import torch
from helpers import ROOT, SMALL, call, environment, opened, refused, rows, save
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import sample
import train
from data.drawn import draw_butterflies
from experiments import demo, judge_drawn, method_figure, plot_loss, sampling, score, speed
from model import DiT

LAPTOP = ROOT / "assets" / "laptop"


def save_pictures(images, folder):
    for i, image in enumerate(images):
        save(to_pil_image(image), folder / f"{i}.png")


@pytest.fixture
def constants(monkeypatch):
    """Puts back the constants of train.py, which a script's flags change."""
    for name in train.SETTINGS:
        monkeypatch.setattr(train, name, getattr(train, name))


def test_no_script_changes_what_is_in_train():
    for file in (ROOT / "experiments").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                assert ast.unparse(node.value) != "train", f"{file.name}, line {node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
                assert ast.unparse(node.args[0]) != "train", f"{file.name}, line {node.lineno}"


# Losses and pictures


def test_losses_are_drawn_whatever_backend_a_notebook_has_named(trained, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "experiments.plot_loss", trained / "out"]
    backend = environment(MPLBACKEND="module://not_installed")
    figure = tmp_path / "new" / "loss.png"
    subprocess.run([*command, "--output", figure], cwd=ROOT, env=backend, check=True)
    assert len(opened(figure).getcolors(1 << 24)) > 20  # lines, not an empty sheet


LOGS = {
    "a single row": "5,0.9,2.0,2.1,0.4,0.5\n",
    "nothing held out": "5,0.9,nan,2.1,nan,0.5\n10,0.8,nan,2.0,nan,0.4\n",
    "a time added later": "5,0.9,,,0.4,0.5\n10,0.8,2.0,2.1,0.3,0.4\n15,0.8,1.9,2.0,0.3,0.4\n",
}


@pytest.mark.parametrize("log", LOGS)
def test_every_t_of_a_log_is_drawn(tmp_path, log):
    pytest.importorskip("matplotlib")
    columns = "step,train_loss,val_0.25,seen_0.25,val_0.75,seen_0.75\n"
    (tmp_path / "log.csv").write_text(columns + LOGS[log])
    call("experiments.plot_loss", tmp_path, cwd=tmp_path)
    figure = opened(tmp_path / "loss.png")
    panel = figure.crop((figure.width // 2, 0, figure.width * 7 // 8, figure.height))  # no legend
    colours = {colour for _, colour in panel.getcolors(1 << 24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two


def test_networks_beside_each_other_are_drawn_in_three_panels(tmp_path):
    pytest.importorskip("matplotlib")
    call("experiments.beside", "--output", "beside.png", cwd=tmp_path)
    figure = opened(tmp_path / "beside.png")
    for n in range(3):
        panel = figure.crop((figure.width * n // 3, 0, figure.width * (n + 1) // 3, figure.height))
        assert {(31, 119, 180), (255, 127, 14)} <= {c for _, c in panel.getcolors(1 << 24)}


MISSING = {
    "matplotlib": plot_loss.pyplot,
    "efficientnet_lite_pytorch": score.imagenet_network.__wrapped__,  # without its cache
    "gradio": demo.main,  # says so before it looks for the network
}


@pytest.mark.parametrize("package", MISSING)
def test_what_is_not_installed_is_said(monkeypatch, package):
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", "none"])
    for module in (package, f"{package}.pyplot"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install .*{package.replace('_', '-')}"):
        MISSING[package]()


@pytest.mark.parametrize("text", [None, "step,train_loss,val_loss\n", "time,loss\n1,2\n"])
def test_a_log_without_losses_is_refused(tmp_path, text):
    pytest.importorskip("matplotlib")
    if text:
        (tmp_path / "log.csv").write_text(text)
    assert "no losses in" in refused("experiments.plot_loss", tmp_path, cwd=tmp_path)


def roughness(image):
    """Mean difference of neighbouring pixels."""
    return pil_to_tensor(image).float().diff(dim=2).abs().mean().item()


def test_the_strip_goes_from_noise_to_samples(trained, tmp_path):
    folder = tmp_path / "new"
    out, _ = call("experiments.pictures", trained / "out", "--output", folder, cwd=tmp_path)
    assert out.split() == [str(folder / "drawn.png"), str(folder / "strip.png")]
    strip = opened(folder / "strip.png")  # 5 rows of 11, of 16 pixels and a margin
    assert strip.size == (11 * 18 + 2, 5 * 18 + 2)
    noise = strip.crop((2, 2, 18, 18))
    picture = strip.crop((10 * 18 + 2, 2, 10 * 18 + 18, 18))
    assert roughness(noise) > 1.5 * roughness(picture)
    assert opened(folder / "drawn.png").size == (15 * 66 + 2, 5 * 66 + 2)


def test_progress_shows_the_first_row_of_each_grid(trained, tmp_path):
    run = trained / "out"
    call("experiments.progress", run, "--steps", 30, 15, "--output", "rows.png", cwd=tmp_path)
    rows = opened(tmp_path / "rows.png")
    for i, step in enumerate((30, 15)):
        grid = opened(run / "samples" / f"step-{step:06}.png")
        assert rows.size == (grid.width, 2 * 18 + 2)
        first = grid.crop((0, 0, grid.width, 18)).tobytes()
        assert rows.crop((0, 18 * i, grid.width, 18 * i + 18)).tobytes() == first
    line = refused("experiments.progress", run, "--steps", 7, cwd=tmp_path)
    assert "step-000007.png does not exist" in line


def test_the_velocity_in_the_figure_is_the_mean_of_many_lines():
    # The mean of eps - x over many pairs whose line comes close to z, against the closed form.
    t, n, z = 0.6, 1_000_000, torch.tensor([0.2, -0.3])
    generator = torch.Generator().manual_seed(0)
    x = method_figure.DATA[torch.randint(4, (n,), generator=generator)]
    eps = method_figure.NOISE_CENTRE + torch.randn(n, 2, generator=generator)
    near = ((1 - t) * x + t * eps - z).norm(dim=1) < 0.05
    mean = (eps - x)[near].mean(0)
    (v,) = method_figure.mean_velocity(z[None], torch.tensor([t]))
    torch.testing.assert_close(v, mean, atol=0.15, rtol=0)


def test_the_paths_in_the_figure_go_from_noise_to_data():
    paths = method_figure.euler_paths(200)
    assert torch.equal(paths[0], method_figure.STARTS)
    assert torch.cdist(paths[-1], method_figure.DATA).amin(1).max() < 0.05


def test_the_figure_of_the_method_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    call("experiments.method_figure", LAPTOP, "--output", "method.png", cwd=tmp_path)
    image = opened(tmp_path / "method.png")
    assert image.width > 1000 and len(image.getcolors(1 << 24)) > 20_000  # of pictures, too


def test_half_precision_is_half_as_large_and_samples_the_same(trained, tmp_path):
    run, shared = trained / "out", tmp_path / "half"
    call("experiments.shrink", run, shared, "--cfg-scale", 2.5, cwd=tmp_path)
    whole, half = ((folder / "model.safetensors").stat().st_size for folder in (run, shared))
    assert half < 0.6 * whole
    model = DiT.from_pretrained(shared)
    assert model.cfg_scale == 2.5
    (first,) = sample.generate(model, [0, 1, 2])
    (second,) = sample.generate(DiT.from_pretrained(run), torch.arange(3), cfg_scale=2.5)
    assert (first.int() - second.int()).abs().float().mean() < 2
    assert "exists" in refused("experiments.shrink", run, shared, cwd=tmp_path)


def test_what_is_shared_has_the_card_of_the_run(trained, tmp_path):
    run, shared = trained / "out", tmp_path / "half"
    call("experiments.shrink", run, shared, cwd=tmp_path)
    card = (shared / "README.md").read_text("utf-8")
    loss = float(rows(run)[-1]["val_loss"])
    assert f"30 steps (held-out loss: {loss:.4f})" in card and "](samples/step-000030.png)" in card
    grid = "samples/step-000030.png"
    assert (shared / grid).read_bytes() == (run / grid).read_bytes()

    # A network without a log or a grid, such as a downloaded one.
    call("experiments.shrink", LAPTOP, tmp_path / "other", cwd=tmp_path)
    card = (tmp_path / "other" / "README.md").read_text("utf-8")
    assert "1.11 M parameters" in card and "held-out" not in card


# Judge and scores


@pytest.mark.slow
def test_the_judge_tells_drawings_from_mislabelled_ones():
    judge = judge_drawn.train_judge(images_per_class=14)
    images, labels, _ = draw_butterflies(2, 64, seed=9)
    x = judge_drawn.scaled(images)
    right = judge_drawn.shares(judge, x, labels)
    assert right["colour"] > 0.95 and right["shape"] > 0.8 and right["pattern"] > 0.7
    wrong = judge_drawn.shares(judge, x, (labels + 19) % 75)  # all three are others
    assert wrong["class"] < 0.1 and wrong["colour"] < 0.3


def test_a_sample_is_right_if_colour_pattern_and_shape_are():
    y = torch.tensor([74, 0, 7, 31])  # as colour, pattern, shape: 442, 000, 021, 201
    answers = torch.tensor([[4, 4, 2], [0, 0, 1], [0, 2, 1], [2, 0, 2]])
    logits = torch.cat([torch.eye(n)[a] for n, a in zip((5, 5, 3), answers.T)], dim=1)
    expected = {"colour": 1, "pattern": 1, "shape": 0.5, "class": 0.5}
    assert judge_drawn.shares(lambda batch: logits, torch.zeros(4), y) == expected


@pytest.mark.parametrize("script", ["judge_drawn", "method_figure", "sampling"])
def test_other_classes_than_the_drawn_ones_are_refused(trained, script):
    pytest.importorskip("matplotlib")
    flags = [trained / "out"] + ["--drawn"] * (script == "sampling")
    assert "not trained on drawn" in refused(f"experiments.{script}", *flags, cwd=trained)


def test_distances_by_hand():
    # Two features a picture. k(x, y) = (x.y / 2 + 1)^3: of (2, 0) with itself 27, of (0, 2) with
    # itself 27, of one with the other 1.
    a, b = torch.tensor([[2.0, 0.0]] * 2), torch.tensor([[0.0, 2.0]] * 3)
    assert score.kernel_distance(a, b) == pytest.approx(1000 * (27 + 27 - 2))

    # b = s a + d has s^2 times the covariance: the distance is |mean_b - mean_a|^2 + (s-1)^2 tr A.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 4, generator=generator, dtype=torch.float64) + 1
    b = 3 * a + torch.tensor([1.0, 0.0, -2.0, 0.5])
    moved = (b.mean(0) - a.mean(0)).square().sum()
    expected = moved + (3 - 1) ** 2 * torch.cov(a.T).trace()
    assert score.frechet_distance(a, b) == pytest.approx(expected.item())
    assert score.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_has_no_bias():
    # Two small samples of one distribution: on average 0, and not always above it.
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(400, 2, 5, 8, generator=generator, dtype=torch.float64)
    distances = torch.tensor([score.kernel_distance(a, b) for a, b in pairs])
    assert distances.mean().abs() < 3 * distances.std() / 20
    assert distances.min() < 0 < distances.max()


def test_class_accuracy_by_hand():
    # Around the mean (9, 5) of the real ones, "a" lies towards (1, -1) and "b" towards (-1, 1).
    real = torch.tensor([[11.0, 3.0], [10.0, 4.0], [8.0, 6.0], [7.0, 7.0]])
    names = ["a", "a", "b", "b"]
    pictures = torch.tensor([[13.0, 6.0], [9.0, 4.0], [13.0, 8.0], [8.0, 6.0]])  # a, a, a, b
    assert score.class_accuracy(pictures, names, real, names) == 0.75
    assert score.class_accuracy(pictures, ["b", "b", "b", "a"], real, names) == 0
    assert score.class_accuracy(pictures, ["a", "a", "a", "c"], real, names) is None
    assert score.class_accuracy(pictures, ["a"] * 4, real, ["a"] * 4) is None


def test_copies_are_found_and_classes_told(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    images, labels, _ = draw_butterflies(12, 64, seed=1)
    for i, name in enumerate(("red", "other")):
        own = images[labels == 74 * i]
        save_pictures(own[:6], tmp_path / "real" / name)
        save_pictures(own[6:], tmp_path / "training" / name)
        save_pictures(own[6:].flip(3), tmp_path / "right" / name)  # mirrored copies are copies
        save_pictures(own[6:], tmp_path / "wrong" / ("other", "red")[i])
    out, _ = call("experiments.score", "right", "real", "--training", "training", cwd=tmp_path)
    assert "12 generated, 12 real: KID x1000" in out and "class accuracy 1.000" in out
    least = re.findall(r"(\w+) to nearest training, by (\w+): .* least (.*)", out)
    least = {(which, by): float(distance) for which, by, distance in least}
    for by in ("pixels", "features"):
        assert least["generated", by] < 0.02 < least["real", by]
    assert "accuracy 0.000" in call("experiments.score", "wrong", "real", cwd=tmp_path)[0]
    assert "must differ" in refused("experiments.score", "real", "real", cwd=tmp_path)
    assert "none is not a folder" in refused("experiments.score", "none", "real", cwd=tmp_path)


# Ways to sample


def error(states):
    """Of the last state, if dz/dt = z and z(1) = 1, so that z(0) = 1/e."""
    *_, z = states
    return abs(z.item() - 1 / math.e)


def test_heun_is_of_second_order_and_euler_of_first():
    def velocity(z, t):
        return z

    few, many = sample.uniform_times(20), sample.uniform_times(40)
    euler = [error(sample.euler_states(velocity, torch.ones(1), times)) for times in (few, many)]
    heun = [error(sampling.heun_states(velocity, torch.ones(1), times)) for times in (few, many)]
    assert euler[0] / euler[1] == pytest.approx(2, rel=0.1)
    assert heun[1] < heun[0] / 2.5 < euler[0] / 12


def test_without_a_special_way_it_is_that_of_sample():
    model = DiT.from_pretrained(LAPTOP)
    pictures, runs = sampling.samples(model, 1, seed=5, steps=2, eta=0.7)
    same = sample.generate(model, torch.arange(75), seed=5, steps=2, eta=0.7)
    assert torch.equal(pictures, torch.cat(list(same))) and runs == 4
    # A special way begins with the same noise: a single step of Heun's is one of Euler's.
    pictures, runs = sampling.samples(model, 1, seed=5, steps=1, heun=True)
    same = sample.generate(model, torch.arange(75), seed=5, steps=1)
    assert torch.equal(pictures, torch.cat(list(same))) and runs == 2


# How often the network runs in four steps, and at which t.
WAYS = [
    ({}, 8, [1, 0.75, 0.5, 0.25]),
    ({"scale": 1.0}, 4, [1, 0.75, 0.5, 0.25]),
    ({"interval": (0.25, 0.75)}, 6, [1, 0.75, 0.5, 0.25]),
    ({"shift": 3}, 8, [1, 0.9, 0.75, 0.5]),
    ({"heun": True}, 14, [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
]


@pytest.mark.parametrize("way, expected, times", WAYS)
def test_evaluations_are_those_that_the_network_saw(way, expected, times):
    model, calls = DiT(16, 4, 16, 1, 2, ["a", "b"]), []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    _, runs = sampling.samples(model, 3, seed=0, steps=4, **way)
    assert runs == expected == sum(len(z) for z, _, _ in calls) / 6
    assert [t[0].item() for _, t, _ in calls] == pytest.approx(times)


def test_each_way_is_a_row_of_the_table(trained, pictures):
    pytest.importorskip("efficientnet_lite_pytorch")
    few = ["--held-out", pictures, "--samples", 2, "--only", "5 steps", "Heun, 6 steps"]
    out, _ = call("experiments.sampling", trained / "out", *few, "--seeds", 0, 1, cwd=trained)
    assert re.search(r"^\| 5 steps \| 10 \| \d+ ± \d+ \|$", out, re.MULTILINE)
    assert re.search(r"^\| Heun, 6 steps \| 22 \| \d+ ± \d+ \|$", out, re.MULTILINE)
    assert "12 steps" in refused("experiments.sampling", "out", *few, "77 steps", cwd=trained)


# Speed


def test_speed_says_what_a_step_costs(tmp_path, monkeypatch, constants):
    monkeypatch.setattr(speed, "SECONDS", 0.05)
    run = [*SMALL, "--batch-size", "4", "--compile", "off", "--steps", "3"]  # fewer than it takes
    out, _ = call("experiments.speed", *run, cwd=tmp_path)
    shares = [float(share) for share in re.findall(r"^ *([\d.]+)% ", out, re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=0.5) and shares[0] > 0  # of matrix products
    model = DiT(16, 4, 16, 1, 2, speed.CLASSES)
    assert f"{sum(w.numel() for w in model.parameters()) / 1e6:.2f} M parameters" in out
    (percent,) = re.findall(r"(\d+)% of the speed of a bare loop", out)
    assert 2 < int(percent) < 150 and " images/s" in out and " PFLOP, " in out
    assert list(tmp_path.iterdir()) == []
    assert "begins anew" in refused("experiments.speed", "--resume", cwd=tmp_path)


def test_operations_grow_with_the_network_as_they_should():
    networks = (DiT(64, 8, 256, depth, 4, ["a", "b"]) for depth in (2, 4))
    two, four = map(speed.flops_per_image, networks)
    # A block's matrices: 12 dim^2 weights for each of 64 tokens and 6 dim^2 for the condition.
    # Each weight is multiplied and added, forward and twice backward. Attention: two products.
    matrices = 6 * (64 * 12 + 6) * 256**2
    attention = 6 * 2 * 64 * 64 * 256
    assert (four - two) / 2 == pytest.approx(matrices + attention, rel=0.01)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_how_a_run_starts_is_measured(pictures, tmp_path, constants):
    flags = ["start", *SMALL, "--batch-size", 4, "--dataset", pictures]
    out, _ = call("experiments.many_pictures", *flags, cwd=tmp_path)
    line = r"first step after [\d.]+ s, [\d.]+ GiB private, \d+ images/s\n"
    assert re.fullmatch(line, out) and list(tmp_path.iterdir()) == []
    assert "begins anew" in refused("experiments.many_pictures", *flags, "--resume", cwd=tmp_path)


# The demo


def test_the_command_of_the_demo_makes_its_last_picture(tmp_path):
    (tmp_path / "my network").symlink_to(LAPTOP)
    settings = {"class_id": 3, "num_images": 2, "steps": 3, "cfg_scale": 1.5, "seed": 4, "eta": 0.5}
    model = DiT.from_pretrained(LAPTOP)
    noise, *_, last = demo.grids_on_the_way(model, **settings)
    line = demo.command("my network", **settings)
    python, script, *flags = shlex.split(line)
    assert (python, script) == ("python", "sample.py")
    call("sample", *flags, "--device", "cpu", "--output", "grid.png", cwd=tmp_path)
    assert opened(tmp_path / "grid.png").tobytes() == last.tobytes() != noise.tobytes()


@pytest.mark.parametrize(("dataset", "eta"), [("drawn", 0), ("photographs", 1)])
def test_only_drawings_begin_without_fresh_noise(monkeypatch, dataset, eta):
    gradio = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    demo.build_page(mock.Mock(dataset=dataset, cfg_scale=3.0, class_names=["a"]), "out")
    gradio.Slider.assert_any_call(0, 1, eta, step=0.1, label="fresh noise in each step")


def test_what_the_demo_cannot_do_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", str(LAPTOP), "--device", "cpu"])
    gradio = mock.MagicMock()
    page = gradio.Blocks.return_value.__enter__.return_value
    page.launch.side_effect = KeyError("whatever a proxy makes of it")
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    with pytest.raises(UserError, match="--port"):
        demo.main()


@pytest.mark.slow
def test_the_page_samples_what_is_chosen(monkeypatch, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = demo.build_page(DiT.from_pretrained(LAPTOP), LAPTOP)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(url, verbose=False)
        job = client.submit(74, 2, 3, 2.0, 5, 1.0, api_name="/on_click")
        path, line = job.result(timeout=60)
        assert len(job.outputs()) == 4  # the noise, and three steps
        flags = "--class-id 74 --num-images 2 --steps 3 --cfg-scale 2 --seed 5 --eta 1"
        assert line.endswith(flags)
        assert opened(path).size == (2 * 66 * 3 + 6, 66 * 3 + 6)
    finally:
        page.close()
