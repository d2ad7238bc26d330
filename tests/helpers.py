"""What the tests share: ways to run the scripts, to read what a run has left, and small pictures.

The scripts run inside the test's own process where that is possible, as importing torch takes
longer than most of them; in a process of their own where signals, an environment, several processes
or an edited copy of the code are what is tested.
"""

import contextlib
import csv
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.settings import run_command

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # there is a worker for each core

ROOT = Path(__file__).parents[1]
# One block of width 16 on pictures of 16x16: a step takes milliseconds.
SMALL = "--image-size 16 --patch-size 4 --dim 16 --depth 1 --heads 2 --conv-dim 0".split()
SMALL += ["--device", "cpu", "--precision", "fp32"]  # the same on every CPU
FEW = [*SMALL, "--batch-size", 4]
RED = (200, 30, 40)

# Windows has no signals that a process could catch, no such limits, and no torchrun without libuv.
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs signals and processes of POSIX")


# Running the scripts


def environment(**extra):
    """This process's, without what a developer's own Hub settings could change."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **extra}


def default_signals():
    """In a child: what a script in the background, or nohup, made it ignore is heard again."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(script, *arguments, cwd, shell=None, processes=0, **extra):
    """Start a script in a process of its own, in the folder cwd. script: "train", or the path of an
    edited copy. shell: words of a shell to start it from; processes: how many torchrun starts;
    extra: variables of the environment."""
    path = ROOT / f"{script.replace('.', '/')}.py" if isinstance(script, str) else script
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}"]
    command += [str(path), *map(str, arguments)]
    if shell:
        command = ["bash", "-c", shell, *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    if os.name == "posix":
        pipes["preexec_fn"] = default_signals
    return subprocess.Popen(command, cwd=cwd, env=environment(**extra), text=True, **pipes)


def run_here(module, *arguments, cwd):
    """What `python module.py arguments...` would do in the folder cwd, in this process: its exit
    status, stdout and stderr. A bug is raised."""
    main = importlib.import_module(module).main
    out, err, code = io.StringIO(), io.StringIO(), 0
    folder, argv = os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [f"{module}.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(main)
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(folder)
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def finish(script, *arguments, cwd, **extra):
    """Run a script to its end: (exit status, stdout, stderr). script: "train", "sample",
    "experiments.score" and so on, or the path of an edited copy. extra: as for start()."""
    if isinstance(script, str) and not extra:
        return run_here(script, *arguments, cwd=cwd)
    process = start(script, *arguments, cwd=cwd, **extra)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def call(script, *arguments, cwd, status=0, **extra):
    """Run it to its end, check its exit status, and return (stdout, stderr)."""
    code, out, err = finish(script, *arguments, cwd=cwd, **extra)
    assert code == status, f"status {code}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


def refused(script, *arguments, cwd, **extra):
    """Run it where it has to refuse: status 2, one line on stderr, which is returned."""
    _, err = call(script, *arguments, cwd=cwd, status=2, **extra)
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


def edited(folder, name, *changes):
    """A copy of the project in which each (old, new) has been replaced in one file."""
    copy = folder / "copy"
    for package in ("data", "support"):
        shutil.copytree(ROOT / package, copy / package)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    edit(copy / name, *changes)
    return copy


def edit(file, *changes):
    """Replace each (old, new) in a file."""
    text = file.read_text("utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text, "utf-8")


# What a run has left


def rows(out):
    """The rows of a run's log.csv."""
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def state(out):
    """The train_state.pt of a run."""
    return torch.load(out / "train_state.pt", weights_only=True)


def assert_same_weights(out, other):
    """Two runs have the same weights at the same step, bit for bit."""
    first, second = state(out), state(other)
    assert first["step"] == second["step"]
    for part in ("model", "ema"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), (part, name)


def files(folder):
    """{path: content} of a folder, without the lock, which is there or not."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name]
    return {path: path.read_bytes() for path in paths}


def wait_for_rows(process, out, count):
    """Wait until the log of a run in another process has so many rows."""
    while not (out / "log.csv").exists() or len(rows(out)) < count:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()


def opened(path):
    """A picture file, decoded."""
    with Image.open(path) as image:
        return image.convert("RGB")


# Small pictures


def save(image, path, **options):
    """Write a PIL image, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def solid(mode="RGB", colour=RED, size=(20, 20)):
    """A PIL image of one colour."""
    return Image.new(mode, size, colour)
