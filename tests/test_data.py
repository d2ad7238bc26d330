"""Pictures of every kind come out right, and what is no picture is passed over."""

import pytest
import torch
from PIL import Image

import train
from data.images import held_out, load_images
from model import MIN_T, UserError
from train import random_batch

RED = (200, 30, 40)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def solid(mode="RGB", colour=RED, size=(20, 20)):
    return Image.new(mode, size, colour)


def assert_colour(image, colour, tolerance=3):
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    difference = (image.int() - torch.tensor(colour)[:, None, None]).abs()
    assert difference.max() <= tolerance, image.flatten(1).float().mean(1)


@pytest.mark.parametrize(
    "name, image, options, colour",
    [
        ("rgb.jpg", solid(), {"quality": 95}, RED),
        ("rgb.PNG", solid(), {}, RED),
        ("rgb.webp", solid(), {"lossless": True}, RED),
        ("palette.png", solid().quantize(4), {}, RED),
        ("palette.gif", solid().quantize(4), {}, RED),
        ("grey.png", solid("L", 90), {}, (90, 90, 90)),
        ("two.png", solid("1", 1), {}, (255, 255, 255)),
        ("cmyk.jpg", solid("CMYK", (0, 255, 255, 0)), {"quality": 95}, (255, 0, 0)),
        ("opaque.png", solid("RGBA", (*RED, 255)), {}, RED),
        ("clear.png", solid("RGBA", (*RED, 0)), {}, (255, 255, 255)),
        ("half.png", solid("RGBA", (*RED, 51)), {}, (244, 210, 212)),
        ("grey-clear.png", solid("LA", (90, 0)), {}, (255, 255, 255)),
        ("deep.png", solid("I;16", 90 * 256), {}, (90, 90, 90)),
    ],
)
def test_modes_and_formats(tmp_path, name, image, options, colour):
    save(image, tmp_path / "class" / name, **options)
    images, labels, names = load_images(tmp_path, 16)
    assert len(images) == 1 and labels.tolist() == [0] and names == ["class"]
    assert_colour(images[0], colour)


