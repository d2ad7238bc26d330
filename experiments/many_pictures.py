"""How a run starts, with few pictures and with many.

    python -m experiments.many_pictures make few 5000
    python -m experiments.many_pictures start --dataset few
    torchrun --nproc_per_node=2 -m experiments.many_pictures start --dataset few.safetensors

make: writes so many JPEGs of 64x64 pixels, blurred noise, into a folder of 100 class folders.
start: takes every flag of train.py, trains for 20 steps, and prints for each process the seconds
from its start to the end of the first step, the memory that it shares with no other process (on
Linux), and images per second in the 19 steps after that.
"""

import time

BEGIN = time.perf_counter()  # before torch is imported, which takes some seconds

import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

from support.settings import UserError, run_command  # noqa: E402

import torch  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402

import train  # noqa: E402

CLASSES, STEPS = 100, 20


def make(folder, count):
    """Write `count` pictures: 8x8 random colours, enlarged."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        small = torch.randint(256, (3, 8, 8), generator=generator, dtype=torch.uint8)
        path = Path(folder, f"{number % CLASSES:03}", f"{number:07}.jpg")
        if number < CLASSES:
            path.parent.mkdir(parents=True)
        to_pil_image(small).resize((64, 64)).save(path, quality=90)


def private_memory():
    """Memory of this process that it shares with no other, in GiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return sum(kilobytes) / 2**20


def start(arguments):
    """Train for STEPS steps, and print what they took."""
    update_ema, ends = train.update_ema, []

    def timed(ema, model, step):
        update_ema(ema, model, step)
        ends.append(time.perf_counter())

    train.update_ema = timed
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, os.environ.get("RANK", "0"))
        train.main([*arguments, "--steps", str(STEPS), "--out-dir", str(out)])
    _, flags = train.parse_flags(arguments)
    batch_size = flags.get("BATCH_SIZE", train.BATCH_SIZE)
    speed = batch_size * (STEPS - 1) / (ends[-1] - ends[0])
    begin = f"first step after {ends[0] - BEGIN:.1f} s"
    print(f"{begin}, {private_memory():.2f} GiB private, {speed:.0f} images/s", flush=True)


def main():
    match sys.argv[1:]:
        case ["make", folder, count]:
            make(folder, int(count))
        case ["start", *arguments]:
            start(arguments)
        case _:
            raise UserError("choose: make FOLDER COUNT, or start and flags of train.py")


if __name__ == "__main__":
    run_command(main)
