"""Files of a run: written under another name, then renamed, so that they are whole at any time."""

import contextlib
import os
import shutil
import sys
import time

from support.settings import UserError, print_once

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

CHECKPOINT_FILES = ("config.json", "model.safetensors", "train_state.pt")  # the state last


def replace(source, target, needed=True):
    """Rename a file, in place of an old one. On Windows that fails while another program has the
    old one open, such as a virus scanner: then try for two seconds. If that does not help, raise
    UserError, or only warn of a file that is not needed, such as a log open in a spreadsheet."""
    for seconds in (0.1, 0.4, 1.5, 0):
        with contextlib.suppress(PermissionError):
            return source.replace(target)
        time.sleep(seconds)
    problem = f"{target} is open in another program, and stays as it was"
    if needed:
        raise UserError(problem)
    print_once(f"warning: {problem}", sys.stderr)


def write_beside(path, write, needed=True):
    """Call write(path) with a temporary name, then rename the file, so that a failure leaves an old
    one as it was. The folder is made if it is missing. needed: as for replace()."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".writing-{path.name}")
    try:
        write(beside)
        replace(beside, path, needed)
    finally:
        beside.unlink(missing_ok=True)  # on a full disk, half a file would keep it full


def save_picture(image, path, **options):
    """Write a PIL image as write_beside does; the suffix of the path is its format."""
    write_beside(path, lambda beside: image.save(beside, **options))


# One run a folder


@contextlib.contextmanager
def the_only_run(folder):
    """Keep other processes from training into the folder. Raises UserError if another process has
    it. A crash leaves no lock. Some network disks have no locks: there, a warning."""
    folder.mkdir(parents=True, exist_ok=True)
    # Each of torchrun's processes has a lock of its own.
    lock = FileLock(folder / f".lock{os.environ.get('RANK', 0)}", timeout=0)
    try:
        lock.acquire()
    except (Timeout, PermissionError) as error:
        raise UserError(f"another training or owner has {folder}: set another --out-dir") from error
    except (OSError, NotImplementedError) as error:
        print_once(f"warning: no lock keeps others from {folder}: {error}", sys.stderr)
    try:
        yield
    finally:
        lock.release()


# The log


def write_log(path, rows):
    """Write rows {column: number} as a CSV file, whole each time. Its columns are those of the
    newest row: you may have added one while the run was stopped."""
    lines = [rows[-1], *([row.get(column, "") for column in rows[-1]] for row in rows)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_beside(path, lambda beside: beside.write_text(text, "utf-8", newline="\n"), needed=False)


# The state


def save_checkpoint(out, ema, state):
    """Write CHECKPOINT_FILES to a staging folder and then move them into place, the state last, as
    it alone determines where --resume continues. Raises UserError if there is no room for them; the
    last state stays."""
    staging = out / ".writing"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        ema.save_pretrained(staging)
        torch.save(state, staging / "train_state.pt")
        for name in CHECKPOINT_FILES:
            replace(staging / name, out / name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot write to {out}, which keeps what it had: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_state(path):
    """The train_state.pt of a run, on the CPU. Raises UserError if it is missing, damaged, or lacks
    what every run has written."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("constants", "counts", "log", "settings", *state)}
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"--resume: {path} is missing, damaged, or no run's: {error}") from error


def resumed_settings(state, constants, flags, fixed, out):
    """The settings {name: value} with which a run goes on: its own, but for those that have been
    edited in train.py since, and for flags. fixed: names of what cannot change, or a UserError is
    raised. constants: those of train.py now."""
    saved = {name: value for name, value in state["settings"].items() if name in constants}
    edited = {n: value for n, value in constants.items() if value != state["constants"].get(n)}
    changed = {**saved, **edited, **flags, "OUT_DIR": str(out)}
    for name in fixed:
        if name in saved and changed[name] != saved[name]:
            raise UserError(f"--resume: {name} is {saved[name]} in {out}, not {changed[name]}")
    for name in sorted(n for n, value in changed.items() if value != saved.get(n)):
        print_once(f"from here on, {name} is {changed[name]!r}, not {saved.get(name)!r}")
    return changed


def restore_state(state, model, ema, optimizer, counts):
    """Load the weights and the optimizer's moments from a state. counts: pictures in each class.
    Raises UserError if the state is of other classes, of another network, or of other groups of
    weights."""
    if model.class_names != state["class_names"]:
        raise UserError("--resume: the classes of the data set are not those of the original run")
    if counts != state["counts"]:
        print_once("the pictures have changed since the run was saved: others are held out now")
    # Moments come from the state; rates, betas, weight decay and so on are those of train.py now.
    groups = zip(state["optimizer"]["param_groups"], optimizer.param_groups)
    state["optimizer"]["param_groups"] = [{**new, "params": old["params"]} for old, new in groups]
    load_into(model, state["model"], "--resume: train_state.pt does not fit model.py")
    load_into(ema, state["ema"], "--resume: train_state.pt does not fit model.py")
    ema.dataset = state.get("dataset", ema.dataset)  # also says what it was started from
    load_into(optimizer, state["optimizer"], "--resume: another optimizer, or other groups")


def load_into(target, weights, problem):
    """Load a state into a model, or into an optimizer. Raises UserError, which says what the
    problem is, if names or shapes are others."""
    try:
        target.load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{problem}: {str(error)[:200]}") from error
