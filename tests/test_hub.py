"""The Hub's format, its card, and downloads from a small server on the loopback address."""

import contextlib
import json
import shutil

from support.settings import UserError

import huggingface_hub
import pytest
import torch
from helpers import FEW, call, refused, rows, save, solid
from hub_server import Hub
from huggingface_hub import HfApi, ModelCard, RepoUrl, constants

from model import DiT

HUB_FILES = {"config.json", "model.safetensors", "README.md"}
SAMPLE = ["--class-id", 1, "--steps", 2, "--device", "cpu"]


@pytest.fixture
def model(tmp_path):
    """A network, which is also saved in the folder "model"."""
    torch.manual_seed(3)
    model = DiT(16, 4, 16, 1, 2, ["a", "ß ü", "蝶 / .."], dataset="my pictures")
    torch.nn.init.normal_(model.final_layer.weight)
    model.save_pretrained(tmp_path / "model")
    return model


def config_of(folder):
    return json.loads((folder / "config.json").read_text("utf-8"))


# Saved and loaded


def test_saved_and_loaded_is_the_same_and_prints_nothing(model, tmp_path, capfd):
    again = DiT.from_pretrained(str(tmp_path / "model"))
    assert again.class_names == model.class_names and again.image_size == model.image_size
    z, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(model(z, t, y), again(z, t, y))
    assert not again.training and capfd.readouterr() == ("", "")
    before = config_of(tmp_path / "model")
    again.cfg_scale, again.class_names[0] = 4.5, "A"
    again.save_pretrained(tmp_path / "model")  # in place of itself
    changed = {"cfg_scale": 4.5, "class_names": ["A", *model.class_names[1:]]}
    assert config_of(tmp_path / "model") == {**before, **changed}


CONFIGS = [
    ({"rope": True}, "config.json", "rope"),
    ({"class_names": None}, "config.json", "class_names"),
    ({"image_size": 15}, "config.json", "IMAGE_SIZE 15"),
    ({"class_names": ["a", "b"]}, "model.safetensors", "class_embedding"),
    ({"depth": 2}, "model.safetensors", "blocks.1"),
]


