"""Random mutations of pictures, config.json and train_state.pt, through the command lines.

    python tests/fuzz.py                  # 300 mutations, some minutes on two cores
    python tests/fuzz.py 20 --seed 7

A mutation changes, cuts, doubles or inserts bytes of a valid file. Whatever the scripts make of it,
they end within 60 seconds with status 0 or 2, no traceback, and the file as it was. Prints a line
for each that does not, and keeps its folder. The same seed makes the same mutations.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import SMALL, call, start

KINDS = ("picture.png", "picture.jpg", "config.json", "train_state.pt")


def mutated(content, generator):
    """The bytes with one to four changes somewhere; nines come often, to make numbers large."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(content) + 1)
        length = generator.choice((1, 1, 2, 4, 16, 200))
        new = bytes(generator.choice((generator.randrange(256), 57)) for _ in range(length))
        change = generator.randrange(5)
        if change == 0:
            content[at : at + length] = new
        elif change == 1:
            content[at:at] = new
        elif change == 2:
            del content[at : at + length]
        elif change == 3:
            content[at:at] = content[at : at + length]
        else:
            del content[at:]
        content = content or bytearray(b"0")
    return bytes(content)


def prepare(folder):
    """A folder with two pictures, and one with a run trained on them: what is mutated."""
    pictures = folder / "pictures"
    pictures.mkdir()
    gradient = Image.radial_gradient("L").resize((40, 30))
    image = Image.merge("RGB", (gradient, gradient.rotate(180), gradient))
    image.save(pictures / "picture.png")
    image.save(pictures / "picture.jpg")
    few = ["--dataset", "pictures", "--steps", 2, "--batch-size", 2]
    call("train.py", *SMALL, *few, cwd=folder)


def attack(prepared, folder, seed):
    """Mutate one file in a copy of the prepared folder and run the script that reads it: what went
    wrong, or None."""
    generator = random.Random(seed)
    name = KINDS[seed % len(KINDS)]
    shutil.copytree(prepared, folder)
    path = folder / ("pictures" if name.startswith("picture") else "out") / name
    path.write_bytes(mutated(path.read_bytes(), generator))
    before = path.read_bytes()
    if name.startswith("picture"):
        few = ["--dataset", "pictures", "--steps", 1, "--batch-size", 2, "--out-dir", "new"]
        process = start("train.py", *SMALL, *few, cwd=folder)
    elif name == "config.json":
        few = ["--class-id", 0, "--num-images", 1, "--steps", 1, "--device", "cpu"]
        process = start("sample.py", *few, cwd=folder)
    else:
        process = start("train.py", "--resume", "--steps", 3, "--batch-size", 2, cwd=folder)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"{name}, seed {seed}: not done after 60 seconds"
    if process.returncode not in (0, 2) or "Traceback" in err:
        return f"{name}, seed {seed}: status {process.returncode}: {err.strip()[-300:]}"
    resumed = name == "train_state.pt" and process.returncode == 0  # then it is a new one
    if not resumed and path.read_bytes() != before:
        return f"{name}, seed {seed}: the file was changed"
    return None


def fuzz(count, seed, workers=2):
    """Run so many attacks; a list of what went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    prepared = folder / "prepared"
    prepared.mkdir()
    prepare(prepared)

    def one(i):
        wrong = attack(prepared, folder / str(i), i)
        if wrong is None:
            shutil.rmtree(folder / str(i))
        return wrong

    with ThreadPoolExecutor(workers) as pool:
        wrong = [line for line in pool.map(one, range(seed, seed + count)) if line]
    if not wrong:
        shutil.rmtree(folder)
    return [f"{line} ({folder})" for line in wrong]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation")
    args = parser.parse_args()
    wrong = fuzz(args.count, args.seed)
    print("\n".join([*wrong, f"{args.count} mutations, {len(wrong)} went wrong"]))
    sys.exit(bool(wrong))
