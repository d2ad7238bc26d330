"""Everything that the scripts need besides the method: flags, one-line errors, signals, files.

Nothing here is about diffusion. To understand nanoDiT, read model.py, train.py and sample.py.
"""

import argparse
import contextlib
import copy
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import threading
import time
import tokenize
import unicodedata
import zipfile
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError  # of whichever library it makes its requests with
from huggingface_hub.utils.logging import set_verbosity_error
from safetensors import SafetensorError
from safetensors.torch import load_model as load_weights
from torch.utils.flop_counter import FlopCounterMode

from model import DiT, UserError, check_sizes

# What zipfile and torch.load raise when a file is not what it should be.
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
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

DEVICES_OF_WINDOWS = ("AUX", "CON", "NUL", "PRN")  # which no file may be called there

GIF_SIZE = 560  # longest side of an animation in pixels, which keeps it below about 3 MB

CHECKPOINT_FILES = ("config.json", "model.safetensors", "train_state.pt")

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


# Errors


def run_command(main, if_out_of_memory="close other programs"):
    """Call main(). A UserError, or running out of memory, becomes one line on stderr and exit
    status 2; any other exception is a bug, and keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal cannot show
    sys.stdout, sys.stderr = QuietStream(sys.stdout), QuietStream(sys.stderr)
    set_verbosity_error()  # huggingface_hub would print warnings of its own
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        exit_with_error(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        exit_with_error(f"out of memory: {if_out_of_memory} ({str(error) or 'MemoryError'})")


def is_out_of_memory(error):
    """Whether an exception says that memory ran out. CUDA raises a subclass of RuntimeError, MPS
    and CPUs a plain one: its text is what they share."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


class QuietStream:
    """A text stream that falls silent when its pipe or terminal is gone, instead of ending a
    training with an exception."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            return self.stream.write(text)
        self.fall_silent()
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            return self.stream.flush()
        self.fall_silent()

    def fall_silent(self):
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def exit_with_error(message):
    """Print the message in one line on stderr, and exit with status 2."""
    line = " ".join(message.split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


def print_once(text, file=None):
    """Print, but only in the first of several processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=file or sys.stdout, flush=True)


# Flags


