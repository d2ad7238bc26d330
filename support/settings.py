"""Settings: constants become flags, values have limits, and a mistake is one line."""

import argparse
import errno
import json
import os
import re
import sys
import traceback
from pathlib import Path

KINDS = {int: "whole number", float: "number"}
MANY = 10**12
MAX_SEED = 2**32 - 1  # of torch's generator on a CPU, which would take 2**32 for 0

# {name: (kind, lowest, highest)}. A constant that is not listed has no limits here; what sizes a
# network may have, it says itself.
LIMITS = {"SEED": (int, 0, MAX_SEED), "WARMUP_STEPS": (int, 0, MANY)}
LIMITS |= dict.fromkeys(("STEPS", "BATCH_SIZE", "ACCUMULATE", "LOG_EVERY"), (int, 1, MANY))
LIMITS |= dict.fromkeys(("EVAL_EVERY", "SAMPLE_EVERY", "CHECKPOINT_EVERY"), (int, 1, MANY))
LIMITS |= dict.fromkeys(("FLIP_SHARE", "LABEL_DROP", "DECAY_SHARE", "EMA_DECAY"), (float, 0, 1))
LIMITS |= dict.fromkeys(("LEARNING_RATE", "GRAD_CLIP", "T_STD"), (float, 0, 1e38))
LIMITS |= dict.fromkeys(("T_MEAN", "CFG_SCALE"), (float, -MANY, MANY))
CHOICES = {"PRECISION": ("auto", "bf16", "fp32"), "COMPILE": ("auto", "on", "off")}

# What the operating system says when a user's disk, folder or pipe is the cause, and not a bug.
CANNOT_WRITE = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EEXIST ENOTDIR EISDIR EPIPE".split()

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


class UserError(Exception):
    """An error that the user can mend: the scripts print it as one line, and exit with status 2."""

    mendable = True  # as NetworkError in model.py, which imports nothing of ours


# Errors


def run_command(main, if_out_of_memory="close other programs"):
    """Call main(). A mendable error, a disk that cannot be written, or too little memory becomes
    one line on stderr and exit status 2. Any other exception is a bug, and keeps its traceback. As
    a disk's error may come from a line that you have just added, that line is named."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal cannot show
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = str(error)
        # CUDA raises a subclass of RuntimeError, MPS and CPUs a plain one: the text is alike.
        if isinstance(error, MemoryError) or any(text in message for text in OUT_OF_MEMORY):
            message = f"out of memory: {if_out_of_memory} ({message})"
        elif errno.errorcode.get(getattr(error, "errno", None)) in CANNOT_WRITE:
            message += f" ({place_of(error)})"
        elif not getattr(error, "mendable", False):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def place_of(error):
    """The file and line of this project, not of a library, in which an exception arose."""
    project = Path(__file__).resolve().parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if project in Path(frame.filename).resolve().parents]
    frame = [frame for frame in ours if "site-packages" not in frame.filename][-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"


def print_once(text, file=None):
    """Print, but only in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file or sys.stdout, flush=True)


# Flags


def new_parser(description, **options):
    """An argument parser that reports errors in one line, without the usage text."""
    options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS, **options)


def parse(parser, arguments, presets=()):
    """{name: value} of the flags in `arguments`, or in the command line if they are None; none in a
    notebook, where that is the kernel's. --preset stands for a line of flags; others override it.
    """
    if arguments is None:
        # A notebook is run by ipykernel_launcher.py or the like.
        arguments = [] if "kernel" in Path(sys.argv[0]).name else sys.argv[1:]
    flags = vars(parser.parse_args(arguments))
    if "preset" in flags:
        flags = vars(parser.parse_args([*presets[flags["preset"]].split(), *arguments]))
    return flags


def number(text):
    """An argparse type: an int if the value is whole (even 1e4), otherwise a float."""
    value = float(text)  # argparse reports a ValueError
    return int(value) if value.is_integer() else value


def limited(kind, lowest=-MANY, highest=MANY):
    """A type for argparse: a finite number from lowest to highest; if kind is int, a whole one."""
    return lambda text: within_limits(number(text), kind, lowest, highest)


def within_limits(value, kind, lowest, highest):
    """The value, of the kind int or float. Raises ArgumentTypeError if it is not such a number, or
    not from lowest to highest."""
    fits = isinstance(value, (int, float)) and lowest <= value <= highest
    if not fits or kind(value) != value:
        limits = f"{KINDS[kind]} from {lowest} to {highest}"
        raise argparse.ArgumentTypeError(f"{value!r}, not a {limits}")
    return kind(value)


def png_path(text):
    """An argparse type: the path of a .png file, which need not exist."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} is not the name of a .png file")
    return Path(text).expanduser()


def add_setting_flags(parser, settings, source_file):
    """Add a flag for each of the settings {name: default}: --batch-size for BATCH_SIZE. Groups and
    help texts are the sections and the comments of the file that assigns them."""
    comments, groups = read_comments(source_file), {}
    for name, default in settings.items():
        section, comment = comments.get(name, ("more settings", ""))
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        flag = "--" + name.lower().replace("_", "-")
        text = f"{comment} (default: {default})".replace("%", "%%")  # % is special to argparse
        options = {"type": str if isinstance(default, str) else number, "metavar": ""}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}  # --name and --no-name
        groups[section].add_argument(flag, dest=name, help=text, **options)


def read_comments(source_file):
    """{name: (section, comment)} of the assignments in a Python file. A section begins with a
    comment such as "# --- data ---"; the comment is the one at the end of the line."""
    comments, section = {}, "settings"
    # Without a file, the code was run by exec().
    for line in Path(source_file or os.devnull).read_text("utf-8").splitlines():
        if line.startswith("# --- "):
            section = line.strip("# -")
        assignment = re.match(r"([A-Z]\w*)[^#]*=[^#]*#?(.*)", line)
        if assignment:
            comments[assignment[1]] = section, assignment[2].strip()
    return comments


# Limits


def checked(values):
    """The values {name: value}, numbers of the kind that is meant: 1e4 steps are 10000. Raises
    UserError, with the name, for one that no training could run with."""
    for name in [name for name in LIMITS if name in values]:
        try:
            values[name] = within_limits(values[name], *LIMITS[name])
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name} is {error}") from error
    for name, choices in CHOICES.items():
        if values.get(name, choices[0]) not in choices:
            raise UserError(f"{name} is {values[name]!r}: choose one of {', '.join(choices)}")
    return plain(values)


def plain(values):
    """The values {name: value} in Python's own types: torch.load would refuse a NumPy float."""
    return json.loads(json.dumps(values))
