"""A run goes on as if nothing had stopped it, or says in one line why it cannot."""

import os
import pickle
import random
import shutil
import signal
import time

from support import checkpoint
from support.settings import UserError

import pytest
import torch
from helpers import FEW, POSIX, assert_same_weights, call, files, refused, rows, start, state

import train
from model import DiT


def assert_same_run(a, b):
    """Bit for bit the same weights, losses and pictures; the clock's columns aside."""
    assert_same_weights(a, b)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    clock = ("images_per_second", "seconds")
    logs = [[{**row, **dict.fromkeys(clock)} for row in rows(out)] for out in (a, b)]
    assert logs[0] == logs[1] and logs[0]
    names = [sorted(path.name for path in out.rglob("*")) for out in (a, b)]
    assert names[0] == names[1]
    for path in (a / "samples").iterdir():
        assert path.read_bytes() == (b / "samples" / path.name).read_bytes()


def copied(trained, tmp_path):
    return shutil.copytree(trained / "out", tmp_path / "out")


# Whatever stops it

STEPS = 300
STOPPED = [*FEW, "--steps", STEPS, "--eval-every", 7, "--sample-every", 200]
STOPPED += ["--checkpoint-every", 11]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    call("train", *STOPPED, "--dataset", pictures, cwd=folder)
    return folder / "out"


def log_of(out):
    return rows(out) if (out / "log.csv").exists() else []


def watch(process, out, count):
    """Wait until the log of a run has so many rows; whenever it is read, it is whole."""
    log = []
    while len(log) < count:
        log = log_of(out)
        assert [row["step"] for row in log] == [str(7 * n) for n in range(1, len(log) + 1)]
        assert all(len(row) == 17 and None not in row.values() for row in log)
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()


@POSIX
def test_a_run_killed_again_and_again_ends_as_if_it_never_was(whole, pictures, tmp_path):
    out, waits = tmp_path / "out", random.Random(0)
    for name, status in (("SIGKILL", -9), ("SIGHUP", 129), ("SIGKILL", -9)):
        flags = ["--resume"] if out.exists() else [*STOPPED, "--dataset", pictures]
        process = start("train", *flags, cwd=tmp_path)
        watch(process, out, len(log_of(out)) + 2)
        assert "another training" in refused("train", "--resume", "--steps", 999, cwd=tmp_path)
        time.sleep(waits.uniform(0, 0.1))
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        assert state(out)["step"] < STEPS  # the signal met a run
        DiT.from_pretrained(out)  # whole at every instant, as sample.py needs it
    call("train", "--resume", cwd=tmp_path)
    assert_same_run(whole, out)


SHORT = [*FEW, "--steps", 12, "--eval-every", 2, "--sample-every", 4, "--checkpoint-every", 3]


@pytest.fixture(scope="module")
def short(pictures, tmp_path_factory):
    """The folder of a short run that nothing stopped."""
    folder = tmp_path_factory.mktemp("short")
    call("train", *SHORT, "--dataset", pictures, cwd=folder)
    return folder / "out"


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_saves_its_step(short, pictures, tmp_path, monkeypatch, name, status):
    update_ema = train.update_ema

    def stopped(ema, model, step):
        update_ema(ema, model, step)
        if step == 5:
            signal.raise_signal(getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", stopped)
        # A shell lets "pytest &" ignore Ctrl-C, and the run would do so, too.
        before = signal.signal(getattr(signal, name), signal.SIG_DFL)
        _, err = call("train", *SHORT, "--dataset", pictures, cwd=tmp_path, status=status)
        signal.signal(getattr(signal, name), before)
    assert "stopped at step 5" in err and err.endswith('--resume --out-dir="out"\n')
    assert state(tmp_path / "out")["step"] == 5
    call("train", "--resume", cwd=tmp_path)
    assert_same_run(short, tmp_path / "out")


@pytest.mark.parametrize("name", [*checkpoint.CHECKPOINT_FILES, "log.csv", "step-000008.png"])
def test_a_crash_between_any_two_files_is_made_up_for(short, pictures, tmp_path, monkeypatch, name):
    replace, seen = checkpoint.replace, []

    def crash(source, target, needed=True):
        seen.append(target.name)
        if target.name == name and (seen.count(name) == 3 or name.endswith("png")):
            raise KeyboardInterrupt
        replace(source, target, needed)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "replace", crash)
        call("train", *SHORT, "--dataset", pictures, cwd=tmp_path, status=130)
    DiT.from_pretrained(tmp_path / "out")
    assert 0 < state(tmp_path / "out")["step"] < 12
    call("train", "--resume", cwd=tmp_path)
    assert_same_run(short, tmp_path / "out")