def new_parser(description, **options):
    """An argument parser that reports errors in one line, without the usage text."""
    return argparse.ArgumentParser(
        description=description,
        usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def parse_number(text):
    """Parse a flag: an int if the value is whole (even 1e4), otherwise a float."""
    with contextlib.suppress(ValueError):
        return int(text)
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None
    return int(value) if value.is_integer() else value


def parse_finite(text):
    """Parse a flag: a float that is neither infinite nor nan."""
    value = float(parse_number(text))
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def parse_share(text):
    """Parse a flag: a number from 0 to 1."""
    value = parse_finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def int_in_range(lowest, highest=2**63 - 1):
    """A function that parses a flag: an int from lowest to highest."""

    def parse_int(text):
        value = parse_number(text)
        if not isinstance(value, int) or not lowest <= value <= highest:
            message = f"{text} is not a whole number from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(message)
        return value

    return parse_int


def parse_png(text):
    """Parse a flag: the path of a .png file, which need not exist."""
    path = Path(text)
    if path.suffix.lower() != ".png" or os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{text} is not the name of a .png file")
    return path


def add_setting_flags(parser, settings, source_file):
    """Add a flag for each of the settings {name: default}: --batch-size for BATCH_SIZE. Groups and
    help texts are the sections and the comments of the file that assigns them. Raises UserError for
    a name that is taken."""
    comments = read_comments(source_file)
    groups = {}
    for name, default in settings.items():
        section, comment = comments.get(name, ("more settings", ""))
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        flag = "--" + name.lower().replace("_", "-")
        text = f"{comment} (default: {default})".replace("%", "%%")  # % is special to argparse
        options = {"dest": name, "help": text}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction  # --name and --no-name
        else:
            options |= {"type": str if isinstance(default, str) else parse_number, "metavar": ""}
        try:
            groups[section].add_argument(flag, **options)
        except argparse.ArgumentError as error:
            raise UserError(f"rename the constant {name}: {flag} is already a flag") from error


def read_comments(source_file):
    """{name: (section, comment)} of the assignments in a Python file. A section begins with a
    comment such as "# --- data ---"; the comment is the one at the end of the assignment."""
    comments, section, name = {}, "settings", None
    with tokenize.open(source_file) as file:
        for token in tokenize.generate_tokens(file.readline):
            starts_line = token.start[1] == 0
            if token.type == tokenize.NAME and starts_line:
                name = token.string
                comments[name] = section, ""
            elif token.type == tokenize.COMMENT and name:
                comments[name] = section, token.string.removeprefix("#").strip()
            elif token.type == tokenize.COMMENT and token.string.startswith("# --- "):
                section = token.string.strip("# -")
            elif token.type == tokenize.NEWLINE:  # the end of a statement
                name = None
    return comments


def check_number(settings, name, lowest=-math.inf, highest=math.inf, whole=False):
    """Raise UserError, with the name, unless the setting is a finite number in that range. If it
    must be whole, 1e4 becomes 10000. What cannot be a setting, such as None, is not checked."""
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


def check_choice(settings, name, choices):
    """Raise UserError, with the name, unless the setting is one of the choices."""
    if settings.get(name) not in choices:
        listed = ", ".join(choices)
        raise UserError(f"{name} is {settings.get(name)!r}: choose one of {listed}")


def check_settings(values):
    """Raise UserError, with the constant's name, for a value that no training could run with.
    values: the globals of train.py."""
    sizes = ("IMAGE_SIZE", "PATCH_SIZE", "DIM", "DEPTH", "HEADS", "CONV_DIM")
    intervals = ("EVAL_EVERY", "SAMPLE_EVERY", "CHECKPOINT_EVERY", "LOG_EVERY")
    for name in (*sizes, *intervals, "STEPS", "BATCH_SIZE", "ACCUMULATE"):
        lowest = 0 if name == "CONV_DIM" else 1
        check_number(values, name, lowest, whole=True)
    check_sizes(*(values[name] for name in sizes))
    check_number(values, "WARMUP_STEPS", lowest=0, whole=True)
    check_number(values, "SEED", lowest=0, highest=2**63 - 1, whole=True)
    for name in ("FLIP_SHARE", "LABEL_DROP", "DECAY_SHARE", "EMA_DECAY"):
        check_number(values, name, lowest=0, highest=1)
    for name in ("LEARNING_RATE", "GRAD_CLIP", "T_STD"):
        check_number(values, name, lowest=0)
    check_number(values, "T_MEAN")
    check_number(values, "CFG_SCALE")
    check_choice(values, "PRECISION", ("auto", "bf16", "fp32"))
    check_choice(values, "COMPILE", ("auto", "on", "off"))


def check_preset(preset, settings):
    """Raise UserError if a preset changes what is no setting, as after renaming a constant."""
    unknown = preset.keys() - settings.keys()
    if unknown:
        listed = ", ".join(sorted(unknown))
        raise UserError(f"the preset sets {listed}, which train.py does not have as a constant")


def expand_home(values, name):
    """Replace ~ at the start of a path by the user's folder; a shell does not where = precedes."""
    values[name] = os.path.expanduser(values[name])


def print_kept_settings(saved, values, flags):
    """Say which settings of a resumed run differ from the constants, which it does not take."""
    kept = [
        f"{name} {value}"
        for name, value in saved.items()
        if name not in (*flags, "OUT_DIR") and value != values[name]
    ]
    if kept:
        print_once(f"settings of the run, not of train.py: {', '.join(kept)}")


# Devices, processes, compilation and signals


def pick_device(name):
    """The torch device with the given name; "auto" is cuda, else mps, else cpu. Raises UserError if
    this machine does not have it."""
    counts = {"cuda": torch.cuda.device_count(), "mps": torch.mps.device_count(), "cpu": 1}
    if name == "auto":
        if counts["cuda"] > 0:
            name = "cuda"
        elif counts["mps"] > 0:
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'DEVICE "{name}" is unknown: choose auto, cuda, mps or cpu') from error
    if (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(f'DEVICE "{name}" is not available here: choose another, or auto')
    return device


def to_device(tensors, device):
    """Tensors of the CPU on the device. From pinned memory, a GPU copies them while it computes."""
    if device.type == "cuda":
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]


