"""experiments/ablations.py: every variant trains and is one; rows are equal in compute and kept."""

import csv

import pytest
import torch
from conftest import call, refused

import model
import train
from experiments import ablations

SMALLER = {"IMAGE_SIZE": 16, "PATCH_SIZE": 4, "DIM": 64, "DEPTH": 2, "HEADS": 2, "BATCH_SIZE": 4}


def first_losses(monkeypatch, variant):
    """Training losses of four steps of a variant, on one small network."""
    with monkeypatch.context() as patch:
        for owner, name in (  # what a variant may change: put back at the end
            (model, "MIN_T"),
            (train, "MIN_T"),
            (model.DiT, "initialize"),
            (model.DiT, "forward"),
            (model.Attention, "forward"),
            (torch.nn.functional, "scaled_dot_product_attention"),
            (train, "random_batch"),
            (train, "rectified_flow_loss"),
            (torch.optim, "AdamW"),
        ):
            patch.setattr(owner, name, getattr(owner, name))
        settings, change = ablations.ALL[variant]
        for name in train.SETTINGS:
            patch.setattr(train, name, getattr(train, name))
        vars(train).update({**settings, **SMALLER})
        if change:
            change()
        torch.manual_seed(0)
        dit = train.new_model(["a", "b"])
        optimizer = torch.optim.AdamW(
            [*dit.parameters()], lr=1e-2, betas=(0.9, 0.95), weight_decay=0
        )
        images = torch.arange(8 * 3 * 256).view(8, 3, 16, 16) % 251
        losses = []
        for step in range(1, 5):
            batch = train.random_batch(images.to(torch.uint8), torch.arange(8) % 2, 2, step)
            loss = train.rectified_flow_loss(dit, *batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize(
    "variant", [v for v, (_, c) in {**ablations.VARIANTS, **ablations.FINALISTS}.items() if c]
)
def test_every_variant_that_is_code_trains_and_differs(monkeypatch, variant):
    default, changed = (first_losses(monkeypatch, name) for name in ("default", variant))
    assert all(0 < loss < 100 for loss in changed)
    assert changed != default
    assert first_losses(monkeypatch, "default") == default  # and leaves nothing behind


def test_training_on_few_pictures_keeps_those_held_out(monkeypatch):
    labels = torch.arange(3).repeat_interleave(45)
    images = torch.arange(135).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    monkeypatch.setattr(train, "load_dataset", lambda name, size: (images, labels, ["a", "b", "c"]))
    monkeypatch.setattr(train, "held_out", train.held_out)
    held_out = images[train.held_out(labels)]
    ablations.few_pictures(10)
    images, labels, _ = train.load_dataset("any", 2)
    val = train.held_out(labels)
    assert torch.equal(images[val], held_out)
    assert torch.bincount(labels[~val]).tolist() == [10, 10, 10]
    assert images[~val, 0, 0, 0].tolist()[:3] == [1, 2, 3]  # 0 is held out


def test_every_constant_of_a_variant_is_a_setting():
    for settings, _ in (*ablations.ALL.values(), (ablations.SMALL, None)):
        assert set(settings) <= set(train.SETTINGS)


def rows(folder):
    with open(folder / "ablations.csv") as file:
        return list(csv.DictReader(file))


def test_rows_are_equal_in_compute_and_run_once(pictures, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("efficientnet_lite_pytorch")
    command = ["experiments/ablations.py", "screening", "--tflop", 0.066, "--dataset", pictures]
    command += ["--output", tmp_path, "--runs", tmp_path / "runs", "--held-out", pictures]
    call(*command, "--only", "default", "width 192", cwd=tmp_path)
    default, wide = rows(tmp_path)
    assert [default["variant"], wide["variant"]] == ["default", "width 192"]
    for row in (default, wide):
        spent = int(row["images"]) * float(row["gflop_image"]) / 1000
        assert spent == pytest.approx(0.066, rel=0.08)  # whole steps
        assert all(float(row[name]) > 0 for name in (*ablations.T, "kid", "frechet", "minutes"))
        assert len(row["train_curve"].split()) == len(row["curve"].split())
        last = row["curve"].split()[-1].split(":")
        assert float(last[0]) == pytest.approx(spent, rel=0.01)
        mean = sum(float(row[name]) for name in ablations.T) / len(ablations.T)
        assert float(last[1]) == pytest.approx(mean, rel=0.15)  # other noise, same pictures
    assert int(wide["images"]) < 0.8 * int(default["images"])
    table = (tmp_path / "ablations-screening.md").read_text()
    assert "| default |" in table and "| width 192 |" in table
    assert (tmp_path / "ablations-screening.png").stat().st_size > 10_000

    before = (tmp_path / "ablations.csv").read_bytes()
    out, _ = call(*command, "--only", "width 192", "default", cwd=tmp_path)
    assert "train.py" not in out  # nothing was trained
    assert (tmp_path / "ablations.csv").read_bytes() == before


def test_a_variant_that_is_none_is_refused(tmp_path):
    line = refused("experiments/ablations.py", "screening", "--only", "luck", cwd=tmp_path)
    assert "luck" in line and "no EMA" in line
