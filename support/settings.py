"""Settings: constants become flags, values have limits, and a mistake is one line."""

import argparse
import difflib
import errno
import json
import os
import re
import sys
from pathlib import Path

MAX_SEED = 2**32 - 1  # of torch's generator on a CPU, which would take 2**32 for 0

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
    one line on stderr and exit status 2. Any other exception is a bug, and keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal cannot show
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = str(error)
        cannot_write = errno.errorcode.get(getattr(error, "errno", None)) in CANNOT_WRITE
        # CUDA raises a subclass of RuntimeError, MPS and CPUs a plain one: the text is alike.
        if isinstance(error, MemoryError) or any(text in message for text in OUT_OF_MEMORY):
            message = f"out of memory: {if_out_of_memory} ({message})"
        elif not cannot_write and not getattr(error, "mendable", False):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


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
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = nearest(unknown[0].partition("=")[0], re.findall(r"--[\w-]+", parser.format_help()))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    if "preset" in flags:
        flags = parser.parse_args([*presets[flags.preset].split(), *arguments])
    return vars(flags)


def nearest(name, names):
    """The end of an error about an unknown name: which of the names is like it, if any."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def number(value):
    """A number, or a text that is one, as an int if it is whole (even 1e4), otherwise a float."""
    value = float(value)  # argparse reports a ValueError
    return int(value) if value.is_integer() else value


def limited(kind, lowest=-(10**12), highest=10**12):
    """A function that returns a number as one of the kind int or float. It raises ArgumentTypeError
    if it is not from lowest to highest or, for int, not whole. argparse takes it as a type."""

    def within_limits(value):
        if not lowest <= number(value) <= highest or kind(number(value)) != number(value):
            problem = f"{value} is no {kind.__name__} from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(problem)
        return kind(number(value))

    within_limits.__name__ = kind.__name__  # argparse says: invalid int value
    return within_limits


def expanded(text):
    """An argparse type: a path, in which ~ is the home folder, as in --output=~/grid.png."""
    return Path(os.path.expanduser(text))  # which leaves ~name if there is no such user


def png_path(text):
    """An argparse type: the path of a .png file, which need not exist."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} is not the name of a .png file")
    return expanded(text)


def add_setting_flags(parser, settings, source_file):
    """Add a flag for each of the settings {name: default}: --batch-size for BATCH_SIZE. Groups and
    help texts come from the file that assigns them: a line such as "# --- data ---" begins a group,
    and the comment at the end of a line is its help."""
    source = Path(source_file or os.devnull).read_text("utf-8")  # no file: it was run by exec()
    groups = {}
    for name, default in settings.items():
        before, *after = re.split(rf"^{name}\b", source, maxsplit=1, flags=re.MULTILINE)
        section = ["settings", *re.findall("^# --- (.*?) -*$", before, re.MULTILINE)][-1]
        groups[section] = groups.get(section) or parser.add_argument_group(section)
        comment = re.match(r".*?#(.*)|", "".join(after))[1] or ""
        text = f"{comment.strip()} (default: {default})".replace("%", "%%")  # special to argparse
        options = {"type": str if isinstance(default, str) else number, "metavar": ""}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}  # --name and --no-name
        flag = "--" + name.lower().replace("_", "-")
        groups[section].add_argument(flag, dest=name, help=text, **options)


# Limits

# {name: function that checks a value}. A constant that is not listed has no limits here; what sizes
# a network may have, model.py checks.
LIMITS = {"SEED": limited(int, 0, MAX_SEED), "WARMUP_STEPS": limited(int, 0)}
LIMITS |= dict.fromkeys(("STEPS", "BATCH_SIZE", "ACCUMULATE", "LOG_EVERY"), limited(int, 1))
LIMITS |= dict.fromkeys(("EVAL_EVERY", "SAMPLE_EVERY", "CHECKPOINT_EVERY"), limited(int, 1))
LIMITS |= dict.fromkeys("FLIP_SHARE LABEL_DROP DECAY_SHARE EMA_DECAY".split(), limited(float, 0, 1))
LIMITS |= dict.fromkeys(("LEARNING_RATE", "GRAD_CLIP", "T_STD"), limited(float, 0, 1e38))
LIMITS |= dict.fromkeys(("T_MEAN", "CFG_SCALE"), limited(float))


def checked(values):
    """The values {name: value}, with whole numbers as int: 1e4 steps are 10000. Raises UserError,
    with the name, for one that no training could run with."""
    for name in LIMITS.keys() & values:
        try:
            values[name] = LIMITS[name](values[name])
        except (argparse.ArgumentTypeError, ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{name} is {values[name]!r}: {error}") from error
    for name, choices in CHOICES.items():
        if values.get(name, choices[0]) not in choices:
            raise UserError(f"{name} is {values[name]!r}: choose one of {', '.join(choices)}")
    return plain(values)


def plain(values):
    """The values {name: value} in Python's own types: torch.load would refuse a NumPy float."""
    return json.loads(json.dumps(values, default=float))
