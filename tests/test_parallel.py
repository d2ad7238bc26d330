"""Several processes, as torchrun starts them: the same run as one, and none outlives the others."""

import csv
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import POSIX, SMALL, call, start

EVERY = ["--eval-every", 10, "--sample-every", 15, "--checkpoint-every", 7, "--batch-size", 8]
EVERY += ["--warmup-steps", 1, "--decay-share", 0]  # a longer run begins as a shorter one does


def log(out):
    """The columns of log.csv that do not tell the time."""
    with open(out / "log.csv") as file:
        return [list(map(float, list(row.values())[:4])) for row in csv.DictReader(file)]


def state(out):
    return torch.load(out / "train_state.pt", weights_only=True)


def assert_same_training(a, b):
    first, second = state(a), state(b)
    assert first["step"] == second["step"]
    for part in ("model", "ema"):
        for name, tensor in first[part].items():
            torch.testing.assert_close(second[part][name], tensor, atol=1e-5, rtol=1e-4)
    assert len(log(a)) == len(log(b))
    for row, other in zip(log(a), log(b)):
        assert other == pytest.approx(row, rel=1e-4)
    files = [sorted(path.name for path in out.rglob("*")) for out in (a, b)]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    """Thirty steps of one process."""
    folder = tmp_path_factory.mktemp("alone")
    call("train.py", *SMALL, "--dataset", pictures, *EVERY, "--steps", 30, cwd=folder)
    return folder / "out"


@POSIX
def test_three_processes_train_as_one(alone, pictures, tmp_path):
    run = [*SMALL, "--dataset", pictures, *EVERY, "--steps", 30]  # batches of 8 are 3 + 3 + 2
    out, _ = call("train.py", *run, "--accumulate", 2, cwd=tmp_path, processes=3)
    assert out.count("M parameters") == out.count("trained in") == 1
    assert_same_training(alone, tmp_path / "out")


@POSIX
def test_one_process_goes_on_with_what_two_began(alone, pictures, tmp_path):
    run = [*SMALL, "--dataset", pictures, *EVERY, "--steps", 12]
    call("train.py", *run, cwd=tmp_path, processes=2)
    call("train.py", "--resume", "--steps", 30, cwd=tmp_path)
    whole, parts = state(alone), state(tmp_path / "out")
    for name, tensor in whole["ema"].items():
        torch.testing.assert_close(parts["ema"][name], tensor, atol=1e-5, rtol=1e-4)
    (at_20,) = (row for row in log(tmp_path / "out") if row[0] == 20)
    assert at_20[2] == pytest.approx(log(alone)[1][2], rel=1e-4)


def test_a_batch_with_less_than_a_picture_for_each_is_refused(pictures, tmp_path):
    run = [*SMALL, "--dataset", pictures, "--batch-size", 1]
    _, err = call("train.py", *run, cwd=tmp_path, status=2, WORLD_SIZE="2", RANK="0")
    (line,) = err.splitlines()
    assert "BATCH_SIZE 1" in line and "2" in line


def workers(out):
    """Process ids of the trainings that write to `out`; torchrun's own is not among them."""
    command = ["pgrep", "-f", f"python[^ ]* -u .*train.py .*--out-dir {out}$"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return list(map(int, found.stdout.split()))


@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_all_processes_end_together(pictures, tmp_path, name):
    number = getattr(signal, name)
    out = tmp_path / "out"
    run = [*SMALL, "--dataset", pictures, *EVERY, "--steps", 10**6, "--out-dir", out]
    process = start("train.py", *run, cwd=tmp_path, processes=2)
    while not (out / "log.csv").exists() or len(log(out)) < 3:
        time.sleep(0.1)
        assert process.poll() is None
    assert len(workers(out)) == 2
    begin = time.monotonic()
    if number != signal.SIGINT:  # one of the two gets it, and torchrun and the other have to see it
        os.kill(workers(out)[-1], number)
    else:  # as Ctrl-C sends it
        process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert time.monotonic() - begin < 60 and not workers(out)
    stopped = state(out)["step"]
    assert stopped >= 28
    if number != signal.SIGKILL:  # both end their step and stop, and one says so
        assert err.count(f"stopped at step {stopped} ") == 1 and "--resume" in err
        assert "Ctrl-C again" not in err  # torchrun passes each signal on, so that would not work
    more = ["--resume", "--steps", stopped + 2, "--out-dir", out]
    call("train.py", *more, cwd=tmp_path)
    assert state(out)["step"] == stopped + 2