@pytest.mark.parametrize("change, file, word", CONFIGS)
def test_a_config_of_another_model_is_one_line(model, tmp_path, change, file, word):
    config = {**config_of(tmp_path / "model"), **change}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    line = refused("sample", "--checkpoint", "model", cwd=tmp_path)
    assert f"model/{file}" in line and word in line and len(line) < 600


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[1, 2]", b"\xff\xfe{", b"[" * 100_000])
def test_a_file_that_is_missing_or_damaged_is_named(model, tmp_path, name, content):
    (tmp_path / "model" / name).unlink()
    if content is not None:
        (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        DiT.from_pretrained(tmp_path / "model")


# The card


def test_the_card_says_dataset_classes_size_and_how_to_sample(model, tmp_path):
    card = ModelCard.load(tmp_path / "model" / "README.md")
    text, millions = " ".join(card.text.split()), sum(w.numel() for w in model.parameters()) / 1e6
    assert "trained with nanoDiT on my pictures: 3 classes, 16x16 pixels" in text
    assert f"{millions:.2f} M parameters" in text and "sample.py --checkpoint" in text
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.library_name == "nanodit" and card.data.license == "mit"
    assert "grid.png" not in text and "held-out" not in text  # as there was no run
    assert {path.name for path in (tmp_path / "model").iterdir()} == HUB_FILES


def test_the_card_of_a_run_has_its_figures_and_its_newest_grid(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    (tmp_path / "out" / "samples" / "step-999999.png").write_bytes(b"older")
    (tmp_path / "out" / "samples" / "step-1000000.png").write_bytes(b"newest")
    DiT.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "copy")
    loss = float(rows(trained / "out")[-1]["val_loss"])
    card = (tmp_path / "copy" / "README.md").read_text("utf-8")
    assert f"After 30 steps the held-out loss was {loss:.4f}." in card
    DiT.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "copy")  # in place of itself
    assert (tmp_path / "copy" / "grid.png").read_bytes() == b"newest"
    assert "![samples](grid.png)" in (tmp_path / "copy" / "README.md").read_text("utf-8")


# Downloads


def pretend(monkeypatch, url, cache):
    """Let this process take a server for the Hub, and a folder for its cache."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A function that starts a Hub, which this process takes for the real one."""
    with contextlib.ExitStack() as until_the_end:

        def serve(repositories):
            hub = until_the_end.enter_context(Hub(repositories))
            pretend(monkeypatch, hub.url, tmp_path / "cache")
            return hub

        yield serve


def disconnect(monkeypatch, tmp_path):
    """From now on nothing listens where the Hub was; what was downloaded is still there."""
    pretend(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")


def train_on(name, folder):
    run = [*FEW, "--dataset", name, "--steps", 1, "--overwrite"]
    out, _ = call("train", *run, cwd=folder)
    return out


def test_what_is_pushed_samples_the_same(serve, trained, tmp_path, monkeypatch):
    pushed = tmp_path / "repository"
    serve({"you/butterflies": pushed})
    with monkeypatch.context() as patch:  # instead of the network
        patch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: RepoUrl(repo_id))
        copy = lambda api, folder_path, **options: shutil.copytree(folder_path, pushed)  # noqa: E731
        patch.setattr(HfApi, "upload_folder", copy)
        DiT.from_pretrained(trained / "out").push_to_hub("you/butterflies")
    assert {path.name for path in pushed.iterdir()} >= {*HUB_FILES, "grid.png"}
    assert not (pushed / "train_state.pt").exists()
    from_hub = [*SAMPLE, "--checkpoint", "you/butterflies", "--output"]
    call("sample", *from_hub, "hub.png", cwd=tmp_path)
    disconnect(monkeypatch, tmp_path)
    call("sample", *from_hub, "again.png", cwd=tmp_path)
    call("sample", *SAMPLE, "--output", tmp_path / "local.png", cwd=trained)
    pictures = {(tmp_path / f"{name}.png").read_bytes() for name in ("hub", "again", "local")}
    assert len(pictures) == 1


def test_a_dataset_comes_from_the_hub_into_its_cache(serve, tmp_path, monkeypatch):
    repository, work = tmp_path / "repository", tmp_path / "work"
    for split, count in (("train", 21), ("test", 3)):
        for n in range(count):
            save(solid(colour=(9 * n, 0, 90)), repository / split / "abc"[n % 3] / f"{n}.png")
    (repository / "README.md").write_text("# Pictures")
    work.mkdir()
    hub = serve({"datasets/someone/pictures": repository})
    assert "21 pictures" in train_on("someone/pictures", work)
    assert not any("resolve" in path and "test/a" in path for path in hub.asked)
    assert [path.name for path in work.iterdir()] == ["out"]
    trained = DiT.from_pretrained(work / "out")
    assert trained.dataset == "someone/pictures" and trained.class_names == ["a", "b", "c"]
    disconnect(monkeypatch, tmp_path)  # what was downloaded is enough: test/ is not missed
    assert "21 pictures" in train_on("someone/pictures", work)


def test_a_flat_repository_is_a_class_of_its_own_name(serve, tmp_path):
    for n in range(12):
        save(solid(), tmp_path / "repository" / f"{n}.png")
    serve({"datasets/you/pictures": tmp_path / "repository"})
    assert "12 pictures" in train_on("you/pictures", tmp_path)
    assert DiT.from_pretrained(tmp_path / "out").class_names == ["pictures"]


@pytest.mark.parametrize("status", [401, 403, 404, None])
def test_what_the_hub_does_not_give_is_one_line(serve, monkeypatch, tmp_path, status):
    serve({"you/private": status, "datasets/you/private": status})
    if status is None:  # no network
        disconnect(monkeypatch, tmp_path)
    line = refused("sample", "--checkpoint", "you/private", cwd=tmp_path)
    assert "cannot download you/private from the Hub" in line and str(status or "") in line
    line = refused("train", *FEW, "--dataset", "you/private", cwd=tmp_path)
    assert "cannot download you/private from the Hub" in line and "--preset laptop" in line


def test_a_proxy_that_needs_another_package_is_one_line(monkeypatch, tmp_path):
    huggingface_hub.close_session()
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    pretend(monkeypatch, "http://hub.invalid", tmp_path)
    line = refused("train", *FEW, "--dataset", "you/pictures", cwd=tmp_path)
    assert "cannot download you/pictures from the Hub" in line and "socks" in line.lower()
    huggingface_hub.close_session()


def test_a_repository_on_the_hub_without_a_model_is_one_line(serve, pictures, tmp_path):
    serve({"someone/pictures": pictures})
    _, err = call("sample", "--checkpoint", "someone/pictures", cwd=tmp_path, status=2)
    line = err.splitlines()[-1]  # perhaps after a progress bar
    assert "someone/pictures" in line and "config.json" in line


# Parquet, by the `datasets` library


@pytest.fixture
def cifar(serve, tmp_path, monkeypatch):
    """The Hub, with a data set you/cifar of parquet files."""
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    (tmp_path / "repository").mkdir()
    names = ["plane", "car", "bird"]
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    for split, count in (("train", 12), ("test", 3)):
        columns = {"img": [solid()] * count, "label": [n % 3 for n in range(count)]}
        table = datasets.Dataset.from_dict(columns, datasets.Features(features))
        table.to_parquet(tmp_path / "repository" / f"{split}-00000-of-00001.parquet")
    hub = serve({"datasets/you/cifar": tmp_path / "repository"})
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return hub


def test_the_train_split_of_parquet_on_the_hub_is_all_that_comes(cifar, tmp_path):
    assert "12 pictures" in train_on("you/cifar", tmp_path)
    assert DiT.from_pretrained(tmp_path / "out").class_names == ["plane", "car", "bird"]
    files = [path for path in cifar.asked if "resolve" in path and "parquet" in path]
    assert files and all("train-00000" in path for path in files)
