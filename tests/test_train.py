"""Training as a user sees it: what a run prints, writes, refuses, and begins with."""

import errno
import shutil
import types
from pathlib import Path
from unittest import mock

from support import checkpoint

import pytest
import torch
from helpers import FEW, SMALL, call, files, opened, refused, rows, save, solid, state
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train
from model import DiT
from train import rectified_flow_loss

COLUMNS = ["step", "train_loss", "val_loss", "seen_loss", "learning_rate", "images_per_second"]
COLUMNS += ["seconds", "val_0.1", "val_0.3", "val_0.5", "val_0.7", "val_0.9"]
COLUMNS += ["seen_0.1", "seen_0.3", "seen_0.5", "seen_0.7", "seen_0.9"]
NAMES = ["blue-plain-pointed", "red-eyes-pointed", "yellow-spots-tailed"]


# A run


def test_a_run_leaves_its_files(trained):
    out = trained / "out"
    names = {path.name for path in out.iterdir()} - {".lock0"}
    kept = {"config.json", "model.safetensors", "train_state.pt", "log.csv", "samples"}
    assert names == kept | {"README.md"}  # no .gitignore, which `hf upload` obeys
    log = rows(out)
    assert list(log[0]) == COLUMNS and [row["step"] for row in log] == ["10", "20", "30"]
    assert all(0 <= float(value) < 1e6 for row in log for value in row.values())
    assert all(float(row["train_loss"]) > 0 and float(row["val_loss"]) > 0 for row in log)
    assert float(log[-1]["val_loss"]) < float(log[0]["val_loss"])
    for row in log:
        for kind in ("val", "seen"):
            losses = [float(row[f"{kind}_{t}"]) for t in train.EVAL_T]
            assert float(row[f"{kind}_loss"]) == pytest.approx(sum(losses) / 5, rel=1e-4)
            assert len(set(losses)) == 5
    assert all(type(value) in (int, float) for row in state(out)["log"] for value in row.values())
    model = DiT.from_pretrained(out)
    assert model.class_names == NAMES
    assert model.dataset == "pictures"  # the folder's name, not where it lies
    ema = state(out)["ema"]
    assert all(torch.equal(tensor, ema[name]) for name, tensor in model.state_dict().items())
    assert not all(torch.equal(ema[name], weight) for name, weight in state(out)["model"].items())


def test_grids_show_the_same_classes_from_the_same_noise(trained, pictures, tmp_path):
    samples = trained / "out" / "samples"
    names = sorted(path.name for path in samples.iterdir())
    assert names == ["step-000015.png", "step-000030.png"]
    assert opened(samples / names[0]).size == (8 * 18 + 2, 3 * 18 + 2)  # eight of each class
    still = [*FEW, "--dataset", pictures, "--learning-rate", 0, "--steps", 4, "--sample-every", 2]
    call("train", *still, cwd=tmp_path)
    first, second = (tmp_path / "out" / "samples").iterdir()
    assert first.read_bytes() == second.read_bytes()