def computes_in_bf16(device):
    """Whether the device has instructions for bfloat16, which is slow where it is imitated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        features = torch.cpu.get_capabilities()
        return features.get("avx512_bf16", False) or features.get("amx_bf16", False)
    older_torch = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return older_torch()


def uses_bf16(device, precision):
    """Whether "bf16", "fp32" or "auto" means bfloat16 on this device."""
    return precision == "bf16" or (precision == "auto" and computes_in_bf16(device))


def autocast(device, precision="auto"):
    """A context in which matrix products and attention run in bfloat16, if that is the precision,
    while the weights stay float32. "auto" is bf16 where the device computes in it, else fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


def start_process(device, batch_size):
    """Join the other processes that torchrun has started, if it has. Returns this process's device,
    its rank and their number. Raises UserError if that exceeds the pictures in a batch."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > batch_size:
        raise UserError(f"BATCH_SIZE {batch_size} is too small for {world_size} processes")
    if world_size > 1:
        backend = "gloo"
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            gpus = torch.cuda.device_count()
            if device.index >= gpus:
                raise UserError(f"more processes than GPUs ({gpus}) here: lower --nproc_per_node")
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"  # train.py reduces tensors on the CPU, too
        dist.init_process_group(backend)
    return device, rank, world_size


def flops_per_image(new_model, class_names, loss):
    """Floating-point operations of one picture's forward and backward pass, counted as far as that
    goes without data. new_model and loss are those of train.py."""
    batch_size = 2  # a batch norm needs two
    with FlopCounterMode(display=False) as counter, torch.device("meta"):  # shapes only
        try:
            model = new_model(class_names)
            x = torch.zeros(batch_size, 3, model.image_size, model.image_size)
            y = torch.zeros(batch_size, dtype=torch.long)
            loss(model, x, y, torch.ones(batch_size), x).backward()
        except RuntimeError as error:
            # A model or a loss that looks at values, as .item() does, can train, but not here.
            if "meta" not in str(error).lower():
                raise
    return counter.get_total_flops() // batch_size


def compiling_pays(device, run_flops):
    """Whether a run of so many floating-point operations is worth the wait for torch.compile: on
    CUDA always, on a CPU from some twenty minutes on, at 50 GFLOP/s a core."""
    minutes = run_flops / (50e9 * torch.get_num_threads()) / 60
    return device.type == "cuda" or (device.type == "cpu" and minutes > 20)


def compile_model(model, loss, uneven):
    """Let torch.compile translate the model's forward and backward pass, and say how long that
    took. If it cannot, there is a warning, and the model stays as it is.

    loss: a function that calls the model and returns its loss, as compilation happens only then.
    uneven: whether batches will differ in size; then the code is made for any size.
    """
    begin = time.perf_counter()
    buffers = copy.deepcopy(dict(model.named_buffers()))  # a batch norm would count this call
    try:
        model.forward = torch.compile(model.forward, dynamic=uneven or None)
        loss().backward()
    except RuntimeError as error:  # an error in the model's own code comes again, uncompiled
        vars(model).pop("forward", None)  # what is left is the method of its class
        reason = " ".join(str(error).split())[:200]
        message = "torch.compile failed, and the run goes on without it; --compile off avoids this"
        print_once(f"warning: {message} ({reason})", file=sys.stderr)
    else:
        print_once(f"compiled in {time.perf_counter() - begin:.0f} seconds")
    model.load_state_dict(buffers, strict=False)
    model.zero_grad()


@contextlib.contextmanager
def stop_signals():
    """Yield a list in which Ctrl-C, SIGTERM and SIGHUP are noted, so that a training step can end
    and be saved before the run stops. A second Ctrl-C stops it at once, except under torchrun."""
    received = []
    torchrun = "WORLD_SIZE" in os.environ  # it passes signals on, so that one Ctrl-C comes twice

    def on_signal(number, frame):
        again = len(received) > 0
        received.append(number)
        if not again:
            then = "" if torchrun else "; press Ctrl-C again to stop now, without saving"
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\nstopping after this step{then}\n".encode())
        elif number == signal.SIGINT and not torchrun:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):  # not on Windows
        numbers.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python delivers signals to the main thread alone
    old_handlers = {}
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            old_handlers[number] = signal.signal(number, on_signal)
    try:
        yield received
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


# Files and checkpoints


def lock_folder(folder):
    """Keep other processes from training into the folder, until unlock_folder() or the end of this
    one: the lock is the operating system's, so a crash leaves none. Raises UserError if another
    process has it. Does nothing on Windows."""
    global lock_file
    if os.name == "nt":
        return
    import fcntl

    try:
        # Not the folder itself, which network file systems would lock for this machine alone.
        file = open(folder / ".lock", "w")  # noqa: SIM115  # stays open
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        message = f"another training is writing to {folder}: wait for it, or name another --out-dir"
        raise UserError(message) from error
    except OSError:
        pass  # a network file system without locks
    lock_file = file


def unlock_folder():
    """Give the lock of lock_folder() back, if there is one."""
    global lock_file
    if lock_file is not None:
        with contextlib.suppress(OSError):
            os.unlink(lock_file.name)
        lock_file.close()
        lock_file = None


lock_file = None  # open as long as its folder is locked


def print_summary(model, val_mask, flops, device, precision):
    """Say what will be trained: classes, pictures, size of the network, cost and device."""
    names = [f"{class_id} {name}" for class_id, name in enumerate(model.class_names)]
    if len(names) > 8:
        names = [*names[:3], "...", *names[-3:]]
    parameters = sum(weight.numel() for weight in model.parameters())
    print(
        f"{model.num_classes} classes, {len(val_mask)} pictures, {val_mask.sum()} of them held out"
    )
    if not val_mask.any():
        print("too few to hold any out: the held-out loss is of pictures that are trained on")
    print(f"classes: {', '.join(names)}")
    print(f"{parameters / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOP per image", end=", ")
    print(f"on {device} in {'bf16' if uses_bf16(device, precision) else 'fp32'}")
    sys.stdout.flush()  # a log file should show it at once


def make_folder(folder):
    """Make a folder and its parents, if missing. Raises UserError on failure, or if nothing can be
    written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to the folder {folder}: it is read-only")


