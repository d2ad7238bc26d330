"""Training as a user sees it: files, refusals, and a run that can be stopped at any moment."""

import csv
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import POSIX, SMALL, call, refused, start
from PIL import Image

import common
import train
from model import DiT

COLUMNS = ["step", "train_loss", "val_loss", "learning_rate", "images_per_second", "seconds"]


def rows(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def state(folder):
    return torch.load(folder / "train_state.pt", weights_only=True)


def grid(path):
    with Image.open(path) as image:
        return image.size, image.convert("RGB").tobytes()


def assert_same_run(a, b):
    """Bit for bit the same weights, losses and pictures; the clock's columns aside."""
    first, second = state(a), state(b)
    assert first["step"] == second["step"]
    for part in ("model", "ema"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), (part, name)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert [list(row.values())[:4] for row in rows(a)] == [
        list(row.values())[:4] for row in rows(b)
    ]
    names = sorted(path.name for path in (a / "samples").iterdir())
    assert names == sorted(path.name for path in (b / "samples").iterdir()) and names
    assert all(grid(a / "samples" / name) == grid(b / "samples" / name) for name in names)


def test_a_run_leaves_its_files(trained):
    out = trained / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "train_state.pt", "log.csv", "samples"}
    log = rows(out)
    assert list(log[0]) == COLUMNS and [row["step"] for row in log] == ["10", "20", "30"]
    assert all(0 <= float(value) < 1e6 for row in log for value in row.values())
    assert all(float(row["train_loss"]) > 0 and float(row["val_loss"]) > 0 for row in log)
    assert float(log[-1]["val_loss"]) < float(log[0]["val_loss"])
    names = sorted(path.name for path in (out / "samples").iterdir())
    assert names == ["step-000015.png", "step-000030.png"]
    assert grid(out / "samples" / names[0])[0] == (3 * 18 + 2, 18 + 2)  # a picture of each class
    model = DiT.from_pretrained(out)
    assert model.class_names == ["blue-plain-pointed", "red-eyes-pointed", "yellow-spots-tailed"]
    assert model.dataset == "pictures"  # the folder's name, not where it lies
    ema = state(out)["ema"]
    assert all(torch.equal(tensor, ema[name]) for name, tensor in model.state_dict().items())


