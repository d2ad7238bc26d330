"""experiments/sampling.py: its ways to sample, against closed forms, and the table it writes."""

import math
import shutil
import sys

import pytest
import torch
from conftest import ROOT, refused

import sample
from experiments import sampling
from experiments.renoise import renoise
from experiments.sampling import BASE, integrate
from model import DiT, UserError


class Growth:
    """dz/dt = z, whatever the class: z(0) = z(1) / e. Counts the pictures that it sees."""

    num_classes, seen = 3, 0

    def __call__(self, z, t, y):
        self.seen += len(z)
        return z


def error(**way):
    z, _ = integrate(Growth(), torch.zeros(1, dtype=torch.long), torch.ones(1, 3, 1, 1), **way)
    return abs(z[0, 0, 0, 0].item() - 1 / math.e)


def test_the_plain_way_is_that_of_sample():
    def model(z, t, y):
        return torch.sin(3 * z + t[:, None, None, None]) + y[:, None, None, None]

    model.num_classes = 3
    noise, y = torch.randn(2, 3, 4, 4), torch.tensor([0, 2])
    z, runs = integrate(model, y, noise, **{**BASE, "steps": 7})
    plain = sample.sample_conditional_cfg(model, y, 7, BASE["scale"], noise)
    torch.testing.assert_close(z, plain, atol=1e-5, rtol=1e-5)
    assert runs == 14


def test_fresh_noise_is_that_of_sample():
    model = DiT.from_pretrained(ROOT / "assets" / "laptop")
    classes = torch.arange(model.num_classes)
    pictures = torch.cat(list(sample.generate(model, classes, seed=5, steps=4, eta=0.7)))
    same, _ = sampling.samples(model, 1, 5, **{**BASE, "steps": 4, "eta": 0.7})
    assert (pictures.int() - same.int()).abs().float().mean() < 1
    plain = torch.cat(list(sample.generate(model, classes, seed=5, steps=4)))
    assert (pictures.int() - plain.int()).abs().float().mean() > 5


def test_heun_is_of_second_order_and_euler_of_first():
    euler = [error(**{**BASE, "steps": n, "scale": 1}) for n in (20, 40)]
    assert euler[0] / euler[1] == pytest.approx(2, rel=0.1)
    heun = [error(**{**BASE, "steps": n, "scale": 1, "heun": True}) for n in (20, 40)]
    assert heun[1] < heun[0] / 2.5 and heun[0] < euler[0] / 5


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_steps_begin_and_end_where_the_even_ones_do(shift):
    assert error(**{**BASE, "steps": 400, "shift": shift}) < 3e-3


def test_fresh_noise_leaves_the_distribution_and_forgets_the_first_noise():
    std = 0.5  # of the data, which are normal: the best prediction is known

    def model(z, t, y):
        t = t[:, None, None, None]
        x = (1 - t) * std**2 * z / ((1 - t) ** 2 * std**2 + t**2)
        return (z - x) / t

    model.num_classes = 1
    noise, y = torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.long)
    for eta, low, high in ((0.0, 0.999, 1.001), (0.5, 0.1, 0.5), (1.0, -0.05, 0.05)):
        way = {**BASE, "steps": 200, "eta": eta}
        generator = torch.Generator().manual_seed(0)
        x, runs = integrate(model, y, noise, **way, generator=generator)
        assert runs == 400 and x.std().item() == pytest.approx(std, rel=0.03)
        correlation = torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1].item()
        assert low < correlation < high


def test_evaluations_are_those_that_the_network_saw():
    model, noise = Growth(), torch.ones(5, 3, 1, 1)
    y = torch.zeros(5, dtype=torch.long)
    for way, expected in (
        ({"steps": 10}, 20),
        ({"steps": 10, "scale": 1.0}, 10),
        ({"steps": 10, "interval": (0.25, 0.75)}, 15),  # with guidance at 0.7 0.6 0.5 0.4 0.3
        ({"steps": 10, "heun": True}, 38),
    ):
        model.seen = 0
        _, runs = integrate(model, y, noise, **{**BASE, **way})
        assert runs == expected and model.seen == expected * len(y)


