"""Random mutations of pictures, config.json and train_state.pt, through the command lines.

A mutation changes, cuts or inserts bytes of a valid file. Whatever the scripts make of it,
they end within 60 seconds with status 0 or 2, no traceback, and the file as it was. The folders of
those that do not are kept. The same seed makes the same mutation.
"""

import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from helpers import SMALL, call, start
from PIL import Image

TRAIN = ["train", *SMALL, "--dataset", "pictures", "--batch-size", 2, "--steps"]
COMMANDS = {  # what reads each of the files
    "pictures/1.png": [*TRAIN, 1, "--out-dir", "new"],
    "pictures/2.jpg": [*TRAIN, 1, "--out-dir", "new"],
    "out/config.json": ["sample", "--class-id", 0, "--steps", 1, "--device", "cpu"],
    "out/train_state.pt": ["train", "--resume", "--steps", 3],
}


def mutated(content, generator):
    """The bytes with one to four changes somewhere; nines come often, to make numbers large."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(content) + 1)
        length = generator.choice((1, 1, 2, 4, 16, 200))
        new = bytes(generator.choice((generator.randrange(256), 57)) for _ in range(length))
        change = generator.randrange(4)
        if change == 0:
            content[at : at + length] = new
        elif change == 1:
            content[at:at] = new
        elif change == 2:
            del content[at : at + length]
        else:
            del content[at:]
        content = content or bytearray(b"0")
    return bytes(content)


def attack(prepared, folder, seed):
    """Mutate one file in a copy of the prepared folder and run the script that reads it: what went
    wrong, or None."""
    name = list(COMMANDS)[seed % len(COMMANDS)]
    shutil.copytree(prepared, folder)
    before = mutated((folder / name).read_bytes(), random.Random(seed))
    (folder / name).write_bytes(before)
    process = start(*COMMANDS[name], cwd=folder)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        return "not done after 60 seconds"
    if process.returncode not in (0, 2) or "Traceback" in err:
        return f"status {process.returncode}: {err.strip()[-300:]}"
    resumed = name == "out/train_state.pt" and process.returncode == 0  # then it is a new one
    if not resumed and (folder / name).read_bytes() != before:
        return "the file was changed"
    return None


def fuzz(count, first_seed):
    """Run so many attacks; a list of what went wrong."""
    folder, wrong = Path(tempfile.mkdtemp(prefix="fuzz-")), []
    prepared = folder / "prepared"
    (prepared / "pictures").mkdir(parents=True)
    gradient = Image.radial_gradient("L").resize((40, 30))
    image = Image.merge("RGB", (gradient, gradient.rotate(180), gradient))
    image.save(prepared / "pictures" / "1.png")
    image.save(prepared / "pictures" / "2.jpg")
    call(*TRAIN, 2, cwd=prepared)
    for seed in range(first_seed, first_seed + count):
        problem = attack(prepared, folder / str(seed), seed)
        if problem:
            wrong.append(f"{folder / str(seed)}: {problem}")
        else:
            shutil.rmtree(folder / str(seed))
    return wrong