def test_the_start_says_what_will_run(pictures, tmp_path):
    out, _ = call("train.py", *SMALL, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    assert "3 classes, 21 pictures, 2 of them held out" in out
    assert "M parameters" in out and "GFLOP per image" in out and "cpu" in out
    assert "0 blue-plain-pointed, 1 red-eyes-pointed, 2 yellow-spots-tailed" in out


def test_too_few_pictures_to_hold_any_out_are_said_to_be(pictures, tmp_path):
    few = tmp_path / "few" / "a"
    few.mkdir(parents=True)
    shutil.copy(next(pictures.rglob("*.png")), few)
    out, _ = call("train.py", *SMALL, "--dataset", few, "--steps", 2, cwd=tmp_path)
    assert "0 of them held out" in out and "the held-out loss is of pictures" in out


def test_without_the_hub_a_default_run_says_how_to_go_on(tmp_path):
    process = start("train.py", "--device", "cpu", cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2
    line = err.strip().splitlines()
    assert len(line) == 1 and "sayakpaul/butteflies_with_classes" in line[0]
    assert "--preset laptop" in line[0] and "--dataset FOLDER" in line[0]
    assert not (tmp_path / "out" / "train_state.pt").exists()


def test_a_folder_that_holds_a_run_is_kept(trained, pictures, tmp_path):
    before = (trained / "out" / "train_state.pt").read_bytes()
    line = refused("train.py", *SMALL, "--dataset", pictures, cwd=trained)
    assert "--resume" in line and "--overwrite" in line and "--out-dir" in line
    assert (trained / "out" / "train_state.pt").read_bytes() == before


def test_overwrite_replaces_the_run(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--batch-size", 4]
    call("train.py", *settings, "--steps", 4, cwd=tmp_path)
    call("train.py", *settings, "--steps", 2, "--overwrite", "--dim", 32, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["step-000002.png"]
    assert [row["step"] for row in rows(tmp_path / "out")] == ["2"]
    assert DiT.from_pretrained(tmp_path / "out").final_layer.in_features == 32


def test_resuming_a_finished_run_says_so_and_more_steps_go_on(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--batch-size", 4]
    call("train.py", *settings, "--steps", 4, cwd=tmp_path)
    out, _ = call("train.py", "--resume", cwd=tmp_path)
    assert "finished" in out
    line = refused("train.py", "--resume", "--dim", 32, cwd=tmp_path)
    assert "DIM" in line and "16" in line and "32" in line
    assert "CONV_DIM is 0" in refused("train.py", "--resume", "--conv-dim", 8, cwd=tmp_path)
    line = refused("train.py", "--resume", "--seed", 7, cwd=tmp_path)
    assert "SEED" in line
    line = refused("train.py", "--resume", "--preset", "laptop", cwd=tmp_path)
    assert "PATCH_SIZE" in line or "IMAGE_SIZE" in line
    more = ["--resume", "--steps", 6, "--eval-every", 1, "--dim", 16]
    _, err = call("train.py", *more, cwd=tmp_path)
    assert err.split("%")[0].strip() == "67"  # the bar goes on from 4 of 6 steps
    assert [row["step"] for row in rows(tmp_path / "out")] == ["4", "5", "6"]


def test_an_empty_log_is_begun_anew(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    (tmp_path / "out" / "log.csv").write_bytes(b"")  # as a full disk leaves it
    call("train.py", "--resume", "--steps", 40, cwd=tmp_path)
    assert [row["step"] for row in rows(tmp_path / "out")] == ["40"]


@pytest.mark.parametrize("first, separator", [("step", ","), ("time", ","), ("step", ";")])
def test_rows_of_a_log_are_cut_only_if_they_are_known_to_be_later(tmp_path, first, separator):
    names = [first, "other", "step" if first == "time" else "val_loss"]
    lines = [names, ["5", "x", "5"], ["10", "x", "10"], ["15", "x", "15"]]
    lines = [separator.join(line) + "\n" for line in lines]
    path = tmp_path / "log.csv"
    path.write_text("".join(lines) + "20")
    common.Log(path, last_step=10)
    kept = lines[:3] if separator == "," else [*lines, "20"]  # which a spreadsheet has saved
    assert path.read_text() == "".join(kept)


def test_a_grid_that_cannot_be_deleted_is_named(pictures, tmp_path):
    (tmp_path / "out" / "samples" / "step-000002.png").mkdir(parents=True)
    run = [*SMALL, "--dataset", pictures, "--batch-size", 4, "--steps", 2]
    line = refused("train.py", *run, "--overwrite", cwd=tmp_path)
    assert "step-000002.png" in line and "delete" in line


def test_resume_without_a_run(tmp_path):
    assert "train_state.pt" in refused("train.py", "--resume", cwd=tmp_path)
    line = refused("train.py", "--resume", "--overwrite", cwd=tmp_path)
    assert "--resume" in line and "--overwrite" in line


def test_resume_with_other_classes_is_refused(trained, pictures, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    more = ["--resume", "--steps", 40, "--dataset", tmp_path]
    assert "classes" in refused("train.py", *more, cwd=trained)


STOPPED = ["--steps", 300, "--batch-size", 4, "--eval-every", 7, "--sample-every", 100]
STOPPED += ["--checkpoint-every", 11, "--conv-dim", 4]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    call("train.py", *SMALL, "--dataset", pictures, *STOPPED, cwd=folder)
    return folder / "out"


@POSIX
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_stopped_run_resumes_bit_for_bit(whole, pictures, tmp_path, name, status):
    settings = [*SMALL, "--dataset", pictures, *STOPPED]
    number = getattr(signal, name)
    broken = tmp_path / "broken"
    broken.mkdir()
    process = start("train.py", *settings, cwd=broken)
    log = broken / "out" / "log.csv"
    while not log.exists() or log.read_text().count("\n") < 6:  # five rows: step 35
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    stopped = state(broken / "out")["step"]
    assert 22 <= stopped < 300
    assert "--resume" in err and f"step {stopped}" in err
    out, _ = call("train.py", "--resume", cwd=broken)
    assert state(broken / "out")["step"] == 300
    assert_same_run(whole, broken / "out")


def test_a_run_killed_in_its_first_steps_can_be_resumed(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--steps", 200, "--batch-size", 4]
    process = start("train.py", *settings, "--eval-every", 1, cwd=tmp_path)
    while not (tmp_path / "out" / "log.csv").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)
    assert state(tmp_path / "out")["step"] == 0
    call("train.py", "--resume", "--steps", 10, cwd=tmp_path)
    assert [row["step"] for row in rows(tmp_path / "out")] == [str(n) for n in range(1, 11)]


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--batch-size", 4]
    call("train.py", *settings, "--steps", 5, cwd=tmp_path)
    kept = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}
    more = ["--resume", "--steps", 400, "--learning-rate", 1e38, "--warmup-steps", 1]
    _, err = call("train.py", *more, cwd=tmp_path, status=2)
    line = err.strip().splitlines()[-1]
    assert "not finite at step 10;" in line and "LEARNING_RATE" in line  # when the log looks
    assert state(tmp_path / "out")["step"] == 5
    for path, content in kept.items():
        assert path.read_bytes() == content, path


@pytest.mark.parametrize("n, extra", [(4, []), (1, []), (3, ["--flip-share", 0])])
def test_every_size_runs(tmp_path, n, extra):
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", (30, 20), (50 * i, 0, 90)).save(folder / f"{i}.jpg")
    settings = [*SMALL, "--dataset", folder, "--batch-size", 8, "--steps", 6, *extra]
    call("train.py", *settings, cwd=tmp_path)
    (row,) = rows(tmp_path / "out")
    assert row["step"] == "6" and float(row["val_loss"]) > 0
    assert DiT.from_pretrained(tmp_path / "out").class_names == ["few"]


def test_parts_of_a_batch_add_up_to_its_gradient(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--steps", 20, "--batch-size", 7]
    for parts in (1, 3, 5):  # three parts of 3, 3 and 1 pictures; five are four, of 2, 2, 2 and 1
        run = ["--accumulate", parts, "--out-dir", f"out{parts}"]
        call("train.py", *settings, *run, cwd=tmp_path)
    whole, *others = (state(tmp_path / f"out{parts}")["model"] for parts in (1, 3, 5))
    for other in others:
        for name, tensor in whole.items():
            torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--steps", "0"], "STEPS"),
        (["--accumulate", "0"], "ACCUMULATE"),
        (["--batch-size", "0"], "BATCH_SIZE"),
        (["--learning-rate", "-1"], "LEARNING_RATE"),
        (["--learning-rate", "nan"], "LEARNING_RATE"),
        (["--learning-rate", "inf"], "LEARNING_RATE"),
        (["--patch-size", "5"], "PATCH_SIZE"),
        (["--heads", "3"], "HEADS"),
        (["--conv-dim", "-1"], "CONV_DIM"),
        (["--eval-every", "0"], "EVAL_EVERY"),
        (["--device", "abacus"], "abacus"),
        (["--steps", "many"], "steps"),
        (["--colour", "red"], "colour"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, flags, name):
    settings = "--dataset drawn --image-size 16 --patch-size 4 --dim 16 --depth 1 --heads 2".split()
    assert name in refused("train.py", *settings, *flags, cwd=tmp_path)
    assert not (tmp_path / "out").exists()


def test_every_constant_is_a_flag_with_its_comment(tmp_path):
    out, _ = call("train.py", "--help", cwd=tmp_path)
    names = ["DATASET", "IMAGE_SIZE", "PATCH_SIZE", "DIM", "DEPTH", "HEADS", "STEPS", "BATCH_SIZE"]
    names += ["LEARNING_RATE", "SEED", "DEVICE", "OUT_DIR", "EVAL_EVERY", "SAMPLE_EVERY"]
    assert set(names) | {"CHECKPOINT_EVERY"} <= set(train.SETTINGS)
    comments = common.read_comments(train.__file__)
    for name in train.SETTINGS:
        assert "--" + name.lower().replace("_", "-") in out
        section, comment = comments[name]
        assert f"{section}:" in out
        assert len(comment) > 10 and comment.split()[0] in out
    assert set(train.LAPTOP) <= set(train.SETTINGS)


def test_learning_rate_warms_up_stays_and_falls_to_zero(monkeypatch):
    settings = {"STEPS": 100, "WARMUP_STEPS": 8, "DECAY_SHARE": 0.4, "LEARNING_RATE": 2.0}
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    rates = [train.learning_rate_at(step) for step in range(1, 101)]
    assert rates[:8] == pytest.approx([2 * n / 8 for n in range(1, 9)])
    assert rates[8:61] == [2.0] * 53
    assert rates[60:] == pytest.approx([2 * (101 - step) / 40 for step in range(61, 101)])
    monkeypatch.setattr(train, "STEPS", 6)  # a short run: warmup is cut to its length
    assert max(train.learning_rate_at(step) for step in range(1, 7)) == 2.0


def test_the_average_follows_the_first_steps_and_then_remembers(monkeypatch):
    monkeypatch.setattr(train, "EMA_DECAY", 0.999)
    ema, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(ema.weight)
    torch.nn.init.ones_(model.weight)
    for step in range(1, 11):
        train.update_ema(ema, model, step)
    # Each step keeps (1 + step) / (10 + step) of what was; without warmup 0.99 would be left.
    kept = 1.0
    for step in range(1, 11):
        kept *= (1 + step) / (10 + step)
    assert ema.weight.item() == pytest.approx(1 - kept, abs=1e-6) and kept < 0.01
    torch.nn.init.zeros_(model.weight)
    train.update_ema(ema, model, 100000)
    assert ema.weight.item() == pytest.approx(0.999 * (1 - kept), abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_on_cuda_in_bf16_and_compiled(pictures, tmp_path):
    settings = [*SMALL, "--dataset", pictures, "--steps", 30, "--batch-size", 8, "--device", "cuda"]
    call("train.py", *settings, cwd=tmp_path)
    assert not any("_orig_mod" in name for name in state(tmp_path / "out")["model"])
    assert float(rows(tmp_path / "out")[-1]["train_loss"]) < 3


def far(folder):
    """Flags of a run that is long enough to do something to it, and waits for its fifth row."""
    return [*SMALL, "--dataset", folder, "--batch-size", 4, "--eval-every", 2]


def wait_for_rows(process, folder, count):
    while not (folder / "out" / "log.csv").exists() or len(rows(folder / "out")) < count:
        time.sleep(0.01)
        assert process.poll() is None


@POSIX
def test_the_first_ctrl_c_says_at_once_what_it_does(pictures, tmp_path):
    process = start("train.py", *far(pictures), "--steps", 10**6, cwd=tmp_path)
    wait_for_rows(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping after this step; press Ctrl-C again" in err
    assert "stopped at step" in err and "--resume" in err


@POSIX
def test_handlers_are_put_back_and_an_ignored_hangup_stays_ignored(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train.main([*map(str, far(pictures)), "--steps", "2"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    ignored = 'trap "" HUP; exec "$0" "$@"'  # as nohup does
    run = [*far(pictures), "--steps", 400, "--overwrite"]
    process = start("train.py", *run, cwd=tmp_path, shell=ignored)
    time.sleep(1)
    wait_for_rows(process, tmp_path, 5)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=100)
    assert process.returncode == 0 and state(tmp_path / "out")["step"] == 400


def test_a_closed_pipe_or_terminal_loses_nothing(pictures, tmp_path):
    process = start("train.py", *far(pictures), "--steps", 200, cwd=tmp_path)
    wait_for_rows(process, tmp_path, 3)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=100) == 0
    assert state(tmp_path / "out")["step"] == 200 and len(rows(tmp_path / "out")) == 100


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no locks on Windows")
def test_a_second_training_into_a_folder_is_refused(pictures, tmp_path):
    process = start("train.py", *far(pictures), "--steps", 10**6, cwd=tmp_path)
    wait_for_rows(process, tmp_path, 3)
    for more in ("--resume", "--overwrite"):
        flags = [] if more == "--resume" else far(pictures)
        line = refused("train.py", *flags, more, cwd=tmp_path)
        assert "another training" in line and "--out-dir" in line
    process.send_signal(signal.SIGKILL)
    process.communicate()
    call("train.py", "--resume", "--steps", state(tmp_path / "out")["step"] + 2, cwd=tmp_path)


def test_a_seed_may_be_a_date_or_larger(pictures, tmp_path):
    for seed in (20251125094300, 2**63 - 1):
        run = [*far(pictures), "--steps", 2, "--seed", seed, "--out-dir", seed]
        call("train.py", *run, cwd=tmp_path)
    call("train.py", "--resume", "--out-dir", seed, "--steps", 3, cwd=tmp_path)
    assert state(tmp_path / str(seed))["settings"]["SEED"] == 2**63 - 1