def delete_files(paths):
    """Delete files. Raises UserError on failure."""
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"cannot delete {path}, which would be overwritten: {error}") from error


def replace(source, target):
    """Rename a file, in place of an old one. On Windows that fails while another program has the
    old one open, such as a viewer or a virus scanner: then try again for two seconds."""
    for seconds in (0.1, 0.4, 1.5):
        with contextlib.suppress(PermissionError):
            return source.replace(target)
        time.sleep(seconds)
    return source.replace(target)


def raise_unless_held(error, message, path, required, then):
    """Raise UserError with the message, because of an error in writing. If the path is not required
    and another program may hold it, there is only a warning, which says what happens then."""
    if required or not isinstance(error, PermissionError):
        raise UserError(f"{message}: {error}") from error
    print(f"warning: is {path} open in another program? {then} ({error})", file=sys.stderr)


def write_beside(path, write, required=True):
    """Call write(path) with a temporary name, then rename the file, so that a failure leaves the
    old one in place. Raises UserError on failure; if the file is not required, there is only a
    warning where another program holds the old one."""
    beside = path.with_name(f".writing-{path.name}")
    try:
        write(beside)
        replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()  # on a full disk, half a file would keep it full
        raise_unless_held(error, f"cannot write {path}", path, required, "It stays as it was.")


def save_picture(image, path, required=True, **options):
    """Write a PIL image as write_beside does; the suffix of the path is its format."""
    write_beside(path, lambda beside: image.save(beside, path.suffix[1:], **options), required)


