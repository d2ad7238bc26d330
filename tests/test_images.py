"""Pictures of every kind come out right; packed files and parquet are read as folders are."""

import contextlib
import io
import os
import shutil
import struct
import sys
from pathlib import Path
from unittest import mock

from support.settings import UserError

import pytest
import torch
from helpers import FEW, RED, call, refused, save, solid, start
from PIL import Image
from safetensors.torch import save_file

from data import images as reading
from data.folders import PICTURES
from data.images import load_dataset, load_images, read_all


def assert_colour(image, colour, tolerance=3):
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    difference = (image.int() - torch.tensor(colour)[:, None, None]).abs()
    assert difference.max() <= tolerance, image.flatten(1).float().mean(1)


def read_one(folder, image, name="0.png", **options):
    """A picture, written to a folder and read as its only picture."""
    save(image, folder / "class" / name, **options)
    images, labels, names = load_images(folder, 16)
    assert len(images) == 1 and labels.tolist() == [0] and names == ["class"]
    return images[0]


# Kinds of pictures


WHITE = (255, 255, 255)
KINDS = [
    ("rgb.jpg", solid(), {"quality": 95}, RED),
    ("rgb.PNG", solid(), {}, RED),
    ("palette.gif", solid().quantize(4), {}, RED),
    ("palette-key.png", solid().quantize(4), {"transparency": 0}, WHITE),
    ("two.png", solid("1", 1), {}, WHITE),
    ("cmyk.jpg", solid("CMYK", (0, 255, 255, 0)), {"quality": 95}, (255, 0, 0)),
    ("clear.png", solid("RGBA", (*RED, 0)), {}, WHITE),
    ("half.png", solid("RGBA", (*RED, 51)), {}, (244, 210, 212)),
    ("colour-key.png", solid(), {"transparency": RED}, WHITE),
    ("grey-clear.png", solid("LA", (90, 0)), {}, WHITE),
    ("deep.png", solid("I;16", 90 * 257), {}, (90, 90, 90)),
    ("dark.png", solid("I;16", 200), {}, (1, 1, 1)),  # of 65,535: nearly black, as it is shown
]


@pytest.mark.parametrize("name, image, options, colour", KINDS)
def test_modes_and_formats(tmp_path, name, image, options, colour):
    assert_colour(read_one(tmp_path, image, name, **options), colour)


def test_every_ending_that_pillow_writes_is_read(tmp_path):
    written = []
    for ending in PICTURES & {key for key, kind in Image.registered_extensions().items()}:
        with contextlib.suppress(KeyError, OSError, ValueError):  # of formats that it only reads
            save(solid("RGB", (90, 90, 90)), tmp_path / "class" / f"0{ending}")
            written.append(ending)
    images, _, _ = load_images(tmp_path, 16)
    assert 35 <= len(images) <= len(written) and {".tga", ".avif", ".jp2"} <= set(written)
    assert (images.int() - 90).abs().max() < 4


