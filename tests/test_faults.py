"""What goes wrong around a run, provoked for real: nothing is lost, one line says what to do."""

import copy
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import POSIX, SMALL, call, refused, start
from fuzz import fuzz
from PIL import Image
from test_train import assert_same_run, rows, state

import train
from common import load_model, load_state, restore_state, run_command
from model import DiT, UserError

KILLS = int(os.environ.get("NANODIT_KILLS", 3))  # the long form: 20


def begun(process):
    """Wait until a run has said its size: from there on it trains and writes."""
    for line in process.stdout:
        if "M parameters" in line:
            return


@POSIX
def test_killed_at_any_instant_a_run_ends_as_if_it_never_was(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--steps", 100 * KILLS, "--batch-size", 4]
    settings += ["--eval-every", 3, "--sample-every", 25, "--checkpoint-every", 1]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    call("train.py", *settings, cwd=tmp_path / "whole")
    out = tmp_path / "broken" / "out"
    instants = random.Random(0)
    for _ in range(KILLS):
        resume = ["--resume"] if (out / "train_state.pt").exists() else []
        process = start("train.py", *(resume or settings), cwd=tmp_path / "broken")
        begun(process)
        time.sleep(instants.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out / "train_state.pt").exists():
            DiT.from_pretrained(out)  # whole at every instant, as sample.py needs it
            state(out)
    assert state(out)["step"] < 100 * KILLS  # every kill met a run
    call("train.py", "--resume", cwd=tmp_path / "broken")
    assert_same_run(tmp_path / "whole" / "out", out)
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "whole" / "out").iterdir()
    }


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(trained, tmp_path):
    return shutil.copytree(trained / "out", tmp_path / "out")


def limited(kilobytes, *arguments, cwd, **extra):
    """Start `python train.py arguments...` where no file may grow beyond so many kilobytes."""
    words = f'ulimit -f {kilobytes}; trap \'\' XFSZ; exec "$0" "$@"'
    return start("train.py", *arguments, cwd=cwd, shell=words, **extra)


@POSIX
@pytest.mark.parametrize("kilobytes", [4, 200])
def test_a_full_disk_leaves_the_last_checkpoint(trained, tmp_path, kilobytes):
    # 4 kB stop model.safetensors, 200 kB only train_state.pt.
    out = copied(trained, tmp_path)
    before = {name: (out / name).read_bytes() for name in ("model.safetensors", "train_state.pt")}
    sizes = [len(content) for content in before.values()]
    assert sizes[0] > 4096 and sizes[0] < 200 * 1024 < sizes[1]
    process = limited(kilobytes, "--resume", "--steps", 40, cwd=tmp_path)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "Traceback" not in err
    assert "cannot write to out" in err.splitlines()[-1]
    assert {name: (out / name).read_bytes() for name in before} == before
    call("train.py", "--resume", "--steps", 40, cwd=tmp_path)
    assert state(out)["step"] == 40