def test_exif_rotation_is_undone(tmp_path):
    # Stored on its side; orientation 6: turn by 90 degrees clockwise, the left side to the top.
    image = Image.new("RGB", (20, 20), "blue")
    image.paste(RED, (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(image, tmp_path / "class" / "turned.png", exif=exif)
    picture = load_images(tmp_path, 16)[0][0]
    assert picture[0, :7].min() > 190 and picture[0, 9:].max() < 10
    assert picture[2, 9:].min() > 245


@pytest.mark.parametrize("size", [(60, 20), (20, 60)])
def test_the_middle_of_a_long_picture_stays(tmp_path, size):
    image = Image.new("RGB", size, "blue")
    left, top = (size[0] - 20) // 2, (size[1] - 20) // 2
    image.paste(RED, (left, top, left + 20, top + 20))
    save(image, tmp_path / "class" / "long.png")
    assert_colour(load_images(tmp_path, 16)[0][0][:, 2:-2, 2:-2].repeat(1, 2, 2)[:, :16, :16], RED)


def test_resizing_is_antialiased(tmp_path):
    # A checkerboard of single pixels is grey from afar; taking every eighth pixel would not be.
    board = Image.new("L", (128, 128))
    board.putdata([255 * ((i + i // 128) % 2) for i in range(128 * 128)])
    save(board, tmp_path / "class" / "board.png")
    assert_colour(load_images(tmp_path, 16)[0][0], (128, 128, 128), tolerance=12)


def test_classes_are_sorted_and_labels_follow(tmp_path):
    for name, value in (("b two", 20), ("A", 10), ("c", 30), ("Ünï 蝶", 40)):
        for n in (2, 1):
            save(solid("L", value + n), tmp_path / name / "deeper" / f"{n}.png")
    images, labels, names = load_images(tmp_path, 16)
    assert names == ["A", "b two", "c", "Ünï 蝶"]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and labels.dtype == torch.int64
    assert images[:, 0, 0, 0].tolist() == [11, 12, 21, 22, 31, 32, 41, 42]


def test_hidden_things_and_non_pictures_are_passed_over(tmp_path, capsys):
    save(solid(), tmp_path / "class" / "good.png")
    save(solid(), tmp_path / ".cache" / "hidden.png")
    save(solid(), tmp_path / "class" / ".thumbnails" / "hidden.png")
    save(solid(), tmp_path / "class" / ".hidden.png")
    (tmp_path / "README.md").write_text("not a picture")
    (tmp_path / "class" / "notes.txt").write_text("not a picture")
    images, _, names = load_images(tmp_path, 16)
    assert len(images) == 1 and names == ["class"]
    assert "skipped" not in capsys.readouterr().err


def test_broken_pictures_are_named_and_counted(tmp_path, capsys):
    for n in range(5):
        save(solid(), tmp_path / "class" / f"{n}.png")
    whole = (tmp_path / "class" / "0.png").read_bytes()
    (tmp_path / "class" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "class" / "empty.jpg").write_bytes(b"")
    images, labels, _ = load_images(tmp_path, 16)
    assert len(images) == len(labels) == 5
    err = capsys.readouterr().err
    assert "cut.png" in err and "empty.jpg" in err and "skipped 2 " in err


def test_a_class_left_empty_is_named(tmp_path):
    save(solid(), tmp_path / "full" / "1.png")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="void"):
        load_images(tmp_path, 16)
    (tmp_path / "void" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="void"):
        load_images(tmp_path, 16)


def test_no_picture_at_all(tmp_path):
    with pytest.raises(UserError, match="no pictures"):
        load_images(tmp_path, 16)


def test_pictures_directly_in_the_folder_are_one_class(tmp_path):
    for n in range(3):
        save(solid(), tmp_path / "mine" / f"{n}.png")
    images, labels, names = load_images(tmp_path / "mine", 16)
    assert len(images) == 3 and labels.tolist() == [0, 0, 0] and names == ["mine"]


def test_a_twentieth_of_each_class_is_held_out_always_the_same():
    labels = torch.tensor([0] * 1 + [1] * 2 + [2] * 20 + [3] * 60)
    mask = held_out(labels)
    assert [int(mask[labels == c].sum()) for c in range(4)] == [0, 0, 1, 3]
    assert torch.equal(mask, held_out(labels))


def test_a_batch_follows_from_the_seed_and_the_step(monkeypatch):
    monkeypatch.setattr(train, "BATCH_SIZE", 4000)
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images[:, :, :, 0] = 255  # bright on the left, unless mirrored
    images[1, 0] = 255
    labels = torch.tensor([0, 1, 2])
    x, y, t, noise = random_batch(images, labels, 3, step=5)
    assert x.shape == noise.shape == (4000, 3, 4, 4) and y.shape == t.shape == (4000,)
    assert x.dtype == noise.dtype == t.dtype == torch.float32 and y.dtype == torch.int64
    assert x.unique().tolist() == [-1, 1]
    mirrored = (x[:, 1, 0, 3] == 1).float().mean()
    assert mirrored == pytest.approx(0.5, abs=0.04)
    assert (y == 3).float().mean() == pytest.approx(train.LABEL_DROP, abs=0.025)
    assert ((x[:, 0, 0, 1] == 1) == (y == 1))[y != 3].all()  # labels stay with their pictures
    assert MIN_T <= t.min() < MIN_T + 0.05 and t.max() < 1
    logit = torch.logit(t.double())
    assert logit.mean().item() == pytest.approx(train.T_MEAN, abs=0.08)
    assert logit.std().item() == pytest.approx(train.T_STD, abs=0.06)
    assert abs(noise.mean()) < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)

    again = random_batch(images, labels, 3, step=5)
    assert all(torch.equal(a, b) for a, b in zip(again, (x, y, t, noise)))
    assert not torch.equal(random_batch(images, labels, 3, step=6)[3], noise)