def test_rows_are_scored_once_and_shown(trained, pictures, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "efficientnet_lite_pytorch"):
        pytest.importorskip(name)
    only = ["--samples", 2, "--output", tmp_path, "--only", "5 steps", "scale 1"]
    run = ["sampling.py", trained / "out", "--held-out", pictures, *only]
    monkeypatch.setattr(sys, "argv", list(map(str, run)))
    sampling.main()
    assert capsys.readouterr().out.count("'row'") == 2
    table = (tmp_path / "sampling-photographs.md").read_text().splitlines()
    assert len(table) == 4 and table[2].startswith("| 5 steps | 10 |")
    assert (tmp_path / "sampling-photographs.png").stat().st_size > 5000
    sampling.main()
    assert "'row'" not in capsys.readouterr().out  # nothing is sampled twice

    # Pictures to compare with have rows of their own, too.
    shutil.copytree(pictures, tmp_path / "others")
    held_out = [*map(str, run[:3]), str(tmp_path / "others"), *map(str, run[4:-1])]
    monkeypatch.setattr(sys, "argv", held_out)
    sampling.main()
    assert capsys.readouterr().out.count("'row'") == 1
    monkeypatch.setattr(sys, "argv", [*map(str, run[:2]), "--drawn", *map(str, run[4:])])
    with pytest.raises(UserError, match="not trained on drawn butterflies"):
        sampling.main()

    # Another network has rows of its own, and its table shows no others.
    other = DiT.from_pretrained(trained / "out")
    other.patch_embedding.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(sys, "argv", ["sampling.py", str(tmp_path / "other"), *map(str, run[2:-1])])
    sampling.main()
    assert capsys.readouterr().out.count("'row'") == 1
    assert len((tmp_path / "sampling-photographs.md").read_text().splitlines()) == 3

    monkeypatch.setattr(sys, "argv", [*map(str, run), "77 steps"])
    with pytest.raises(UserError, match="12 steps"):
        sampling.main()


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_renoised_pictures_come_back_along_the_true_velocity(t):
    x = torch.rand(3, 3, 4, 4) * 2 - 1
    classes = torch.tensor([2, 0, 1])

    def velocity(z, now, y):
        pictures = x[[classes.tolist().index(i) for i in y]]
        return (z - pictures) / now[:, None, None, None]

    velocity.num_classes = 3
    torch.testing.assert_close(renoise(velocity, x, classes, t), x, atol=1e-5, rtol=0)

    # A velocity of 0 leaves what was noised.
    def still(z, now, y):
        return 0 * z

    still.num_classes = 3
    noised = renoise(still, x, classes, t, seed=3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(noised, (1 - t) * x + t * noise)


def test_rows_are_guided_as_the_network_is_by_default(trained, pictures, tmp_path, monkeypatch):
    for name in ("matplotlib", "efficientnet_lite_pytorch"):
        pytest.importorskip(name)
    model = DiT.from_pretrained(trained / "out")
    model.cfg_scale = 1.0  # not guided: the network runs once per step
    model.save_pretrained(tmp_path / "model")
    few = ["--held-out", pictures, "--output", tmp_path / "new" / "folder", "--only", "5 steps"]
    run = ["sampling.py", tmp_path / "model", *few, "--samples", 1, "--seeds", 0, 0]
    monkeypatch.setattr(sys, "argv", list(map(str, run)))
    sampling.main()
    table = (tmp_path / "new" / "folder" / "sampling-photographs.md").read_text()
    assert "| 5 steps | 5 |" in table and table.endswith(" 1 |\n")


def test_renoise_refuses_what_it_cannot_compare(trained, pictures, tmp_path):
    command = ["experiments/renoise.py", trained / "out", "--dataset", pictures, "--held-out"]
    assert "the same folder" in refused(*command, pictures, cwd=tmp_path)
    pytest.importorskip("efficientnet_lite_pytorch")
    one = tmp_path / "one" / "class"
    one.mkdir(parents=True)
    shutil.copy(next(pictures.rglob("*.png")), one)
    assert "at least two" in refused(*command, tmp_path / "one", cwd=tmp_path)