def save_gif(frames, path):
    """Write PIL images as an animation, whose last frame stays for a while."""
    small = []
    for frame in frames:
        # Few colours and a limited size: noise does not compress.
        frame.thumbnail((GIF_SIZE, GIF_SIZE))
        small.append(frame.quantize(64))
    durations = [80] * (len(small) - 1) + [2000]  # milliseconds
    save_picture(small[0], path, save_all=True, append_images=small[1:], duration=durations, loop=0)


def folder_names(class_names):
    """A safe and unique folder name for each class: a model from elsewhere may have a class called
    ../.. or two that differ only in what a file name cannot hold."""
    folders, taken = [], set()
    for class_id, name in enumerate(class_names):
        name = unicodedata.normalize("NFC", name)
        folder = re.sub(r"[^\w ,.()&'+-]|^\.", "_", name)[:60].rstrip(" .")  # as Windows does
        if folder != name or not name or name.upper() in DEVICES_OF_WINDOWS:
            folder = f"{folder}-{class_id}"
        while folder.casefold() in taken:
            folder += "_"
        taken.add(folder.casefold())
        folders.append(folder)
    return folders


def find_class(name, class_names):
    """The id of a class by its name, in any Unicode normal form. Case is ignored, unless names
    differ in nothing else. Raises UserError if there is no such class, or several."""

    def normal(text):
        return unicodedata.normalize("NFC", text)

    def caseless(text):
        return normal(normal(text).casefold())

    exact = [i for i, known in enumerate(class_names) if normal(known) == normal(name)]
    similar = [i for i, known in enumerate(class_names) if caseless(known) == caseless(name)]
    matches = exact if len(exact) == 1 else similar
    if not matches:
        raise UserError(f'--class-name "{name}" is not a class of this model: --list-classes')
    if len(matches) > 1:
        listed = " or ".join(f'"{class_names[match]}" (--class-id {match})' for match in matches)
        raise UserError(f'--class-name "{name}" may mean {listed}')
    return matches[0]


def renew_noise(z, t, v, dt, eta, generator):
    """Replace part of the noise in z_t by fresh noise, after an Euler step from t + dt to t by the
    velocity v. This also washes out errors of earlier steps.

    eta = 0 keeps all noise. eta = 1 replaces as much as going from t to t + dt would, from data
    towards noise: the ancestral sampling of DDPM. Song et al. 2020 (DDIM), arXiv 2010.02502.
    """
    eps = z + (1 - t) * v  # as z = (1-t) x + t eps, and v = eps - x
    correlation = (1 - t - dt) * t / ((1 - t) * (t + dt))  # of the noise at t and at t + dt
    fresh = eta * math.sqrt(1 - correlation**2)
    new_eps = torch.randn(z.shape, generator=generator).to(z.device)
    return z + t * (math.sqrt(1 - fresh**2) * eps + fresh * new_eps - eps)


def name_grid(flags, class_ids, default_steps):
    """Where sample.py puts its grid: samples/class-3-seed-0.png, or a longer name if other flags
    decide what is in it, so that they can be compared."""
    ids = "-".join(map(str, class_ids[:8])) or "all"
    if len(class_ids) > 8:
        ids += f"-and-{len(class_ids) - 8}-more"
    name = f"class-{ids}-seed-{flags.seed}"
    if flags.checkpoint != "out":
        name += "-" + re.sub(r"[^\w.-]", "-", Path(os.path.abspath(flags.checkpoint)).name)
    if flags.num_images is not None:
        name += f"-images-{flags.num_images}"
    if flags.steps != default_steps:
        name += f"-steps-{flags.steps}"
    if flags.cfg_scale is not None:
        name += f"-cfg-scale-{flags.cfg_scale:g}"
    if flags.eta > 0:
        name += f"-eta-{flags.eta:g}"
    return Path("samples", f"{name}.png")


def prepare_files(directory, class_names, class_ids):
    """Where each picture goes on its own: DIR/<class name>/<n>.png. Makes the folders. Raises
    UserError if one of the files exists."""
    folders = folder_names(class_names)
    counts = [0] * len(class_names)  # pictures of each class so far
    files = []
    for class_id in class_ids.tolist():
        file = directory / folders[class_id] / f"{counts[class_id]}.png"
        counts[class_id] += 1
        if os.path.exists(file):
            raise UserError(f"{file} exists: choose a new folder for --save-images")
        files.append(file)
    for file in files:
        make_folder(file.parent)
    return files