@POSIX
def test_a_folder_that_vanishes_under_the_run_is_one_line(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--steps", 100000, "--batch-size", 4]
    process = start("train.py", *settings, "--eval-every", 5, cwd=tmp_path)
    begun(process)
    time.sleep(1)
    (tmp_path / "out").rename(tmp_path / "moved")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err
    assert "out" in err.splitlines()[-1]
    DiT.from_pretrained(tmp_path / "moved")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_folder_that_cannot_be_written_is_one_line_before_any_work(pictures, tmp_path):
    line = refused("train.py", *SMALL, "--dataset", pictures, "--out-dir", "/proc/x", cwd=tmp_path)
    assert "/proc/x" in line
    (tmp_path / "file").write_text("mine")
    line = refused("train.py", *SMALL, "--dataset", pictures, "--out-dir", "file", cwd=tmp_path)
    assert "file" in line and (tmp_path / "file").read_text() == "mine"


def test_a_truncated_state_is_named(trained, tmp_path):
    path = copied(trained, tmp_path) / "train_state.pt"
    content = path.read_bytes()
    for keep in (0, len(content) // 3, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(UserError, match="train_state.pt is missing, damaged"):
            load_state(path)
    line = refused("train.py", "--resume", "--steps", 40, cwd=tmp_path)
    assert "train_state.pt is missing, damaged" in line


def test_a_single_changed_byte_of_a_state_is_noticed(trained, tmp_path):
    path = copied(trained, tmp_path) / "train_state.pt"
    content = bytearray(path.read_bytes())
    weights = state(path.parent)["ema"]["blocks.0.mlp.0.weight"].numpy().tobytes()
    content[content.index(weights) + 100] ^= 64
    path.write_bytes(content)
    assert "damaged" in refused("train.py", "--resume", "--steps", 40, cwd=tmp_path)


@pytest.mark.parametrize("content", [{}, [1, 2], {"settings": {}}, "words"])
def test_a_foreign_state_is_named(tmp_path, content):
    torch.save(content, tmp_path / "train_state.pt")
    with pytest.raises(UserError, match="train_state.pt is missing, damaged, or no state of a run"):
        load_state(tmp_path / "train_state.pt")


def test_a_state_of_another_version_of_the_code(trained, tmp_path):
    out = copied(trained, tmp_path)
    old = state(out)
    del old["settings"]["GRAD_CLIP"]  # a constant that came later has its default
    torch.save(old, out / "train_state.pt")
    call("train.py", "--resume", "--steps", 32, cwd=tmp_path)
    assert state(out)["settings"]["GRAD_CLIP"] == train.GRAD_CLIP
    old["model"]["blocks.0.mlp.7.weight"] = old["model"].pop("blocks.0.mlp.0.weight")
    torch.save(old, out / "train_state.pt")
    line = refused("train.py", "--resume", "--steps", 40, cwd=tmp_path)
    assert "train_state.pt does not fit" in line and "blocks.0.mlp" in line


class Bomb:
    """Unpickled by an unsafe reader, it leaves a file."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_that_would_run_code_does_not(trained, tmp_path):
    out = copied(trained, tmp_path)
    torch.save({"settings": Bomb()}, out / "train_state.pt")
    refused("train.py", "--resume", cwd=tmp_path)
    (out / "train_state.pt").write_bytes(pickle.dumps(Bomb()))
    refused("train.py", "--resume", cwd=tmp_path)
    (out / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused("sample.py", cwd=tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": ["a", "b"]},
        {"image_size": 16, "patch_size": 8},
        {"image_size": 32},
        {"heads": 4},
        {"depth": 2},
        {"dim": 32},
        {"dim": "16"},
        {"class_names": None},
        {"image_size": 15},
        {"depth": -1},
    ],
)
def test_a_config_of_another_model_is_named(trained, tmp_path, change):
    out = copied(trained, tmp_path)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as error:
        load_model(out)
    line = str(error.value)
    assert str(out) in line and "config.json" in line and len(line) < 500


def test_weights_of_another_model_are_one_line(trained, tmp_path):
    out = copied(trained, tmp_path)
    DiT(16, 4, 32, 1, 2, ["a", "b", "c"]).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", out)
    line = refused("sample.py", "--checkpoint", "out", cwd=tmp_path)
    assert "model.safetensors" in line and "size mismatch" in line and "[16, 16]" in line


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 1_000_000, "heads": 1},
        {"depth": 100_000_000},
        {"depth": 20_000},
        {"image_size": 4_000_000},
        {"image_size": 8_000},
        {"patch_size": 1_000_000, "image_size": 1_000_000},
        {"conv_dim": 100_000},
    ],
)
def test_absurd_sizes_are_refused_before_they_fill_the_memory(trained, tmp_path, change):
    resource = pytest.importorskip("resource")
    out = copied(trained, tmp_path)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="too large|at least|not a multiple"):
        load_model(out)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_class_names_cannot_write_outside_the_folder(tmp_path):
    long = "n" * 300
    names = ["../../up", "/etc/x", "..", "a/b", "a_b", "tab\tnew\nline", long, "蝶" * 100, "زرقاء"]
    names += ["", "Dr. Who, A&B (x)", "a/", "a_-11", "Cat", "cat", "cat"]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    torch.manual_seed(0)
    DiT(16, 4, 16, 1, 2, names).save_pretrained(tmp_path / "deep" / "er" / "model")
    flags = ["--checkpoint", "model", "--save-images", "many", "--steps", 1, "--output", "g.png"]
    call("sample.py", *flags, cwd=tmp_path / "deep" / "er")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    folders = {path.name for path in (tmp_path / "deep" / "er" / "many").iterdir()}
    assert len(folders) == len(names) and {"a_b", "زرقاء", "Dr. Who, A&B (x)"} <= folders
    assert all(len(list((tmp_path / "deep/er/many" / name).iterdir())) == 1 for name in folders)


def test_strange_pictures_train_or_are_named_once(tmp_path):
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    for n in range(4):
        Image.new("RGB", (20, 20), (50 * n, 0, 90)).save(folder / f"{n}.png")
    Image.new("RGB", (1, 1), "red").save(folder / "one-pixel.png")
    Image.new("RGB", (20000, 10), "red").save(folder / "long.jpg")
    Image.new("RGB", (10, 20000), "red").save(folder / "tall.png")
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    Image.new("I;16", (20, 20), 30000).save(folder / "deep.png")
    Image.new("CMYK", (20, 20)).save(folder / "print.jpg")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    # A bomb: a few kilobytes that would become gigabytes. 20,000 x 20,000 black pixels in one bit.
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    (folder / "loop").symlink_to(folder)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    flags = ["--dataset", tmp_path / "pictures", "--steps", 2, "--batch-size", 4]
    out, err = call("train.py", *SMALL, *flags, cwd=tmp_path)
    assert "1 classes, 11 pictures" in out
    (line,) = [line for line in err.splitlines() if "skipped" in line]
    assert "skipped 3 pictures" in line
    assert all(line.count(name) == 1 for name in ("text.jpg", "empty.png", "bomb.png"))
    assert "Warning" not in err


def test_many_broken_pictures_do_not_flood_the_screen(tmp_path):
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(folder / "good.png")
    for n in range(500):
        (folder / f"{n}.jpg").write_text("no")
    flags = ["--dataset", tmp_path / "pictures", "--steps", 1, "--batch-size", 4]
    _, err = call("train.py", *SMALL, *flags, cwd=tmp_path)
    assert "skipped 500 pictures" in err and err.count(".jpg") == 10


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_folder_without_permission_is_named(tmp_path):
    for name in ("open", "closed"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / name / "1.png")
    (tmp_path / "pictures" / "closed").chmod(0)
    try:
        line = refused("train.py", *SMALL, "--dataset", tmp_path / "pictures", cwd=tmp_path)
        assert "closed" in line
    finally:
        (tmp_path / "pictures" / "closed").chmod(0o700)


def test_ten_thousand_classes_and_names_in_any_script(tmp_path):
    for n in range(10_000):
        (tmp_path / "p" / f"{n:05} 蝶 فراشة").mkdir(parents=True)
        Image.new("RGB", (4, 4), (n % 256, n // 256, 0)).save(
            tmp_path / "p" / f"{n:05} 蝶 فراشة" / "1.png"
        )
    flags = ["--dataset", tmp_path / "p", "--steps", 2, "--batch-size", 4, "--sample-every", 2]
    out, _ = call("train.py", *SMALL, *flags, cwd=tmp_path)
    assert "10000 classes, 10000 pictures, 0 of them held out" in out
    out, _ = call("sample.py", "--class-name", "00042 蝶 فراشة", "--steps", 1, cwd=tmp_path)
    with Image.open(tmp_path / out.strip()) as image:
        assert image.size == (4 * 18 + 2, 18 + 2)


def test_a_loss_that_turns_nan_stops_within_a_log_interval(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--batch-size", 4, "--steps", 1000]
    absurd = ["--learning-rate", 1e30, "--warmup-steps", 1, "--checkpoint-every", 1]
    _, err = call("train.py", *settings, *absurd, cwd=tmp_path, status=2)
    line = err.strip().splitlines()[-1]
    assert "LEARNING_RATE" in line and "lower" in line
    stopped = int(line.split("at step ")[1].split(";")[0])
    assert stopped <= 10
    kept = state(tmp_path / "out")
    assert kept["step"] < stopped
    assert all(weight.isfinite().all() for weight in kept["model"].values())


def test_what_may_change_on_resume_does(trained, tmp_path):
    out = copied(trained, tmp_path)
    more = ["--steps", 34, "--learning-rate", 3e-4, "--eval-every", 2, "--checkpoint-every", 3]
    call("train.py", "--resume", *more, cwd=tmp_path)
    assert [row["step"] for row in rows(out)] == ["10", "20", "30", "32", "34"]
    settings = state(out)["settings"]
    assert settings["LEARNING_RATE"] == 3e-4 and settings["STEPS"] == 34


def test_a_failed_command_changes_no_file(trained, tmp_path):
    out = copied(trained, tmp_path)
    before = files(out)
    refused("train.py", cwd=tmp_path)
    refused("train.py", "--resume", "--steps", 40, "--image-size", 32, cwd=tmp_path)
    refused("sample.py", "--class-id", 99, cwd=tmp_path)
    assert files(out) == before


def test_mutated_files_end_in_no_traceback():
    assert fuzz(count=6, seed=1000) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 has more."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GiB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: 9 GiB"),
        MemoryError("9 GiB"),
    ],
)
def test_out_of_memory_names_what_to_set(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main, if_out_of_memory="lower BATCH_SIZE, or raise ACCUMULATE")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "BATCH_SIZE" in line and "ACCUMULATE" in line
    assert "9 GiB" in line or isinstance(error, MemoryError)


class AdamWOnAFullGPU(torch.optim.AdamW):
    def load_state_dict(self, state_dict):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")


def test_a_run_that_does_not_fit_into_memory_is_not_called_damaged(trained):
    model = DiT.from_pretrained(trained / "out")
    optimizer = AdamWOnAFullGPU(model.parameters())
    with pytest.raises(torch.OutOfMemoryError):  # which becomes the line of the test above
        restore_state(state(trained / "out"), model, copy.deepcopy(model), optimizer, [])


def test_a_batch_too_large_for_the_memory_is_one_line(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--batch-size", 10**12, "--compile", "off"]
    _, err = call("train.py", *settings, cwd=tmp_path, status=2)
    line = err.strip().splitlines()[-1]
    assert "out of memory" in line and "BATCH_SIZE" in line and "ACCUMULATE" in line


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_batch_too_large_for_the_gpu_is_one_line(pictures, tmp_path):
    settings = ["--dataset", pictures, "--batch-size", 10_000_000, "--device", "cuda"]
    _, err = call("train.py", *settings, "--dim", 1536, cwd=tmp_path, status=2)
    assert "BATCH_SIZE" in err.splitlines()[-1]
