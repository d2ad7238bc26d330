"""A file that another program holds, as only Windows has it: here the operating system's calls are
made to fail as they do there. Training waits, then warns, then goes on."""

import builtins
import os

import pytest
import torch
from conftest import SMALL
from test_train import rows

import common
import train
from model import DiT, UserError

REPLACE, OPEN = os.replace, builtins.open


def hold(monkeypatch, name, times):
    """Let the next attempts to replace a file of that name, so many, fail. Returns the list of all
    attempts."""
    attempts = []

    def replace(source, target, **options):
        if os.path.basename(target) == name:
            attempts.append(target)
            if len(attempts) <= times:
                raise PermissionError(13, "used by another process", str(target))
        return REPLACE(source, target, **options)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    return attempts


def run(pictures, out, *more):
    settings = [*SMALL, "--dataset", pictures, "--batch-size", 4, "--steps", 8]
    settings += ["--eval-every", 2, "--sample-every", 2, "--checkpoint-every", 2, "--out-dir", out]
    train.main([*map(str, settings), *map(str, more)])


@pytest.mark.parametrize("name", common.CHECKPOINT_FILES)
def test_a_file_held_for_a_moment_is_tried_again(monkeypatch, pictures, tmp_path, capsys, name):
    attempts = hold(monkeypatch, name, times=3)
    run(pictures, tmp_path)
    assert len(attempts) == 3 + 5  # at the start, and at steps 2, 4, 6 and 8
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [*common.CHECKPOINT_FILES, "step-000004.png"])
def test_a_file_held_for_longer_is_a_warning(monkeypatch, pictures, tmp_path, capsys, name):
    run(pictures, tmp_path, "--steps", 2)
    attempts = hold(monkeypatch, name, times=4)
    run(pictures, tmp_path, "--resume")
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "warning" in text]
    assert name in line and "another program" in line
    assert len(attempts) > 4 or name.endswith("png")
    state = torch.load(tmp_path / "train_state.pt", weights_only=True)
    assert state["step"] == 8 and len(rows(tmp_path)) == 4
    weights = DiT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weights[key], state["ema"][key]) for key in weights)


def test_the_last_checkpoint_is_not_given_up_in_silence(monkeypatch, pictures, tmp_path):
    run(pictures, tmp_path, "--steps", 2)
    hold(monkeypatch, "train_state.pt", times=100)
    with pytest.raises(UserError, match="cannot write .*train_state.pt: .*checkpoint-1"):
        run(pictures, tmp_path, "--resume")
    assert torch.load(tmp_path / "train_state.pt", weights_only=True)["step"] == 2
    kept = tmp_path / "checkpoint-1"
    assert not (kept / "model.safetensors").exists()  # which is in its place
    (kept / "train_state.pt").rename(tmp_path / "train_state.pt")
    assert torch.load(tmp_path / "train_state.pt", weights_only=True)["step"] == 8


def test_rows_of_a_held_log_are_written_with_the_next(monkeypatch, pictures, tmp_path, capsys):
    attempts = []

    def held_twice(path, mode="r", **options):
        if os.path.basename(path) == "log.csv" and mode == "a":
            attempts.append(path)
            if len(attempts) in (2, 3):
                raise PermissionError(13, "used by another process", str(path))
        return OPEN(path, mode, **options)

    monkeypatch.setattr(common, "open", held_twice, raising=False)
    run(pictures, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "6", "8"]
    assert not (tmp_path / "log-waiting.csv").exists()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 2 and all("log.csv" in line for line in warnings)

    # Held to the end of the run, the rows are still there, for the next run to add.
    monkeypatch.setattr(common, "open", OPEN)
    run(pictures, tmp_path, "--resume", "--steps", 10)
    monkeypatch.setattr(common, "open", held_twice)
    attempts[:] = [0]
    run(pictures, tmp_path, "--resume", "--steps", 14)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "6", "8", "10"]
    waiting = (tmp_path / "log-waiting.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in waiting] == ["step", "12", "14"]
    monkeypatch.setattr(common, "open", OPEN)
    run(pictures, tmp_path, "--resume", "--steps", 16)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "6", "8", "10", "12", "14", "16"]
    assert not (tmp_path / "log-waiting.csv").exists()