class Log:
    """A CSV file to which a run appends rows {column: text}."""

    def __init__(self, path, last_step):
        """Cut the file back to last_step: later rows are of steps that were lost, and will be run
        again. Rows that waited are added. At 0 there is no log yet, and an old one goes. Raises
        UserError on failure."""
        self.path = path
        self.waiting = []  # lines that could not be written yet
        self.waiting_file = path.with_stem(f"{path.stem}-waiting")  # has them, too
        try:
            if last_step == 0:
                path.unlink(missing_ok=True)
                self.waiting_file.unlink(missing_ok=True)
            elif path.exists():
                lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
                if self.waiting_file.exists():
                    lines += self.waiting_file.read_text("utf-8").splitlines(keepends=True)[1:]
                columns = lines[0].strip().split(",") if lines else []
                if "step" in columns:
                    cell = columns.index("step")
                    kept = [row for row in lines if not is_beyond(row, cell, last_step)]
                    write_beside(path, lambda beside: beside.write_text("".join(kept), "utf-8"))
                    self.waiting_file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error

    def append(self, row):
        """Append a row. If another program holds the file, as spreadsheets do on Windows, the row
        waits in log-waiting.csv, and is written together with the next. If the file has other
        columns, it is renamed, and a new one begun. Raises UserError on any other failure."""
        header = ",".join(row) + "\n"
        self.waiting.append(",".join(map(str, row.values())) + "\n")
        try:
            first = ""
            if self.path.exists():
                with open(self.path, encoding="utf-8", errors="replace") as file:
                    first = file.readline()
            if first not in ("", header):
                old = unused_name(self.path)
                replace(self.path, old)
                print(f"the log has other columns now: its rows so far are in {old}")
            if first != header:
                self.path.write_text(header, "utf-8")
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self.waiting))
            if len(self.waiting) > 1:
                self.waiting_file.unlink(missing_ok=True)
            self.waiting = []
        except OSError as error:
            then = f"Its rows are in {self.waiting_file.name}, until they can be written."
            raise_unless_held(error, f"cannot write {self.path}", self.path, False, then)
            with contextlib.suppress(OSError):
                self.waiting_file.write_text(header + "".join(self.waiting), "utf-8")


def is_beyond(row, cell, last_step):
    """Whether a row of a log was cut short, or is of a step after last_step; its number is in that
    cell. The header is neither."""
    step = row.split(",")[cell : cell + 1]
    later = step and step[0].strip().isdecimal() and int(step[0]) > last_step
    return later or not row.endswith("\n")


def unused_name(path):
    """A path beside this one that is not in use: log-1.csv for log.csv, or a higher number."""
    number = 1
    while path.with_stem(f"{path.stem}-{number}").exists():
        number += 1
    return path.with_stem(f"{path.stem}-{number}")


def download(repo_id, what, **options):
    """The folder, in the Hub's own cache, of a repository on the Hub. Raises UserError, which
    begins with `what`, if the repository or the network is missing."""
    try:
        return Path(snapshot_download(repo_id, **options))
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{what}: {error}") from error


def list_files(repo_id, what):
    """The names of all files of a data set on the Hub. Raises UserError, which begins with `what`,
    if the data set or the network is missing."""
    try:
        # Not list_repo_files(), which tries for half a minute if there is no network.
        info = HfApi().dataset_info(repo_id, revision="main")
        return [file.rfilename for file in info.siblings]
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"{what}: {error}") from error


