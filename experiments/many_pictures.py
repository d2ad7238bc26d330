"""How a run starts, with few pictures and with many.

    python -m experiments.many_pictures make few 5000
    python -m experiments.many_pictures start --dataset few
    torchrun --nproc_per_node=2 -m experiments.many_pictures start --dataset few.safetensors

make: writes so many JPEGs of 64x64 pixels, blurred noise, into a folder of 100 class folders.
start: takes every flag of train.py, trains for 20 steps, and prints for each process the seconds
from its start to the end of the first step, the memory that it shares with no other process (on
Linux), and images per second in the 19 steps after that. Nothing is written, and --compile auto
means off.
"""

import time

BEGIN = time.perf_counter()  # before torch is imported, which takes some seconds

import copy  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from support import machine  # noqa: E402
from support.settings import UserError, run_command  # noqa: E402

import torch  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402

import train  # noqa: E402
from data.images import load_dataset  # noqa: E402

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
    options, flags = train.parse_flags([*arguments, "--steps", str(STEPS)])
    if "resume" in options or "init_from" in options:
        raise UserError("every start begins anew: leave out --resume and --init-from")
    train.apply_settings({"overwrite": True}, flags)
    device = machine.pick_device(train.DEVICE)
    machine.join_processes(device, train.BATCH_SIZE)
    images, labels, class_names = load_dataset(train.DATASET, train.IMAGE_SIZE)
    train_ids = (~train.held_out(labels)).nonzero().flatten()

    network = train.make_network(class_names).to(device)
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    optimizer = train.make_optimizer(network)
    if train.COMPILE == "on":
        machine.compile_model(network)
    several = machine.processes()[1] > 1
    if several:
        network = DistributedDataParallel(network)
    ends = []
    for step in train.training_steps(network, ema, optimizer, images, labels, train_ids):
        ends.append(time.perf_counter())
    if several:
        torch.distributed.destroy_process_group()
    speed = train.BATCH_SIZE * (STEPS - 1) / (ends[-1] - ends[0])
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