def test_exif_rotation_is_undone(tmp_path):
    # Stored on its side; orientation 6: turn by 90 degrees clockwise, the left side to the top.
    image = Image.new("RGB", (20, 20), "blue")
    image.paste(RED, (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = read_one(tmp_path, image, exif=exif)
    assert picture[0, :7].min() > 190 and picture[0, 9:].max() < 10
    assert picture[2, 9:].min() > 245


@pytest.mark.parametrize(
    "mode, options, grey",
    [("L", {}, 128), ("P", {}, 128), ("1", {}, 128), ("RGB", {"transparency": (0, 0, 0)}, 255)],
)
def test_resizing_is_antialiased(tmp_path, mode, options, grey):
    # A checkerboard of single pixels is grey from afar; taking every eighth pixel would not be.
    # Where black stands for transparency, white is all there is: pixels are not mixed with it.
    board = Image.new("L", (128, 128))
    board.putdata([255 * ((i + i // 128) % 2) for i in range(128 * 128)])
    picture = read_one(tmp_path, board.convert(mode), **options)
    assert_colour(picture, (grey, grey, grey), tolerance=12)


def test_a_large_photograph_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    spy = mock.Mock(side_effect=reading.ImageOps.exif_transpose)
    monkeypatch.setattr(reading.ImageOps, "exif_transpose", spy)
    assert_colour(read_one(tmp_path, solid(size=(800, 400)), "0.jpg", quality=95), RED)
    assert spy.call_args.args[0].size == (100, 50)


def grey_tiff(path, bits, zero_is_white, value, kind=1):
    """Write a grey TIFF of 4x4 pixels of the same value."""
    data = struct.pack("<H", value) * 16
    if bits == 12:  # two in three bytes
        data = (value << 12 | value).to_bytes(3, "big") * 8
    size = {256: 4, 257: 4, 258: bits, 259: 1, 262: 0 if zero_is_white else 1, 273: 8, 277: 1}
    tags = {**size, 278: 4, 279: len(data), 339: kind}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"II*\0" + struct.pack("<I", 8 + len(data)) + data)
        file.write(struct.pack("<H", len(tags)))
        for tag, number in tags.items():
            file.write(struct.pack("<HHII", tag, 4, 1, number))
        file.write(bytes(4))


@pytest.mark.parametrize(
    "bits, zero_is_white, value, grey",
    [(16, False, 60000, 233), (16, True, 60000, 22), (12, False, 4000, 249), (12, False, 100, 6)],
)
def test_numbers_of_a_tiff_are_read_as_its_tags_say(tmp_path, bits, zero_is_white, value, grey):
    grey_tiff(tmp_path / "class" / "0.tif", bits, zero_is_white, value)
    images, _, _ = load_images(tmp_path, 16)
    assert (images == grey).all()


def test_numbers_that_only_their_owner_can_read_are_passed_over_with_a_reason(tmp_path, capsys):
    grey_tiff(tmp_path / "a" / "signed.tif", 16, False, 90, kind=2)
    save(Image.new("F", (4, 4), 0.5), tmp_path / "a" / "floats.tif")
    save(solid(), tmp_path / "a" / "good.png")
    assert len(load_images(tmp_path, 16)[0]) == 1
    err = capsys.readouterr().err
    assert "unreadable: 2" in err and "floats.tif: its white level is unknown" in err


def test_a_photograph_of_200_megapixels_is_read(tmp_path):
    image = Image.new("L", (16384, 12288), 90)
    assert_colour(read_one(tmp_path, image, "0.jpg", quality=50), (90, 90, 90))


# Data sets


def test_what_cannot_be_read_is_named_and_what_is_no_picture_counted(tmp_path, capsys):
    save(solid(), tmp_path / "class" / "good.png")
    whole = (tmp_path / "class" / "good.png").read_bytes()
    (tmp_path / "class" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "class" / "notes.txt").write_text("no picture")
    assert len(load_images(tmp_path, 16)[0]) == 1
    err = capsys.readouterr().err
    assert "skipped as unreadable: 1, such as" in err and "cut.png: image file is trunc" in err
    assert "passed over: 1 .txt" in err
    Image.new("1", (23000, 23000)).save(tmp_path / "class" / "bomb.png")
    for n in range(20):
        (tmp_path / "class" / f"{n}.heic").write_bytes(b"\0\0\0 ftypheic")
    assert len(load_images(tmp_path, 16)[0]) == 1
    err = capsys.readouterr().err
    assert ": 22, such as" in err and err.count(".heic: cannot identify") == 5
    assert "pip install pillow-heif" in err


def test_a_bug_behind_the_decoding_keeps_its_traceback(tmp_path, monkeypatch):
    save(solid(), tmp_path / "class" / "0.png")
    monkeypatch.setattr(reading.ImageOps, "fit", lambda image, size: image.colour)
    with pytest.raises(AttributeError, match="colour"):
        load_images(tmp_path, 16)


def test_pictures_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    for n in range(600):
        save(solid("L", n % 250, (4, 4)), tmp_path / f"{n:03}.png")
    spy = mock.Mock(side_effect=reading.read_picture)
    monkeypatch.setattr(reading, "read_picture", spy)
    items = [(path, 0) for path in sorted(tmp_path.iterdir())]
    pictures = read_all(items, Image.open, 4, ["class"], {})
    first, label = next(pictures)
    assert 0 < spy.call_count < 300 and first.shape == (3, 4, 4) and label == 0
    assert [int(image[0, 0, 0]) for image, _ in pictures] == [n % 250 for n in range(1, 600)]


# Packed files


def test_a_packed_file_is_the_same_data_set_bit_for_bit(tmp_path, pictures):
    flags = ["--image-size", 15]  # an odd size: the labels begin at an odd byte
    (tmp_path / "d").symlink_to(pictures)
    process = start("data/pack", "d", "some/p.safetensors", *flags, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    file = tmp_path / "some" / "p.safetensors"
    assert out == f"21 pictures of 3 classes are in {Path('some/p.safetensors')}\n" and err == ""
    assert os.listdir(file.parent) == [file.name]
    images, labels, names = load_dataset(str(file), 15)
    same_images, same_labels, same_names = load_images(pictures, 15)
    assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert names == same_names
    line = refused("data.pack", "d", file, *flags, cwd=tmp_path)
    assert "choose a new name" in line


def test_packing_passes_over_what_cannot_be_read(tmp_path, capsys):
    save(solid("L", 90), tmp_path / "d" / "a" / "0.png")
    (tmp_path / "d" / "a" / "1.png").write_bytes(b"no")
    call("data.pack", "d", "p.safetensors", "--image-size", 16, cwd=tmp_path)
    images, labels, _ = load_dataset(str(tmp_path / "p.safetensors"), 16)
    assert len(images) == len(labels) == 1 and (images == 90).all()
    (tmp_path / "d" / "a" / "0.png").unlink()
    assert "no pictures" in call("data.pack", "d", "q.safetensors", cwd=tmp_path, status=2)[1]
    assert sorted(os.listdir(tmp_path)) == ["d", "p.safetensors"]


def test_a_disk_without_room_for_a_packed_file_is_one_line(tmp_path, pictures, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 21 * 3 * 16 * 16 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refused("data.pack", pictures, "p.safetensors", "--image-size", 16, cwd=tmp_path)
    assert "p.safetensors needs 0.0 GB of free disk" in line and os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_packed_file_is_mapped_and_not_read(tmp_path):
    images = torch.zeros(20000, 3, 64, 64, dtype=torch.uint8)  # 246 MB
    tensors = {"images": images, "labels": torch.zeros(20000, dtype=torch.int64)}
    save_file(tensors, tmp_path / "p.safetensors", {"class_names": '["a"]'})
    before = memory()
    mapped, _, _ = load_dataset(str(tmp_path / "p.safetensors"), 64)
    assert mapped.shape == images.shape and memory() - before < 50e6


def memory():
    """Bytes of this process that are in the memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_file_that_is_no_data_set_of_this_size_is_one_line(tmp_path, trained):
    call("data.pack", "drawn", "p.safetensors", "--image-size", 4, cwd=tmp_path)
    content = (tmp_path / "p.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-9])
    weights = trained / "out" / "model.safetensors"
    for name in ("cut.safetensors", "missing.safetensors", weights):
        line = refused("train", *FEW, "--dataset", name, cwd=tmp_path)
        assert f"{name} is missing, cut short, or not by data/pack.py" in line
    line = refused("train", *FEW, "--dataset", "p.safetensors", cwd=tmp_path)
    assert "--image-size 4" in line


# The `datasets` library


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets", reason="needs pip install datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return library


def png(n):
    file = io.BytesIO()
    solid("RGB", (9 * n, 0, 90)).save(file, "PNG")
    return file.getvalue()


def parquet(datasets, folder, pictures, **columns):
    """A parquet file for training, and a smaller one for testing."""
    folder.mkdir()
    save(solid(), folder / "banner.png")  # of its description
    rows = datasets.Dataset.from_dict({**columns, "img": pictures})
    rows.to_parquet(folder / "train-0.parquet")
    rows.select([0]).to_parquet(folder / "test-0.parquet")
    return rows


COLUMNS = [
    ("label", ["b", "a", "b", "a"], ["a", "b"], [0, 0, 1, 1]),
    ("Class_Name", [12, 3, 3, 3], ["3", "12"], [0, 0, 0, 1]),
    ("caption", ["A fish.", "A fish.", "A star.", "A star."], ["d"], [0, 0, 0, 0]),
]


@pytest.mark.parametrize("column, labels, names, expected", COLUMNS)
def test_parquet_is_labelled_by_a_column_that_is_called_so(
    tmp_path, datasets, column, labels, names, expected
):
    parquet(datasets, tmp_path / "d", [solid()] * 4, **{column: labels})
    _, found, found_names = load_dataset(str(tmp_path / "d"), 16)
    assert found_names == names and found.tolist() == expected


AS_BYTES = [png(n) for n in range(5)]
AS_STRUCTS = [{"bytes": content, "path": "x.png"} for content in AS_BYTES]
AS_IMAGES = [solid("RGB", (9 * n, 0, 90)) for n in range(5)]


@pytest.mark.parametrize("pictures", [[*AS_BYTES[:4], b"no picture"], AS_STRUCTS, AS_IMAGES])
def test_pictures_in_parquet_may_be_plain_bytes(tmp_path, datasets, pictures, capsys):
    parquet(datasets, tmp_path / "d", pictures, species=list("babba"))
    images, _, names = load_dataset(str(tmp_path / "d"), 16)
    assert images[:, 0, 0, 0].tolist()[-3:] == [0, 18, 27] and names == ["a", "b"]
    assert "pictures from img, labels from species" in capsys.readouterr().out


def test_the_ids_of_class_labels_keep_their_order(tmp_path, datasets):
    labels = datasets.ClassLabel(names=["cat", "ant", "never seen", "bee"])
    rows = parquet(datasets, tmp_path / "d", [solid()] * 4, sex=list("fmfm"), fine=[3, 0, 1, 0])
    rows.cast_column("fine", labels).to_parquet(tmp_path / "d" / "train-0.parquet")
    _, labels, names = load_dataset(str(tmp_path / "d"), 16)
    assert names == ["cat", "ant", "bee"] and labels.tolist() == [0, 0, 1, 2]


def test_folders_of_classes_win_over_an_archive_beside_them(tmp_path, capsys):
    for name in ("fish", "star"):
        save(solid(), tmp_path / name / "0.png")
    (tmp_path / "old.tar").write_bytes(b"pictures")
    assert load_images(tmp_path, 16)[2] == ["fish", "star"]
    assert "passed over: 1 .tar" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["d.zip", "d.tar.gz", "d.tar", "d.7z"])
def test_archives_have_to_be_unpacked(tmp_path, name):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=rf"no pictures in .*only ..{Path(name).suffix}.*unpack"):
        load_dataset(str(tmp_path / "d"), 16)


def test_what_the_library_cannot_read_is_one_line(tmp_path, datasets, monkeypatch):
    parquet(datasets, tmp_path / "d", ["x", "y"], b=[1, 2])
    with pytest.raises(UserError, match="no column of pictures, only b, img"):
        load_dataset(str(tmp_path / "d"), 16)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "train.parquet").write_bytes(b"not parquet")
    assert "cannot read e (needs pip install datasets)" in refused(
        "train", *FEW, "--dataset", "e", cwd=tmp_path
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = refused("train", *FEW, "--dataset", "e", cwd=tmp_path)
    assert "cannot read e" in line and "pip install datasets" in line