def load_model(checkpoint):
    """The model in a folder, such as "out", or at a Hub id, such as "you/butterflies", ready to
    sample from. Raises UserError if there is none, or if its files are damaged."""
    folder = Path(os.path.expanduser(checkpoint))
    hint = "run `python train.py` to make one in out"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(checkpoint)) and not os.path.exists(folder):
        hint = "its repository on the Hub has no config.json"
        files = ["config.json", "model.safetensors"]
        folder = download(str(checkpoint), f"no model at {checkpoint}", allow_patterns=files)
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    if not os.path.isfile(config_file):
        raise UserError(f"no model in {checkpoint}: {hint}")

    try:
        config = json.loads(config_file.read_text("utf-8"))
        inspect.signature(DiT).bind(**config)  # a TypeError if the names are not DiT's
        if not math.isfinite(config.get("cfg_scale", 1)):
            raise ValueError("cfg_scale is not finite")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{config_file} is not the config of a nanoDiT model: {error}") from error
    try:
        model = DiT(**config)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error

    try:
        load_weights(model, weights_file)  # which knows of weights that layers share
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {weights_file}: {error}") from error
    except RuntimeError as error:  # of load_state_dict: other names or shapes
        if is_out_of_memory(error):
            raise
        raise UserError(f"{weights_file} does not fit config.json: {str(error)[:200]}") from error
    return model.eval()


def check_holds_no_run(folder):
    """Raise UserError if the folder holds what a training has written."""
    if any(os.path.exists(folder / name) for name in (*CHECKPOINT_FILES, "log.csv")):
        raise UserError(f"{folder} holds a run: use --resume, --overwrite, or another --out-dir")


def write_checkpoint(out, ema, state, required=True):
    """Write CHECKPOINT_FILES to a staging folder and then move them into place, the state last, as
    it alone determines where --resume continues. Raises UserError on failure, and keeps what was
    written whole; if the checkpoint is not required, there is only a warning where another program
    holds an old file."""
    staging = out / ".writing"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        path = staging
        ema.save_pretrained(staging)
        torch.save(state, staging / "train_state.pt")
        for name in CHECKPOINT_FILES:
            path = out / name
            replace(staging / name, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        message = f"cannot write to {out}, which keeps its last checkpoint"
        then = "Training goes on, and the next checkpoint is tried as usual."
        if required and path != staging:  # all is written, and one file could not be moved
            kept = unused_name(out / "checkpoint")
            staging.rename(kept)
            message = f"cannot write {path}: close what has it open, and move here what {kept} has"
        raise_unless_held(error, message, path, required, then)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_state(path):
    """The train_state.pt of a run, on the CPU. Raises UserError if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not look at checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"step", "seconds", "losses", "settings", "class_names"} - state.keys()
        if missing:
            raise ValueError(f"{missing} is not in it")
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--resume: {path} is missing, damaged, or no state of a run: leave out --resume, or "
            f"name another --out-dir ({error})"
        ) from error
    return state


def restore_state(state, model, ema, optimizer, pictures):
    """Load the weights and the optimizer's moments from a state. Raises UserError if they are of
    other classes or of another network. pictures: how many each class has now; if the run began
    with others, there is a warning."""
    if model.class_names != state["class_names"]:
        raise UserError("--resume: the classes of the data set are not those of the original run")
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        # Moments come from the state; betas, weight decay and so on are those of train.py now.
        groups = zip(state["optimizer"]["param_groups"], optimizer.param_groups)
        for old, new in groups:
            old |= {name: value for name, value in new.items() if name != "params"}
        optimizer.load_state_dict(state["optimizer"])
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        message = f"--resume: train_state.pt does not fit model.py: {str(error)[:200]}"
        raise UserError(message) from error
    before = state.get("pictures", pictures)
    if before != pictures:
        change = f"{sum(before)} pictures have become {sum(pictures)}"
        if sum(before) == sum(pictures):
            change = "pictures have changed class"
        print_once(
            f"warning: {change} since the run began: others are held out, and losses before and "
            "after do not compare",
            file=sys.stderr,
        )


def load_initial_weights(checkpoint, model):
    """Give `model` the weights of a trained one; if the classes differ, the class embeddings stay
    random. Raises UserError if the sizes differ."""
    trained = load_model(checkpoint)
    if trained.class_names != model.class_names:
        message = "has other classes: the class embeddings start from random values"
        print_once(f"{checkpoint} {message}")
        trained.class_embedding = model.class_embedding  # so that they are what is loaded
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        message = f"--init-from {checkpoint} needs the sizes that it was trained with"
        raise UserError(f"{message}: {str(error)[:200]}") from error
