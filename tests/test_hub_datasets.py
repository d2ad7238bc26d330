"""Data sets that are no folders of pictures: parquet and the like, by the `datasets` library, from
files that the test writes and from the loopback Hub."""

import io
import json
import tarfile
import zipfile

import pytest
import torch
from conftest import SMALL, call, refused
from hub_server import Hub
from PIL import Image

from data.images import load_dataset
from model import DiT, UserError

datasets = pytest.importorskip("datasets", reason="needs pip install datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def solid(n):
    return Image.new("RGB", (20, 20), (9 * n, 0, 90))


def write_parquet(path, n, columns=None, features=None):
    """A parquet file with n pictures, of which the i-th has 9 i as its red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"img": [solid(i) for i in range(n)], **(columns or {})}
    kinds = {"img": datasets.Image(), **(features or {})}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(path)


CLASSES = datasets.ClassLabel(names=["cat", "ant", "never seen", "bee"])


def test_parquet_with_class_labels_in_a_folder(tmp_path, capsys):
    labels = [0, 1, 3, 0, -1, 1]
    write_parquet(tmp_path / "d" / "train-0.parquet", 6, {"label": labels}, {"label": CLASSES})
    write_parquet(tmp_path / "d" / "test-0.parquet", 2, {"label": [0, 1]}, {"label": CLASSES})
    images, labels, names = load_dataset(str(tmp_path / "d"), 16)
    assert names == ["cat", "ant", "bee"]  # in the order of the ids that the data set gives them
    assert labels.tolist() == [0, 0, 1, 1, 2] and labels.dtype == torch.int64
    assert images[:, 0, 0, 0].tolist() == [0, 27, 9, 45, 18] and images.dtype == torch.uint8
    out, err = capsys.readouterr()
    assert "split train (pictures: img; labels: label)" in out
    assert "skipped 1 rows without a readable picture or a label" in err


def test_labels_may_be_strings_and_captions_are_none(tmp_path, capsys):
    captions, species = [f"A butterfly, number {n}." for n in range(6)], list("babbab")
    string = datasets.Value("string")
    columns = {"text": captions, "species": species}
    write_parquet(tmp_path / "a" / "train.parquet", 6, columns, {"text": string, "species": string})
    _, labels, names = load_dataset(str(tmp_path / "a"), 16)
    assert names == ["a", "b"] and labels.tolist() == [0, 0, 1, 1, 1, 1]
    write_parquet(tmp_path / "b" / "train.parquet", 6, {"text": captions}, {"text": string})
    _, labels, names = load_dataset(str(tmp_path / "b"), 16)
    assert names == ["b"] and labels.tolist() == [0] * 6
    assert "no labels: one class" in capsys.readouterr().out


def test_labels_may_be_whole_numbers(tmp_path, capsys):
    columns = {"sex": list("fmfmfm"), "Label": [3, 12, 3, 12, 3, 3]}
    kinds = {"sex": datasets.Value("string"), "Label": datasets.Value("int64")}
    write_parquet(tmp_path / "a" / "train.parquet", 6, columns, kinds)
    _, labels, names = load_dataset(str(tmp_path / "a"), 16)
    assert set(names) == {"3", "12"} and sorted(labels.bincount().tolist()) == [2, 4]
    assert "labels: Label" in capsys.readouterr().out


def test_a_column_that_is_called_as_labels_are_comes_first(tmp_path, capsys):
    columns = {"license": ["MIT"] * 6, "target": list("xyxyxy"), "class_name": list("babbab")}
    kinds = {name: datasets.Value("string") for name in columns}
    write_parquet(tmp_path / "a" / "train.parquet", 6, columns, kinds)
    assert load_dataset(str(tmp_path / "a"), 16)[2] == ["a", "b"]
    assert "labels: class_name" in capsys.readouterr().out


def test_a_data_set_without_pictures_is_one_line(tmp_path):
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]}).to_parquet(tmp_path / "d/t.parquet")
    with pytest.raises(UserError, match="no column of pictures, only a, b"):
        load_dataset(str(tmp_path / "d"), 16)
    line = refused("train.py", *SMALL, "--dataset", tmp_path / "d", cwd=tmp_path)
    assert "no column of pictures" in line


def png(n):
    file = io.BytesIO()
    solid(n).save(file, "PNG")
    return file.getvalue()


def test_a_zip_of_pictures(tmp_path):
    (tmp_path / "d").mkdir()
    with zipfile.ZipFile(tmp_path / "d" / "train.zip", "w") as archive:
        for n in range(6):
            archive.writestr(f"{n}.png", png(n))
    images, labels, _ = load_dataset(str(tmp_path / "d"), 16)
    assert labels.tolist() == [0] * 6
    assert sorted(images[:, 0, 0, 0].tolist()) == [0, 9, 18, 27, 36, 45]
    solid(1).save(tmp_path / "d" / "banner.png")
    assert len(load_dataset(str(tmp_path / "d"), 16)[0]) == 6
    archive = (tmp_path / "d" / "train.zip").read_bytes()
    (tmp_path / "d" / "train.zip").write_bytes(archive[: len(archive) // 2])  # half downloaded
    with pytest.raises(UserError, match="cannot read"):
        load_dataset(str(tmp_path / "d"), 16)


def test_webdataset(tmp_path):
    (tmp_path / "d").mkdir()
    for shard in range(2):  # which are no classes
        with tarfile.open(tmp_path / "d" / f"train-000{shard}.tar", "w") as archive:
            for n in range(2 * shard, 2 * shard + 2):
                members = (("png", png(n)), ("json", json.dumps({"label": n}).encode()))
                for suffix, content in members:
                    member = tarfile.TarInfo(f"{n:04}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    images, labels, names = load_dataset(str(tmp_path / "d"), 16)
    assert images[:, 0, 0, 0].tolist() == [0, 9, 18, 27] and labels.tolist() == [0] * 4
    assert names == ["d"]  # the folder's name, not where it lies


@pytest.fixture
def repository(tmp_path):
    """Parquet on the Hub, as CIFAR-10 is: two splits, a column `img` and class labels."""
    folder = tmp_path / "repository"
    for split, n in (("train", 12), ("test", 4)):
        labels = {"label": [i % 3 for i in range(n)]}
        kinds = {"label": datasets.ClassLabel(names=["plane", "car", "bird"])}
        write_parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet", n, labels, kinds)
    (folder / "README.md").write_text("# Pictures")
    return folder


def test_the_train_split_of_parquet_on_the_hub_is_all_that_comes(repository, tmp_path):
    few = [*SMALL, "--steps", 2, "--batch-size", 4]
    with Hub({"datasets/you/cifar": repository}) as hub:
        extra = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        out, _ = call("train.py", *few, "--dataset", "you/cifar", cwd=tmp_path, **extra)
    assert "3 classes, 12 pictures" in out and "0 plane, 1 car, 2 bird" in out
    assert "pictures from you/cifar, split train (pictures: img; labels: label)" in out
    assert any("train-00000" in path for path in hub.asked)
    assert not any("test-00000" in path for path in hub.asked)
    assert DiT.from_pretrained(tmp_path / "out").class_names == ["plane", "car", "bird"]


def test_without_the_library_one_line_says_how_to_get_it(repository, tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError")
    with Hub({"datasets/you/cifar": repository}) as hub:
        extra = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
        flags = [*SMALL, "--dataset", "you/cifar"]
        line = refused("train.py", *flags, cwd=tmp_path, **extra)
    assert "you/cifar" in line and "pip install datasets" in line
    assert not any("parquet" in path for path in hub.asked)


def test_a_data_set_that_the_library_cannot_read_is_one_line(tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "train.parquet").write_bytes(b"not parquet")
    with Hub({"datasets/you/broken": tmp_path / "repository"}) as hub:
        extra = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        flags = [*SMALL, "--dataset", "you/broken"]
        _, err = call("train.py", *flags, cwd=tmp_path, status=2, **extra)
    assert "the datasets library cannot read you/broken" in err.splitlines()[-1]


def test_of_folders_on_the_hub_train_alone_is_downloaded(tmp_path):
    for split in ("train", "test"):
        for n in range(8):
            path = tmp_path / "repository" / split / "ab"[n % 2] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            solid(n).save(path)
    few = [*SMALL, "--steps", 2, "--batch-size", 4, "--dataset", "you/pictures"]
    with Hub({"datasets/you/pictures": tmp_path / "repository"}) as hub:
        extra = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        out, _ = call("train.py", *few, cwd=tmp_path, **extra)
    assert "2 classes, 8 pictures" in out
    assert any("train/a" in path for path in hub.asked)
    assert not any("test/a" in path for path in hub.asked)

    # Without the Hub, what was downloaded is enough: test/ is not missed.
    out, _ = call("train.py", *few, "--overwrite", cwd=tmp_path, **extra)
    assert "2 classes, 8 pictures" in out and "the Hub cannot be reached" in out


def test_a_flat_repository_is_a_class_of_its_own_name(tmp_path):
    (tmp_path / "repository").mkdir()
    for n in range(5):
        solid(n).save(tmp_path / "repository" / f"{n}.png")
    few = [*SMALL, "--steps", 2, "--batch-size", 4, "--dataset", "you/pictures"]
    with Hub({"datasets/you/pictures": tmp_path / "repository"}) as hub:
        extra = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        call("train.py", *few, cwd=tmp_path, **extra)
    assert DiT.from_pretrained(tmp_path / "out").class_names == ["pictures"]