@POSIX
@pytest.mark.parametrize("kilobytes", [32, 200])
def test_a_full_disk_leaves_the_last_checkpoint(trained, tmp_path, kilobytes):
    import resource  # of POSIX

    # 32 kB stop model.safetensors, 200 kB only train_state.pt.
    out = copied(trained, tmp_path)
    before = {name: (out / name).read_bytes() for name in checkpoint.CHECKPOINT_FILES}
    sizes = [len(content) for content in before.values()]
    assert 32 * 1024 < sizes[1] < 200 * 1024 < sizes[2]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, limits[1]))
    try:
        _, err = call("train", "--resume", "--steps", 40, cwd=tmp_path, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot write to out" in err.splitlines()[-1]
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not list(out.glob(".writing*"))  # half a file would keep the disk full
    call("train", "--resume", "--steps", 40, cwd=tmp_path)
    assert state(out)["step"] == 40


# States that are none


def test_a_truncated_state_is_named(trained, tmp_path):
    path = copied(trained, tmp_path) / "train_state.pt"
    content = path.read_bytes()
    for keep in (0, len(content) // 3, len(content) - 1):
        path.write_bytes(content[:keep])
        line = refused("train", "--resume", "--steps", 40, cwd=tmp_path)
        assert "train_state.pt is missing, damaged" in line


@pytest.mark.parametrize("content", [{}, [1, 2], {"settings": {}}, "words", 7])
def test_a_foreign_state_is_named(tmp_path, content):
    torch.save(content, tmp_path / "train_state.pt")
    with pytest.raises(UserError, match="train_state.pt is missing, damaged, or no run"):
        checkpoint.load_state(tmp_path / "train_state.pt")


class Bomb:
    """Unpickled by an unsafe reader, it leaves a file."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_that_would_run_code_does_not(trained, tmp_path):
    out = copied(trained, tmp_path)
    torch.save({"settings": Bomb()}, out / "train_state.pt")
    refused("train", "--resume", cwd=tmp_path)
    (out / "train_state.pt").write_bytes(pickle.dumps(Bomb()))
    refused("train", "--resume", cwd=tmp_path)
    (out / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused("sample", cwd=tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_state_of_another_version_of_the_code(trained, tmp_path):
    out = copied(trained, tmp_path)
    old = state(out)
    del old["settings"]["GRAD_CLIP"]  # a constant that came later has its default
    torch.save(old, out / "train_state.pt")
    call("train", "--resume", "--steps", 32, cwd=tmp_path)
    assert state(out)["settings"]["GRAD_CLIP"] == train.GRAD_CLIP
    old["model"]["blocks.0.mlp.7.weight"] = old["model"].pop("blocks.0.mlp.0.weight")
    torch.save(old, out / "train_state.pt")
    line = refused("train", "--resume", "--steps", 40, cwd=tmp_path)
    assert "train_state.pt does not fit model.py" in line and "blocks.0.mlp" in line


def test_resume_without_a_run(tmp_path):
    assert "train_state.pt is missing" in refused("train", "--resume", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    line = refused("train", "--resume", "--overwrite", cwd=tmp_path)
    assert "--resume" in line and "--overwrite" in line


# What may change, and what may not


UNCHANGEABLE = {
    "--dim 32": "DIM is 16 in out, not 32",
    "--conv-dim 8": "CONV_DIM is 0 in out, not 8",
    "--seed 7": "SEED is 0 in out, not 7",
    "--preset laptop": "not 96",
    "--dataset drawn": "classes of the data set",
}


@pytest.mark.parametrize("flags, words", UNCHANGEABLE.items())
def test_what_a_run_cannot_go_on_with_is_refused_by_name(trained, tmp_path, flags, words):
    out = copied(trained, tmp_path)
    before = files(out)
    assert words in refused("train", "--resume", "--steps", 40, *flags.split(), cwd=tmp_path)
    assert files(out) == before


def test_what_may_change_on_resume_does(trained, tmp_path):
    out = copied(trained, tmp_path)
    (out / "log.csv").unlink()  # its rows are in the state, too
    more = ["--steps", 34, "--learning-rate", 3e-4, "--eval-every", 2, "--checkpoint-every", 3]
    more += ["--cfg-scale", 5]
    said, err = call("train", "--resume", *more, "--dim", 16, "--out-dir", "out/", cwd=tmp_path)
    assert DiT.from_pretrained(out).cfg_scale == 5
    assert err.split("%")[0].strip() == "88"  # the bar goes on from 30 of 34 steps
    assert [row["step"] for row in rows(out)] == ["10", "20", "30", "32", "34"]
    settings = state(out)["settings"]
    assert settings["LEARNING_RATE"] == 3e-4 and settings["STEPS"] == 34
    assert "from here on, STEPS is 34, not 30\n" in said
    assert said.count("from here on") == 5  # not DIM and OUT_DIR, as they were


def test_a_held_out_loss_above_its_best_is_said(trained, tmp_path):
    out = shutil.copytree(trained / "out", tmp_path / "out")
    said, _ = call("train", "--resume", "--steps", 40, cwd=tmp_path)
    assert "held out rises" not in said
    shutil.copytree(trained / "out", out, dirs_exist_ok=True)
    kept = torch.load(out / "train_state.pt")
    kept["log"][-1]["val_loss"] /= 10  # as if it had been better until now
    torch.save(kept, out / "train_state.pt")
    said, _ = call("train", "--resume", "--steps", 40, "--eval-every", 5, cwd=tmp_path)
    assert said.count("held out rises: more steps make copies") == 1


def test_pictures_that_have_changed_are_said(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "mine")
    call("train", *FEW, "--dataset", "mine", "--steps", 2, cwd=tmp_path)
    said, _ = call("train", "--resume", "--steps", 3, cwd=tmp_path)
    assert "pictures have changed" not in said
    folder = next((tmp_path / "mine").iterdir())
    shutil.copy(next(folder.iterdir()), folder / "more.png")
    said, _ = call("train", "--resume", "--steps", 4, cwd=tmp_path)
    assert "the pictures have changed since the run was saved" in said


def test_a_finished_run_says_so(trained, tmp_path):
    out = copied(trained, tmp_path)
    before = files(out)
    said, _ = call("train", "--resume", cwd=tmp_path)
    assert "out is finished" in said and "--steps" in said
    assert files(out) == before


# An optimizer of one's own

ADAMW = torch.optim.AdamW


def two_groups(parameters, lr, **options):
    """AdamW as an edited train.py may have it: vectors learn at a hundredth of the rate."""
    weights = list(parameters)
    matrices = {"params": [weight for weight in weights if weight.ndim > 1]}
    vectors = {"params": [weight for weight in weights if weight.ndim < 2], "lr": lr / 100}
    return ADAMW([matrices, vectors], lr=lr, **options)


def test_other_groups_of_weights_are_refused(trained, tmp_path, monkeypatch):
    copied(trained, tmp_path)
    monkeypatch.setattr(torch.optim, "AdamW", two_groups)
    line = refused("train", "--resume", "--steps", 40, cwd=tmp_path)
    assert "--resume: another optimizer, or other groups: " in line


def test_the_moments_of_another_optimizer_are_refused(pictures, tmp_path, monkeypatch):
    def sgd(weights, lr, **_):
        return torch.optim.SGD(weights, lr, momentum=0.9)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", sgd)
        call("train", *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    line = refused("train", "--resume", "--steps", 3, cwd=tmp_path)
    assert "--resume: another optimizer, or other groups: 'step'" in line


def test_the_schedule_is_a_factor_on_the_rate_of_each_group(pictures, tmp_path, monkeypatch):
    rates = []

    def note(optimizer, *arguments):
        rates.append([group["lr"] for group in optimizer.param_groups])

    def recorded(parameters, lr, **options):
        optimizer = two_groups(parameters, lr, **options)
        optimizer.register_step_pre_hook(note)
        return optimizer

    monkeypatch.setattr(torch.optim, "AdamW", recorded)
    run = [*FEW, "--dataset", pictures, "--warmup-steps", 4, "--learning-rate", 0.01]
    call("train", *run, "--steps", 40, "--decay-share", 0.5, cwd=tmp_path)
    factors = [n / 4 for n in range(1, 5)] + [1] * 17 + [n / 20 for n in range(19, 0, -1)]
    assert len(rates) == 40
    for (matrices, vectors), factor in zip(rates, factors):
        assert matrices == pytest.approx(0.01 * factor)
        assert vectors == pytest.approx(0.0001 * factor)
    rates.clear()
    more = ["--steps", 42, "--decay-share", 0, "--learning-rate", 0.02]
    call("train", "--resume", *more, cwd=tmp_path)
    assert rates == [[0.02, 0.0002]] * 2


@pytest.mark.parametrize("clip", [0.01, 0])
def test_the_gradient_is_clipped_and_zero_is_no_limit(pictures, tmp_path, monkeypatch, clip):
    norms = []

    def note(optimizer, *_):
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        norms.append(torch.cat([w.grad.flatten() for w in weights]).norm().item())

    def recorded(*arguments, **options):
        optimizer = ADAMW(*arguments, **options)
        optimizer.register_step_pre_hook(note)
        return optimizer

    monkeypatch.setattr(torch.optim, "AdamW", recorded)
    run = [*FEW, "--dataset", pictures, "--steps", 3, "--grad-clip", clip]
    call("train", *run, cwd=tmp_path)
    assert len(norms) == 3
    assert max(norms) == pytest.approx(0.01, rel=1e-3) if clip else min(norms) > 0.01


def test_a_loss_that_draws_at_random_resumes_bit_for_bit(pictures, tmp_path, monkeypatch):
    def own(model, x, y, t, noise):
        loss = train.F.mse_loss(model(train.F.dropout(x), t, y), noise - x)
        return loss * (1 + torch.rand(()))

    monkeypatch.setattr(train, "rectified_flow_loss", own)
    run = [*FEW, "--dataset", pictures, "--warmup-steps", 1, "--decay-share", 0]
    call("train", *run, "--steps", 9, "--out-dir", "whole", cwd=tmp_path)
    call("train", *run, "--steps", 5, cwd=tmp_path)
    torch.manual_seed(77)
    call("train", "--resume", "--steps", 9, cwd=tmp_path)
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
