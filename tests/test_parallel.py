"""Several processes, as torchrun starts them: the same run as one, and none outlives the others."""

import os
import shutil
import signal
import subprocess

import pytest
import torch
from helpers import FEW, POSIX, SMALL, call, refused, rows, start, state, wait_for_rows

EVERY = ["--eval-every", 1, "--sample-every", 15, "--checkpoint-every", 7, "--batch-size", 8]
EVERY += ["--warmup-steps", 1, "--decay-share", 0]  # a longer run begins as a shorter one does


def assert_same_training(out, other):
    """Two runs have the same weights, losses and files, but for rounding."""
    assert state(out)["step"] == state(other)["step"]
    for part in ("model", "ema"):
        theirs = state(other)[part]
        for name, tensor in state(out)[part].items():
            torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-4)
    assert len(rows(out)) == len(rows(other))
    for row, its in zip(rows(out), rows(other)):
        for column in ("step", "train_loss", "val_loss", "learning_rate"):
            assert float(its[column]) == pytest.approx(float(row[column]), rel=1e-4)
    names = [{path.name for path in folder.glob("**/[!.]*")} for folder in (out, other)]
    assert names[0] == names[1]


@POSIX
def test_three_processes_train_as_one(pictures, tmp_path):
    run = [*SMALL, "--dataset", pictures, *EVERY, "--sample-every", 8]
    call("train", *run, "--steps", 16, "--out-dir", "alone", cwd=tmp_path)
    call("train", *run, "--steps", 8, cwd=tmp_path)  # one process begins, and three go on
    more = ["--resume", "--steps", 16, "--accumulate", 3]  # batches of 8 are 3 + 3 + 2
    out, _ = call("train", *more, cwd=tmp_path, processes=3)
    assert out.count("M parameters") == out.count("trained for") == 1
    assert_same_training(tmp_path / "alone", tmp_path / "out")


def workers(out):
    """Process ids of the trainings that write to `out`; torchrun's own is not among them."""
    command = ["pgrep", "-f", f"python[^ ]* -u .*train.py .*--out-dir {out}$"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGKILL")]


@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep")
@pytest.mark.parametrize("name", ["SIGTERM", *SLOW])
def test_all_processes_end_together_and_one_goes_on(pictures, tmp_path, name):
    run = [*SMALL, "--dataset", pictures, *EVERY, "--steps", 10**6, "--out-dir", tmp_path / "out"]
    process = start("train", *run, cwd=tmp_path, processes=2)
    wait_for_rows(process, tmp_path / "out", 8)
    assert len(workers(tmp_path / "out")) == 2
    if name == "SIGINT":  # as Ctrl-C sends it, to all
        process.send_signal(signal.SIGINT)
    else:  # one of the two gets it, and torchrun and the other have to see it
        os.kill(workers(tmp_path / "out")[-1], getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and not workers(tmp_path / "out")
    stopped = state(tmp_path / "out")["step"]
    assert stopped >= 7
    if name != "SIGKILL":  # both end their step and stop, and one says so
        assert err.count(f"stopped at step {stopped}, ") == 1 and "--resume" in err

    # One process goes on with what two began.
    steps = ["--steps", stopped + 2, "--out-dir"]
    call("train", "--resume", *steps, tmp_path / "out", cwd=tmp_path)
    call("train", *run[:-4], *steps, tmp_path / "alone", cwd=tmp_path)
    assert_same_training(tmp_path / "alone", tmp_path / "out")


def test_a_batch_with_less_than_a_picture_for_each_is_refused(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    line = refused("train", *FEW, "--dataset", pictures, cwd=tmp_path)
    assert "BATCH_SIZE 4 is too small for 5 processes" in line
