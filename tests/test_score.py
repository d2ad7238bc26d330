"""experiments/score.py: distances against closed forms, and rankings that an eye would give."""

import pytest
import torch
from conftest import call, refused
from PIL import Image

from data.drawn import draw_butterflies
from experiments.score import (
    class_accuracy,
    features,
    frechet_distance,
    kernel_distance,
    report_nearest,
)


def test_kernel_distance_by_hand():
    # Two features a picture. k(x, y) = (x.y / 2 + 1)^3: of (2, 0) with itself 27, of (0, 2) with
    # itself 27, of one with the other 1.
    a, b = torch.tensor([[2.0, 0.0]] * 2), torch.tensor([[0.0, 2.0]] * 3)
    assert kernel_distance(a, b) == pytest.approx(1000 * (27 + 27 - 2))


def test_kernel_distance_has_no_bias():
    # Two small samples of one distribution: on average 0, and not always above it.
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(400, 2, 5, 8, generator=generator, dtype=torch.float64)
    distances = torch.tensor([kernel_distance(a, b) for a, b in pairs])
    assert distances.mean().abs() < 3 * distances.std() / 20
    assert distances.min() < 0 < distances.max()


def test_frechet_distance_by_hand():
    # b = s a + d has s^2 times the covariance: the distance is |mean_b - mean_a|^2 + (s-1)^2 tr A.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 4, generator=generator, dtype=torch.float64) + 1
    d = torch.tensor([1.0, 0.0, -2.0, 0.5])
    b = 3 * a + d
    moved = (b.mean(0) - a.mean(0)).square().sum()
    expected = moved + (3 - 1) ** 2 * torch.cov(a.T).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item())
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_class_accuracy_by_hand():
    # Around the mean (5, 5) of the real ones, "a" lies towards (1, -1) and "b" towards (-1, 1).
    real = torch.tensor([[7.0, 3.0], [6.0, 4.0], [4.0, 6.0], [3.0, 7.0]])
    names = ["a", "a", "b", "b"]
    pictures = torch.tensor([[9.0, 6.0], [5.0, 4.0], [9.0, 8.0], [4.0, 9.0]])  # three of a, one b
    assert class_accuracy(pictures, ["a", "a", "b", "b"], real, names) == 0.75
    assert class_accuracy(pictures, ["b", "b", "b", "a"], real, names) == 0
    assert class_accuracy(pictures, ["a", "a", "a", "c"], real, names) is None
    assert class_accuracy(pictures, ["a"] * 4, real, ["a"] * 4) is None


def test_worse_pictures_are_farther():
    pytest.importorskip("efficientnet_lite_pytorch")
    real = draw_butterflies(1, 64, seed=1)[0]
    other = draw_butterflies(1, 64, seed=2)[0][::3]  # a picture of each colour and pattern
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, other.shape, generator=generator)

    def noisy(share):
        return ((1 - share) * other + share * noise).round().to(torch.uint8)

    b, noised = features(real), [features(noisy(share)) for share in (0, 0.1, 0.5)]
    for distance in (kernel_distance, frechet_distance):
        good, worse, worst = (distance(a, b) for a in noised)
        assert good < worse < worst


def save(images, folder):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")


def test_the_command_scores_folders_and_finds_copies(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    images, _, _ = draw_butterflies(1, 64, seed=1)
    save(images[:12], tmp_path / "training" / "a")
    save(images[12:24], tmp_path / "real" / "a")
    copies = images[:12].flip(3)  # mirrored copies are copies
    save(copies, tmp_path / "fakes" / "a")
    folders = [tmp_path / name for name in ("fakes", "real")]
    out, _ = call(
        "experiments/score.py", *folders, "--training", tmp_path / "training", cwd=tmp_path
    )
    assert "12 generated, 12 real: KID x1000" in out
    lines = {line.split(":")[0]: line for line in out.splitlines()}
    for by in ("pixels", "features"):
        copied = lines[f"generated to nearest training, by {by}"]
        normal = lines[f"real to nearest training, by {by}"]
        assert float(copied.split()[-1]) == pytest.approx(0, abs=0.02)
        assert float(normal.split()[-1]) > 0.02


def test_the_command_says_whether_pictures_are_of_their_class(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    images, labels, _ = draw_butterflies(12, 64, seed=1)
    for i, name in enumerate(("red", "other")):
        own = images[labels == 74 * i]
        save(own[:8], tmp_path / "real" / name)
        save(own[8:], tmp_path / "right" / name)
        save(own[8:], tmp_path / "wrong" / ("other", "red")[i])
        save(own[8:], tmp_path / "unknown" / f"{name} admiral")
    for folder, line in (
        ("right", "accuracy 1.000"),
        ("wrong", "accuracy 0.000"),
        ("unknown", "no class accuracy"),
    ):
        out, _ = call("experiments/score.py", tmp_path / folder, tmp_path / "real", cwd=tmp_path)
        assert line in out and out.count("accuracy") == 1


def test_nearest_training_pictures_in_numbers(capsys):
    # Black pictures and training pictures of grey 10: root mean square 10, whatever their number.
    black, grey = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.full((3, 3, 64, 64), 10)
    pytest.importorskip("efficientnet_lite_pytorch")
    grey = grey.to(torch.uint8)
    seen = features(black)
    report_nearest((black, seen), (grey, features(grey)), (grey, features(grey)))
    out = capsys.readouterr().out
    assert "generated to nearest training, by pixels: median 10, least 10" in out
    assert "real to nearest training, by pixels: median 0, least 0" in out


def test_what_cannot_be_scored_is_refused(tmp_path, pictures):
    line = refused("experiments/score.py", tmp_path / "none", pictures, cwd=tmp_path)
    assert "none is not a folder" in line
    assert "must differ" in refused("experiments/score.py", pictures, pictures, cwd=tmp_path)
    (tmp_path / "efficientnet_lite_pytorch.py").write_text("raise ImportError('x', name='it')")
    folders = [pictures, next(pictures.iterdir())]
    line = refused("experiments/score.py", *folders, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "pip install" in line