def test_the_start_says_what_will_run(pictures, tmp_path):
    out, err = call("train", *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    assert "3 classes, such as blue-plain-pointed, red-eyes-pointed, yellow-spots-tailed" in out
    assert "21 pictures, 2 of them held out" in out
    parameters = sum(
        weight.numel() for weight in DiT.from_pretrained(tmp_path / "out").parameters()
    )
    assert f"{parameters / 1e6:.2f} M parameters, on cpu in fp32" in out
    assert "2/2" in err  # the bar counts steps


def test_of_many_classes_some_names_are_said_and_few_pictures_are_all_trained_on(tmp_path):
    for name in "abcdefghij":
        save(solid(), tmp_path / "many" / name / "1.png")
    out, _ = call("train", *FEW, "--dataset", "many", "--steps", 2, cwd=tmp_path)
    assert "10 classes, such as a, b, c, d, e, f\n" in out
    assert "10 pictures, 0 of them held out" in out and "held out nan, seen" in out
    (row,) = rows(tmp_path / "out")
    assert row["val_loss"] == row["val_0.5"] == "nan" and float(row["seen_loss"]) > 0
    assert "held-out" not in (tmp_path / "out" / "README.md").read_text()
    grid = tmp_path / "out" / "samples" / "step-000002.png"
    assert opened(grid).size == (6 * 18 + 2, 2 * 18 + 2)  # one of each class


@pytest.mark.parametrize("n, extra", [(4, []), (1, []), (3, ["--flip-share", 0])])
def test_every_size_runs(tmp_path, n, extra):
    for i in range(n):
        save(solid(colour=(50 * i, 0, 90), size=(30, 20)), tmp_path / "few" / f"{i}.jpg")
    settings = [*SMALL, "--dataset", "few", "--batch-size", 8, "--steps", 6, *extra]
    call("train", *settings, cwd=tmp_path)
    (row,) = rows(tmp_path / "out")
    assert row["step"] == "6" and float(row["seen_loss"]) > 0
    assert (row["val_loss"] == "nan") == (n == 1)
    assert DiT.from_pretrained(tmp_path / "out").class_names == ["few"]


def test_parts_of_a_batch_add_up_to_its_gradient(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--steps", 20, "--batch-size", 7]
    for parts in (1, 3, 5, 100):  # three parts of 3, 3 and 1 pictures; five are four
        run = ["--accumulate", parts, "--out-dir", f"out{parts}"]
        call("train", *settings, *run, cwd=tmp_path)
    whole = state(tmp_path / "out1")["model"]
    for parts in (3, 5, 100):
        other = state(tmp_path / f"out{parts}")["model"]
        for name, tensor in whole.items():
            torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that an operation has made, views aside."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.numel())
        return out


def test_the_pictures_are_never_copied(tmp_path, monkeypatch):
    images = torch.randint(256, (1000, 3, 16, 16), dtype=torch.uint8)
    data = images, torch.arange(1000) % 3, NAMES
    monkeypatch.setattr(train, "load_dataset", lambda name, image_size: data)
    run = [*FEW, "--steps", 3, "--eval-every", 1, "--out-dir", tmp_path / "out"]
    with Sizes() as sizes:
        train.main([str(flag) for flag in run])
    assert 4 * images[0].numel() <= sizes.largest < images.numel() / 10
    assert (tmp_path / "out" / "samples" / "step-000003.png").exists()


def test_what_is_held_out_is_evaluated_and_never_trained_on(tmp_path, monkeypatch):
    for n in range(20):  # of a single class the first is held out: the only one that is white
        save(solid("L", 255 * (n == 0)), tmp_path / "d" / f"{n:02}.png")
    seen = set()

    def own(model, x, *others):
        seen.update((model.training, value) for value in x.amax((1, 2, 3)).tolist())
        return rectified_flow_loss(model, x, *others)

    monkeypatch.setattr(train, "rectified_flow_loss", own)
    call("train", *FEW, "--dataset", "d", "--steps", 30, cwd=tmp_path)
    assert seen == {(True, -1), (False, -1), (False, 1)}


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_run_has_the_precision_that_it_is_told(pictures, tmp_path, monkeypatch, precision, dtype):
    dtypes = set()

    def own(model, x, y, t, noise):
        features = model.patch_embedding(torch.zeros(1, 48))
        dtypes.add((model.training, features.dtype))
        return rectified_flow_loss(model, x, y, t, noise)

    monkeypatch.setattr(train, "rectified_flow_loss", own)
    call("train", *FEW, "--precision", precision, "--dataset", pictures, "--steps", 1, cwd=tmp_path)
    assert dtypes == {(True, dtype), (False, dtype)}


def test_a_seed_may_be_as_large_as_a_generator_tells_apart(pictures, tmp_path):
    run = [*FEW, "--dataset", pictures, "--steps", 2, "--seed", 2**32 - 1]
    call("train", *run, cwd=tmp_path)
    call("train", "--resume", "--steps", 3, cwd=tmp_path)
    assert state(tmp_path / "out")["settings"]["SEED"] == 2**32 - 1


def test_the_speed_in_the_log_is_of_training_alone(pictures, tmp_path, monkeypatch):
    generate, now = sample.generate, [0.0]  # a clock of seconds

    def slow(*arguments, **options):
        now[0] += 100
        return generate(*arguments, **options)

    def step(*arguments):
        now[0] += 1

    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sample, "generate", slow)
    monkeypatch.setattr(train, "update_ema", step)
    run = [*FEW, "--dataset", pictures, "--steps", 40, "--eval-every", 20, "--sample-every", 5]
    call("train", *run, cwd=tmp_path)
    log = rows(tmp_path / "out")
    assert [float(row["images_per_second"]) for row in log] == [4, 4]
    assert [float(row["seconds"]) for row in log] == [20 + 3 * 100, 40 + 7 * 100]


def test_a_loss_that_is_not_finite_stops_when_the_log_looks(pictures, tmp_path):
    run = [*FEW, "--dataset", pictures, "--steps", 400]
    absurd = ["--learning-rate", 1e38, "--warmup-steps", 1]
    _, err = call("train", *run, *absurd, cwd=tmp_path, status=2)
    line = err.strip().splitlines()[-1]
    assert "loss or gradient is not finite at step 10" in line
    assert line.endswith('python train.py --resume --out-dir="out" --learning-rate 5e+37')
    kept = state(tmp_path / "out")
    assert kept["step"] == 0 and all(weight.isfinite().all() for weight in kept["model"].values())


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(pictures, tmp_path, monkeypatch):
    def loss(*batch):
        loss = rectified_flow_loss(*batch)
        return loss + (loss - loss.detach()).sqrt()  # adds 0, whose slope is infinite

    monkeypatch.setattr(train, "rectified_flow_loss", loss)
    run = [*FEW, "--dataset", pictures, "--steps", 2, "--checkpoint-every", 1]
    _, err = call("train", *run, cwd=tmp_path, status=2)
    assert "not finite at step 1" in err
    assert state(tmp_path / "out")["step"] == 0


# The folder of a run


def test_a_folder_that_holds_a_run_is_kept(trained, pictures):
    before = files(trained)
    line = refused("train", *FEW, "--dataset", pictures, "--steps", 2, cwd=trained)
    assert "--resume" in line and "--overwrite" in line and "--out-dir" in line
    assert files(trained) == before


@pytest.mark.parametrize(
    "name", ["log.csv", "model.safetensors", "train_state.pt", "samples/step-001000.png"]
)
def test_what_is_left_of_a_run_is_kept_too(pictures, tmp_path, name):
    (tmp_path / "out" / "samples").mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    line = refused("train", *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    assert "holds a run" in line
    assert files(tmp_path) == {tmp_path / "out" / name: b"mine"}


def test_overwrite_replaces_the_run_and_nothing_else(pictures, tmp_path):
    run = [*FEW, "--dataset", pictures]
    call("train", *run, "--steps", 4, cwd=tmp_path)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = files(tmp_path / "out")
    refused("train", *run, "--overwrite", "--dataset", "nowhere", cwd=tmp_path)
    assert files(tmp_path / "out") == before  # until there is something to write
    call("train", *run, "--steps", 2, "--overwrite", "--dim", 32, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["step-000002.png"]
    assert [row["step"] for row in rows(tmp_path / "out")] == ["2"]
    assert DiT.from_pretrained(tmp_path / "out").final_layer.in_features == 32
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_second_training_into_a_folder_is_refused(trained, pictures, tmp_path):
    out = shutil.copytree(trained / "out", tmp_path / "out")
    before = files(out)
    with checkpoint.the_only_run(out):
        for flags in (["--resume", "--steps", 32], [*FEW, "--dataset", pictures, "--overwrite"]):
            line = refused("train", *flags, cwd=tmp_path)
            assert "another training" in line and "--out-dir" in line
    assert files(out) == before
    call("train", "--resume", "--steps", 32, cwd=tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError()])
def test_a_disk_without_locks_is_a_warning(pictures, tmp_path, monkeypatch, error):
    monkeypatch.setattr(checkpoint.FileLock, "acquire", mock.Mock(side_effect=error))
    _, err = call("train", *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    assert err.count("warning: no lock keeps others from out") == 1
    assert (tmp_path / "out" / "train_state.pt").exists()


def test_weights_that_another_program_holds_open_end_the_run(trained, tmp_path, monkeypatch):
    replace, out = Path.replace, shutil.copytree(trained / "out", tmp_path / "out")

    def of_windows(self, target):
        if target.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", of_windows)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    _, err = call("train", "--resume", "--steps", 40, cwd=tmp_path, status=2)
    assert "model.safetensors is open in another program" in err and state(out)["step"] == 30


def test_a_log_that_a_spreadsheet_holds_open_does_not_end_the_run(pictures, tmp_path, monkeypatch):
    replace, held = Path.replace, []

    def of_windows(self, target):
        if target.name == "log.csv" and len(held) < 8:  # two rows: four attempts each
            held.append(target)
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", of_windows)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    run = [*FEW, "--dataset", pictures, "--steps", 6, "--eval-every", 2]
    _, err = call("train", *run, cwd=tmp_path)
    assert err.count(f"warning: {Path('out/log.csv')} is open in another program") == 2
    assert [row["step"] for row in rows(tmp_path / "out")] == ["2", "4", "6"]
    assert not list((tmp_path / "out").glob(".writing*"))


def test_an_empty_name_of_a_data_set_is_refused(pictures):
    line = refused("train", *FEW, "--dataset", "", "--steps", 1, cwd=pictures)
    assert 'no such folder: ""' in line


# Beginning with the weights of a trained network

STILL = [*FEW, "--steps", 1, "--learning-rate", 0]  # the weights stay as they begin


def test_the_same_classes_begin_with_all_weights(trained, pictures, tmp_path):
    run = [*STILL, "--dataset", pictures, "--init-from", trained / "out"]
    out, _ = call("train", *run, cwd=tmp_path)
    assert f"3 of 3 classes are known to {trained / 'out'}; new layers: none\n" in out
    begun = DiT.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in DiT.from_pretrained(trained / "out").state_dict().items():
        torch.testing.assert_close(begun[name], tensor, atol=1e-7, rtol=1e-6)

    # The page says where the weights came from, also after --resume.
    call("train", "--resume", "--steps", 2, cwd=tmp_path)
    origin = DiT.from_pretrained(trained / "out").dataset
    assert DiT.from_pretrained(tmp_path / "out").dataset.endswith(f", from a network of {origin}")
    assert f"from a network of {origin}: 3 classes" in (tmp_path / "out" / "README.md").read_text()


def test_classes_of_the_same_name_and_the_null_class_keep_their_embeddings(trained, tmp_path):
    for name in ("moth", NAMES[2], NAMES[0]):
        save(solid(), tmp_path / "other" / name / "1.png")
    run = [*STILL, "--dataset", "other", "--init-from", trained / "out"]
    out, _ = call("train", *run, cwd=tmp_path)
    assert "2 of 3 classes are known to" in out
    begun = DiT.from_pretrained(tmp_path / "out")
    assert begun.class_names == [NAMES[0], "moth", NAMES[2]]
    before = DiT.from_pretrained(trained / "out").state_dict()
    for name, tensor in begun.state_dict().items():
        if name == "class_embedding.weight":
            torch.testing.assert_close(tensor[[0, 2, 3]], before[name][[0, 2, 3]])
            assert not any(torch.allclose(tensor[1], row, atol=1e-2) for row in before[name])
        else:
            torch.testing.assert_close(tensor, before[name], atol=1e-7, rtol=1e-6)


def test_layers_that_the_trained_network_lacks_stay_as_they_are_and_are_named(
    trained, tmp_path, capsys
):
    shutil.copytree(trained / "out", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["blocks.0.attention.qkv.weight"]  # as if this layer had been added since
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="attention.qkv.weight"):
        DiT.from_pretrained(tmp_path / "model")
    assert DiT.from_pretrained(tmp_path / "model", strict=False).lacking == [
        "blocks.0.attention.qkv.weight"
    ]

    model = DiT.from_pretrained(trained / "out")
    model.lora = torch.nn.Linear(16, 2)  # another one, whatever DiT is called with
    torch.nn.init.normal_(model.blocks[0].attention.qkv.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.nn.init.zeros_(model.patch_embedding.weight)
    train.load_initial_weights(tmp_path / "model", model)
    out = capsys.readouterr().out
    assert "3 of 3 classes are known" in out
    assert "; new layers: blocks.0.attention.qkv.weight, lora.weight, lora.bias\n" in out
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])

    weights["extra"] = torch.zeros(3)  # and one that is no longer there
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="extra"):
        DiT.from_pretrained(tmp_path / "model", strict=False)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dim", 32], ["--init-from", "is of another network", "16"]),
        (["--init-from", "nowhere"], ["no network in nowhere: config.json is missing"]),
        (["--resume"], ["--init-from", "--resume"]),
    ],
)
def test_what_cannot_begin_there_is_one_line(trained, pictures, tmp_path, flags, words):
    run = [*STILL, "--dataset", pictures, "--init-from", trained / "out", *flags]
    line = refused("train", *run, cwd=tmp_path)
    assert all(word in line for word in words)
    assert not (tmp_path / "out" / "train_state.pt").exists()
