"""Shared by all tests: a small folder of pictures, a small run, and a way to call the scripts."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for each core: before torch comes
from PIL import Image  # noqa: E402

from data.drawn import draw_butterflies  # noqa: E402

ROOT = Path(__file__).parents[1]
# One block of width 16 on pictures of 16x16: a step takes milliseconds.
SMALL = "--image-size 16 --patch-size 4 --dim 16 --depth 1 --heads 2 --device cpu".split()
SMALL += ["--precision", "fp32"]  # the same on every CPU


# Windows has no signals that a process could catch, no such limits, and no torchrun without libuv.
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs signals and processes of POSIX")


def environment(**extra):
    """This process's, without what a developer's own Hub settings could change."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **extra}


def default_signals():
    """In a child: what a script in the background, or nohup, made it ignore is heard again."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(script, *arguments, cwd, shell=None, processes=0, **extra):
    """Start `python script arguments...` in the folder cwd, or the words of a shell before it, or
    torchrun with so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *torchrun[: 4 * bool(processes)], str(ROOT / script)]
    command += map(str, arguments)
    command = ["bash", "-c", shell, *command] if shell else command
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    if os.name == "posix":
        pipes["preexec_fn"] = default_signals
    return subprocess.Popen(command, cwd=cwd, env=environment(**extra), text=True, **pipes)


@functools.cache
def forks():
    """The process that tests/forks.py is, which ends with this one."""
    command = [sys.executable, ROOT / "tests" / "forks.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(), text=True, **pipes)


def finish(script, *arguments, cwd, **extra):
    """Run it to its end: (exit status, stdout, stderr)."""
    if extra or sys.platform != "linux":  # elsewhere libraries do not bear a fork
        process = start(script, *arguments, cwd=cwd, **extra)
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("out", "err")]
        line = [str(ROOT / script), [*map(str, arguments)], str(cwd), environment()]
        print(json.dumps([*line, *map(str, outputs)]), file=forks().stdin, flush=True)
        return int(forks().stdout.readline()), *(path.read_text() for path in outputs)


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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of three class folders with seven drawn pictures of 16x16 each."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    images, labels, names = draw_butterflies(7, 16, seed=3)
    for i, (image, label) in enumerate(zip(images, labels.tolist())):
        if label in (9, 36, 74):
            path = folder / names[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """The folder in which a run of 30 steps has left its out/."""
    folder = tmp_path_factory.mktemp("trained")
    settings = "--steps 30 --batch-size 8 --eval-every 10 --sample-every 15".split()
    call("train.py", *SMALL, *settings, "--dataset", pictures, cwd=folder)
    return folder
