"""What the scripts need around the method: flags, errors in one line, signals and files.

Nothing here is about diffusion. To understand nanoDiT, read model.py, train.py and sample.py.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import pickle
import signal
import sys
import threading
import tokenize
import zipfile
import zlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.logging import set_verbosity_error
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import DiT, UserError

# What torch.load and the zip format raise for a file that is not what it should be.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)

# CUDA has an exception for this; MPS and CPUs raise a RuntimeError that says so.
LACK_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


# Errors


def run_command(main, if_out_of_memory="close other programs"):
    """Call main(). A UserError and a lack of memory become one line on stderr and exit status 2;
    any other exception is a bug, and keeps its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    set_verbosity_error()  # the Hub's library would add warnings of its own
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        exit_with(str(error))
    except MemoryError:
        exit_with(f"out of memory: {if_out_of_memory}")
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in LACK_OF_MEMORY):
            raise
        exit_with(f"out of memory: {if_out_of_memory} ({error})")


def exit_with(message):
    """End the process with status 2 and the message, in one line, on stderr."""
    line = " ".join(message.split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


# Flags


def new_parser(description, **options):
    """An argument parser whose errors are one line, as it has no usage to print before them."""
    return argparse.ArgumentParser(
        description=description,
        usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def number(text):
    """The number that a flag gives: an int where it is whole, 1e4 too, else a float."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
    return int(value) if value.is_integer() else value


def finite_number(text):
    """The type of a flag: any float but nan and the infinities."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def whole_number(lowest, highest=2**63 - 1):
    """The type of a flag: whole numbers in that range."""

    def whole_number(text):
        value = int(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{value} is not from {lowest} to {highest}")
        return value

    return whole_number


def add_setting_flags(parser, settings, source):
    """A flag for each setting {constant: value}, in the groups, and with the comments as help
    texts, that the file `source` has. BATCH_SIZE becomes --batch-size."""
    comments = read_comments(source)
    groups = {}
    for name, value in settings.items():
        section, comment = comments.get(name, ("more settings", ""))
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        flag = "--" + name.lower().replace("_", "-")
        text = f"{comment} (default: {value})".replace("%", "%%")  # % is special to argparse
        if isinstance(value, bool):
            action = argparse.BooleanOptionalAction  # --name and --no-name
            groups[section].add_argument(flag, dest=name, action=action, help=text)
        else:
            kind = str if isinstance(value, str) else number
            groups[section].add_argument(flag, dest=name, type=kind, metavar="", help=text)


def read_comments(source):
    """{name: (section, comment)} of the assignments in a Python file. A section begins with a
    comment such as "# --- data ---"; the comment of an assignment is the one behind it."""
    comments, section, name = {}, "settings", ""
    with tokenize.open(source) as file:
        for token in tokenize.generate_tokens(file.readline):
            starts_line = token.start[1] == 0
            if token.type == tokenize.COMMENT and token.string.startswith("# --- "):
                section = token.string.strip("# -")
            elif token.type == tokenize.COMMENT and not starts_line:
                comments[name] = section, token.string.lstrip("# ")
            elif token.type == tokenize.NAME and starts_line:
                name = token.string
                comments.setdefault(name, (section, ""))
    return comments


def check_number(settings, name, lowest=-math.inf, highest=math.inf, whole=False):
    """Raise UserError, with the name, unless the setting is a finite number in that range. Where it
    has to be whole, 1e4 becomes 10000. What is no setting, such as a tuple or None, may be."""
    value = settings.get(name)
    if not isinstance(value, (bool, int, float, str)):
        return
    kind = "a whole number" if whole else "a finite number"
    limits = ""
    if lowest > -math.inf:
        limits = f", at least {lowest}" if highest == math.inf else f" from {lowest} to {highest}"
    fits = not isinstance(value, str) and math.isfinite(value) and lowest <= value <= highest
    if not fits or (whole and value != int(value)):
        raise UserError(f"{name} is {value!r}: it must be {kind}{limits}")
    if whole:
        settings[name] = int(value)


# Signals


@contextlib.contextmanager
def stop_signals():
    """Yield a list in which Ctrl-C, SIGTERM and SIGHUP are noted, so that a training step can end
    and be saved before the run stops. A second Ctrl-C ends the run at once."""
    caught = []
    alone = "WORLD_SIZE" not in os.environ  # torchrun passes signals on, so that one comes twice

    def note(number, frame):
        if caught and number == signal.SIGINT and alone:
            raise KeyboardInterrupt
        if not caught:
            os.write(2, b"\nstopping after this step; Ctrl-C stops at once, without saving it\n")
        caught.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):  # not on Windows
        numbers.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python delivers signals to the main thread alone
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_summary(model, images, val, flops, device):
    """What will be trained: the classes, how many pictures, and what it takes."""
    names = model.class_names
    if len(names) > 8:
        names = [*names[:3], "...", *names[-3:]]
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{model.num_classes} classes, {len(images)} pictures, {val.sum()} of them held out")
    print(f"classes: {', '.join(names)}")
    print(
        f"{weights / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOP an image, {device}", flush=True
    )


# Files and checkpoints


def make_folder(folder):
    """Make a folder, with those above it, unless it is there. Raises UserError if it cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error}") from error


def save_picture(image, path, **options):
    """Write a PIL image under another name, then rename it: a failure leaves what was there.
    Raises UserError if it cannot be written."""
    beside = path.with_name(f".writing-{path.name}")
    try:
        image.save(beside, path.suffix[1:], **options)
        beside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def start_log(path, header, last_step):
    """Write a log anew: its header, and of the rows that are there those up to last_step. Later
    ones are of steps that were lost, and will be run again."""
    rows = []
    try:
        if last_step > 0 and path.exists():
            for line in path.read_text().splitlines(keepends=True):
                step = line.split(",")[0]
                if line.endswith("\n") and step.isdigit() and int(step) <= last_step:
                    rows.append(line)
        beside = path.with_name(f".writing-{path.name}")
        beside.write_text(header + "".join(rows))
        beside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def add_row(path, row):
    """Append a line to a log. Raises UserError if it cannot be written."""
    try:
        with open(path, "a") as log:
            log.write(row + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def load_model(checkpoint):
    """The model in a folder, such as "out", or of a Hub id, such as "you/butterflies", ready to
    sample from. Raises UserError if there is none, or its files are damaged."""
    folder = Path(checkpoint)
    if not folder.is_dir() and "/" in str(checkpoint):
        try:
            files = ["config.json", "model.safetensors"]
            folder = Path(snapshot_download(str(checkpoint), allow_patterns=files))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(f"no model at {checkpoint}: {error}") from error
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    if not config_file.is_file():
        raise UserError(f"no model in {checkpoint}: `python train.py` makes one, in out")

    try:
        config = json.loads(config_file.read_text("utf-8"))
        inspect.signature(DiT).bind(**config)  # a TypeError if the names are not DiT's
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{config_file} is not of a nanoDiT model: {error}") from error
    try:
        model = DiT(**config)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error

    try:
        model.load_state_dict(load_file(weights_file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {weights_file}: {error}") from error
    except RuntimeError as error:  # of load_state_dict: other names or shapes
        raise UserError(f"{weights_file} does not fit config.json: {str(error)[:200]}") from error
    return model.eval()


def load_state(path):
    """The train_state.pt of a run, on the CPU. Raises UserError if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not look at checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state["step"], int) or not isinstance(state["settings"], dict):
            raise ValueError("it holds something else")
    except UNREADABLE as error:
        raise UserError(
            f"--resume: {path} is missing, damaged, or no state of a run: leave out --resume, or "
            f"name another --out-dir ({error})"
        ) from error
    return state


def restore(state, model, ema, optimizer):
    """Load the weights and the optimizer's moments from a state. Raises UserError if they are of
    other classes or of another network."""
    if model.class_names != state["class_names"]:
        raise UserError("--resume: the data set has other classes than the run was started with")
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
    except UNREADABLE as error:
        message = f"--resume: train_state.pt does not fit model.py: {str(error)[:200]}"
        raise UserError(message) from error


def start_from(checkpoint, model):
    """Give `model` the weights of a trained one; where the classes differ, the class embeddings
    stay random. Raises UserError if the sizes differ."""
    trained = load_model(checkpoint)
    if trained.class_names != model.class_names:
        print(f"{checkpoint} has other classes: the class embeddings start anew")
        trained.class_embedding = model.class_embedding
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        message = f"--init-from {checkpoint} needs the sizes that it was trained with"
        raise UserError(f"{message}: {str(error)[:200]}") from error
