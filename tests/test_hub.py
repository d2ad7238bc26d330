"""The Hub's format, its card, and downloads from a small server on the loopback address."""

import contextlib
import json
import pickle
import subprocess
import sys

from support import hub

import huggingface_hub
import pytest
import torch
from helpers import FEW, ROOT, call, environment, refused, rows, save, solid
from hub_server import Hub
from huggingface_hub import ModelCard, constants

from model import DiT

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
    ({"class_names": None}, "", "class_names must be a list"),
    ({"image_size": 15}, "", "image_size 15 is not a multiple of patch_size 4"),
    ({"class_names": ["a", "b"]}, "model.safetensors", "class_embedding"),
    ({"depth": 2}, "model.safetensors", "blocks.1"),
]


@pytest.mark.parametrize("change, file, word", CONFIGS)
def test_a_config_of_another_model_is_one_line(model, tmp_path, change, file, word):
    config = {**config_of(tmp_path / "model"), **change}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    line = refused("sample", "--checkpoint", "model", cwd=tmp_path)
    assert file in line and word in line and len(line) < 600


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[1, 2]", b"\xff\xfe{", b"[" * 100_000])
def test_a_file_that_is_missing_or_damaged_is_named(model, tmp_path, name, content):
    (tmp_path / "model" / name).unlink()
    if content is not None:
        (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        DiT.from_pretrained(tmp_path / "model")


def test_a_network_that_was_read_is_as_any_other(model, tmp_path):
    read = DiT.from_pretrained(tmp_path / "model", strict=False)
    again = pickle.loads(pickle.dumps(read))
    again.load_state_dict({**model.state_dict(), "more": torch.zeros(1)}, strict=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_arguments_override_the_config_and_others_are_refused(model, tmp_path):
    assert DiT.from_pretrained(tmp_path / "model", cfg_scale=7.0).cfg_scale == 7.0
    for options in ({"nonsense": 1}, {"cfg_scales": 2.0}):
        for checkpoint in (tmp_path / "model", "you/model"):
            with pytest.raises(TypeError, match=next(iter(options))):
                DiT.from_pretrained(checkpoint, **options)


# The card


def test_a_run_writes_the_page_that_the_hub_shows_of_it(trained):
    out = trained / "out"
    card = ModelCard.load(out / "README.md")
    loss = float(rows(out)[-1]["val_loss"])
    weights = DiT.from_pretrained(out).parameters()
    millions = sum(weight.numel() for weight in weights) / 1e6
    text = " ".join(card.text.split())
    assert "trained with nanoDiT on pictures: 3 classes, 16x16 pixels" in text
    assert f"{millions:.2f} M parameters. 30 steps of 8 pictures" in text
    assert f"(held-out loss: {loss:.4f})" in text
    for word in ("sample.py --checkpoint", "--init-from", "DiT.from_pretrained"):
        assert word in text
    assert "![samples](samples/step-000030.png)" in text
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.library_name == "nanodit" and card.data.license == "mit"


def test_a_page_of_ones_own_stays(model, tmp_path):
    hub.write_card(tmp_path, model, "1 step", [])
    card = tmp_path / "README.md"
    assert hub.REWRITTEN in card.read_text("utf-8")
    hub.write_card(tmp_path, model, "2 steps", [])
    assert "2 steps" in card.read_text("utf-8")
    mine = card.read_text("utf-8").replace(hub.REWRITTEN, "").replace("2 steps", "two steps é")
    card.write_text(mine, "utf-8")
    hub.write_card(tmp_path, model, "3 steps", [])
    assert card.read_text("utf-8") == mine


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


def run_online(command, url):
    """Run a command in a process of its own, which takes the server at this address for the Hub."""
    variables = environment(HF_ENDPOINT=url, HF_TOKEN="hf_secret", HF_HUB_DISABLE_XET="1")
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_what_is_uploaded_is_sampled_and_started_from(
    serve, trained, pictures, tmp_path, monkeypatch
):
    uploaded = tmp_path / "repository"
    uploaded.mkdir()
    server = serve({"you/butterflies": uploaded})
    run_online(["hf", "upload", "you/butterflies", trained / "out"], server.url)
    names = {path.relative_to(uploaded).as_posix() for path in uploaded.rglob("*.*")}
    assert names >= {"config.json", "model.safetensors", "README.md", "log.csv"}
    from_hub = [*SAMPLE, "--checkpoint", "you/butterflies", "--output"]
    call("sample", *from_hub, "hub.png", cwd=tmp_path)
    begun = [*FEW, "--steps", 1, "--dataset", pictures, "--init-from", "you/butterflies"]
    call("train", *begun, cwd=tmp_path)
    disconnect(monkeypatch, tmp_path)
    call("sample", *from_hub, "again.png", cwd=tmp_path)
    call("sample", *SAMPLE, "--output", tmp_path / "local.png", cwd=trained)
    drawn = {(tmp_path / f"{name}.png").read_bytes() for name in ("hub", "again", "local")}
    assert len(drawn) == 1


def test_a_network_is_pushed_by_its_own_method(serve, model, tmp_path):
    (tmp_path / "repository").mkdir()
    server = serve({"you/small": tmp_path / "repository"})
    code = f"from model import DiT; model = DiT.from_pretrained({str(tmp_path / 'model')!r}); "
    code += "model.cfg_scale = 7.5; model.push_to_hub('you/small')"
    run_online([sys.executable, "-c", code], server.url)
    pushed = DiT.from_pretrained("you/small")
    assert pushed.class_names == model.class_names and pushed.cfg_scale == 7.5


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


def test_a_download_cut_short_is_not_trained_on(serve, tmp_path, monkeypatch):
    for n in range(12):
        save(solid(), tmp_path / "repository" / "abc"[n % 3] / f"{n}.png")
    hub = serve({"datasets/you/pictures": tmp_path / "repository"})
    hub.broken = "/c/"
    train = ["train", *FEW, "--dataset", "you/pictures", "--steps", 1]
    for _ in range(2):
        _, err = call(*train, cwd=tmp_path, status=2)
        assert "cannot download you/pictures from the Hub" in err.splitlines()[-1]
        disconnect(monkeypatch, tmp_path)  # a part is in the cache, and there is no network
    assert list(tmp_path.rglob("cache/**/a/*.png")) and not (tmp_path / "out/log.csv").exists()


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
    save(solid(), tmp_path / "repository" / "banner.png")  # of its description
    hub = serve({"datasets/you/cifar": tmp_path / "repository"})
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return hub


def test_the_train_split_of_parquet_on_the_hub_is_trained_on(cifar, tmp_path):
    assert "12 pictures" in train_on("you/cifar", tmp_path)
    assert DiT.from_pretrained(tmp_path / "out").class_names == ["plane", "car", "bird"]
