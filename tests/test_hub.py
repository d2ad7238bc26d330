"""The Hub's format and its traps, and downloads from a small server on the loopback address."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, call, environment, refused
from hub_server import Hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import train
from model import DiT, UserError


def make(names=("a", "ß ü", "蝶 / ..")):
    torch.manual_seed(3)
    model = DiT(16, 4, 16, 1, 2, list(names), dataset="my pictures")
    torch.nn.init.normal_(model.final_layer.weight)
    return model


def assert_equal(a, b):
    assert a.class_names == b.class_names and a.image_size == b.image_size
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())
    z, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(a(z, t, y), b(z, t, y))


def test_saved_and_loaded_is_the_same_and_prints_nothing(tmp_path, capsys):
    model = make()
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    assert_equal(model, again)
    assert not again.training
    assert capsys.readouterr().out == ""
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["class_names"] == model.class_names and config["dim"] == 16
    again.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == config


def test_missing_weights_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["final_layer.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="final_layer.weight"):
        DiT.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["class_names"].append("one more")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="class_embedding"):
        DiT.from_pretrained(tmp_path)
    assert str(tmp_path) in refused("sample.py", "--checkpoint", tmp_path, cwd=tmp_path)


def test_a_folder_without_config_is_refused_by_name(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json"):
        DiT.from_pretrained(tmp_path)


def test_a_config_of_another_model_is_refused_by_name(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope": True}))
    with pytest.raises(UserError, match="rope"):
        DiT.from_pretrained(tmp_path)
    assert "rope" in refused("sample.py", "--checkpoint", tmp_path, cwd=tmp_path)


def test_what_was_changed_after_loading_is_saved(tmp_path):
    make().save_pretrained(tmp_path)
    model = DiT.from_pretrained(tmp_path)
    model.cfg_scale, model.class_names[0] = 4.5, "A"
    model.save_pretrained(tmp_path)  # in place of itself
    again = DiT.from_pretrained(tmp_path)
    assert again.cfg_scale == 4.5 and again.class_names[0] == "A"


def test_a_model_saved_from_elsewhere_keeps_its_grid(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    model = DiT.from_pretrained("out")
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("first", model_card_kwargs={"license": "cc-by-nc-4.0"})
    assert "After 30 steps" in Path("first", "README.md").read_text()
    assert ModelCard.load("first/README.md").data.license == "cc-by-nc-4.0"
    DiT.from_pretrained("first").save_pretrained("second")
    DiT.from_pretrained("second").save_pretrained("second")  # in place of itself
    grid = (trained / "out" / "samples" / "step-000030.png").read_bytes()
    assert Path("second", "grid.png").read_bytes() == grid
    assert "grid.png" in Path("second", "README.md").read_text()


def test_a_checkpoint_is_never_half_there(tmp_path, monkeypatch):
    # save_pretrained deletes config.json first and writes in place. If writing fails in the middle,
    # here because the state cannot be pickled, the earlier checkpoint must still stand.
    monkeypatch.setattr(train, "OUT_DIR", str(tmp_path))
    first = make()
    optimizer = torch.optim.AdamW(first.parameters())
    train.save_checkpoint(first, first, optimizer, {"step": 1})
    with pytest.raises((AttributeError, TypeError, RuntimeError, ValueError)):
        other = make(names=("x",))
        train.save_checkpoint(other, other, optimizer, {"step": 2, "bad": lambda: None})
    assert_equal(first, DiT.from_pretrained(tmp_path))
    assert torch.load(tmp_path / "train_state.pt", weights_only=True)["step"] == 1
    train.save_checkpoint(other, other, optimizer, {"step": 3})
    assert DiT.from_pretrained(tmp_path).class_names == ["x"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "train_state.pt"}


def test_the_card_says_dataset_size_and_how_to_sample(tmp_path):
    make().save_pretrained(tmp_path)  # push_to_hub uploads just these files
    card = (tmp_path / "README.md").read_text()
    assert "my pictures" in card and "3\nclasses" in card
    millions = sum(p.numel() for p in make().parameters()) / 1e6
    assert f"{millions:.2f} M parameters" in card
    assert "sample.py --checkpoint" in card
    assert card.startswith("---\n") and "license: mit" in card


def test_a_dataset_comes_from_the_hub_into_its_cache(pictures, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(pictures, repository)
    (repository / "README.md").write_text("# Pictures")
    (repository / ".gitattributes").write_text("*.png filter=lfs")
    (repository / ".cache" / "huggingface").mkdir(parents=True)
    (repository / ".cache" / "huggingface" / "left.png").write_bytes(b"not a picture")
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    with Hub({"datasets/someone/pictures": repository}) as hub:
        settings = [*SMALL, "--dataset", "someone/pictures", "--steps", 4, "--batch-size", 4]
        out, _ = call("train.py", *settings, cwd=work, HF_ENDPOINT=hub.url, HF_HOME=str(home))
        assert any(path.startswith("datasets/someone/pictures/resolve/") for path in hub.asked)
    assert "3 classes, 21 pictures" in out
    assert [path.name for path in work.iterdir()] == ["out"]
    model = DiT.from_pretrained(work / "out")
    assert model.class_names == sorted(path.name for path in pictures.iterdir())
    assert model.dataset == "someone/pictures"


def test_a_dataset_that_the_hub_does_not_have(tmp_path):
    with Hub({}) as hub:
        flags = ["--dataset", "someone/nothing", "--device", "cpu", *SMALL]
        line = refused("train.py", *flags, cwd=tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    assert "someone/nothing" in line and "--preset laptop" in line and "--dataset FOLDER" in line


def test_a_model_that_the_hub_does_not_have(tmp_path):
    with Hub({}) as hub:
        extra = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        line = refused("sample.py", "--checkpoint", "someone/nothing", cwd=tmp_path, **extra)
    assert "someone/nothing" in line


def test_a_repository_on_the_hub_without_a_model(pictures, tmp_path):
    with Hub({"someone/pictures": pictures}) as hub:
        extra = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        flags = ["--checkpoint", "someone/pictures"]
        _, err = call("sample.py", *flags, cwd=tmp_path, status=2, **extra)
    line = err.splitlines()[-1]  # after a progress bar
    assert "no model in someone/pictures" in line and "config.json" in line


PUSH = "import sys; sys.path.insert(0, sys.argv[1]); from model import DiT; "
PUSH += "DiT.from_pretrained('out').push_to_hub('you/butterflies', token='hf_secret')"


def test_what_is_pushed_samples_the_same_and_has_a_card(trained, tmp_path):
    home = {"HF_HOME": str(tmp_path / "home")}
    few = ["--steps", 2, "--class-id", 1, "--output"]
    with Hub({"you/butterflies": tmp_path / "you" / "butterflies"}, uploads=tmp_path) as hub:
        command = [sys.executable, "-c", PUSH, str(ROOT)]
        extra = environment(HF_ENDPOINT=hub.url, **home)
        subprocess.run(command, cwd=trained, env=extra, check=True, capture_output=True)
        pushed = {path.name for path in (tmp_path / "you" / "butterflies").iterdir()}
        assert pushed >= {"config.json", "model.safetensors", "README.md", "grid.png"}
        assert "train_state.pt" not in pushed
        flags = ["--checkpoint", "you/butterflies", *few, tmp_path / "hub.png"]
        call("sample.py", *flags, cwd=tmp_path, HF_ENDPOINT=hub.url, **home)
    call("sample.py", *few, tmp_path / "local.png", cwd=trained)
    assert (tmp_path / "hub.png").read_bytes() == (tmp_path / "local.png").read_bytes()

    grid = (tmp_path / "you" / "butterflies" / "grid.png").read_bytes()
    assert grid == (trained / "out" / "samples" / "step-000030.png").read_bytes()
    card = ModelCard.load(tmp_path / "you" / "butterflies" / "README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.library_name == "nanodit" and card.data.license == "mit"
    assert card.data.widget[0]["output"]["url"] == "grid.png"
    with open(trained / "out" / "log.csv") as file:
        loss = float(list(csv.DictReader(file))[-1]["val_loss"])
    assert f"After 30 steps the held-out loss was {loss:.4f}." in card.content
    assert "trained with nanoDiT on pictures: 3\nclasses" in card.content


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_weights_are_as_readable_as_other_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        make().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_a_card_shows_the_newest_grid_and_the_last_whole_row(trained, tmp_path):
    run = tmp_path / "out"
    shutil.copytree(trained / "out", run)
    (run / "samples" / "step-999999.png").write_bytes(b"older")
    (run / "samples" / "step-1000000.png").write_bytes(b"newest")
    with open(run / "log.csv", "a") as log:
        log.write("40,0.1")  # cut short
    model = DiT.from_pretrained(run)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "grid.png").read_bytes() == b"newest"
    assert "After 30 steps" in (tmp_path / "saved" / "README.md").read_text()


def test_a_card_without_a_run_names_no_picture(tmp_path):
    make().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "grid.png" not in card.content and "held-out" not in card.content
    assert not (tmp_path / "grid.png").exists()
