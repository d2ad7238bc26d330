"""What a training step costs, and where its time goes.

    python -m experiments.speed                        # train.py's constants as they stand
    python -m experiments.speed --preset laptop
    python -m experiments.speed --compile on           # takes every flag of train.py

Runs train.py's own loop, in turns with a bare one: the same network, loss and optimizer on a batch
that lies ready. Prints parameters; images per second; from a profile, what takes the time; and
floating-point operations. Needs no data set: the pictures are noise. On a CPU, --compile auto means
off here.
"""

import contextlib
import statistics
import tempfile
import time

from support import machine
from support.settings import UserError, run_command

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from model import DiT

WARMUP = 5  # steps at first that do not count: they compile and fill caches
ROUNDS = 5  # of train.py's steps and of bare ones, in turns
SECONDS = 1.0  # a round takes at least this long
PROFILED = 5  # steps that are profiled
CLASSES = [str(class_id) for class_id in range(75)]

# Operators, by the beginnings of their names. What torch.compile makes runs as one call each, in
# which norms, GELU, softmax and the residual stream are fused; matrix products stay on their own.
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "convolutions": ("aten::mkldnn_conv", "aten::cudnn_conv", "aten::convolution"),
    "fused attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient"),
    "compiled code": ("## Call CompiledFxGraph", "triton_"),
    "optimizer and EMA": ("aten::_fused_adam", "aten::lerp", "aten::linalg_vector"),
    "random numbers": ("aten::normal", "aten::rand", "aten::uniform"),
}


def noise_pictures(name, image_size):
    """Stands in for load_dataset: as many pictures of noise as train.py needs for a batch."""
    shape = (max(train.BATCH_SIZE, 64), 3, image_size, image_size)
    images = torch.randint(256, shape, dtype=torch.uint8)
    return images, torch.arange(len(images)) % len(CLASSES), CLASSES


def make_bare_step(model, device):
    """A function that trains the model for a step, with nothing around it."""
    if train.COMPILE == "on":
        machine.compile_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images, labels, _ = noise_pictures("any", train.IMAGE_SIZE)
    batch = train.random_batch(images, labels, torch.arange(len(images)), len(CLASSES), step=1)
    batch = machine.to_device(batch, device)

    def bare_step():
        with machine.autocast(device, train.PRECISION):
            loss = train.rectified_flow_loss(model, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return bare_step


def now(device):
    """The time, when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def measure(bare_step, device, profiler, turns):
    """A generator that goes on by one whenever train.py begins a step, so that between two yields
    lies a step of train.py. Adds to turns, for each round, the seconds that a step of train.py and
    a bare one took; then some steps of train.py are profiled."""
    for _ in range(WARMUP):
        bare_step()
        yield
    for _ in range(ROUNDS):
        steps = 0
        begin = now(device)
        while steps < 2 or time.perf_counter() - begin < SECONDS:
            yield
            steps += 1
        middle = now(device)
        for _ in range(steps):
            bare_step()
        end = now(device)
        turns.append(((middle - begin) / steps, (end - middle) / steps))
    with profiler:
        for _ in range(PROFILED):
            yield
        now(device)


def run_training(measurement):
    """Run train.py's loop, without checkpoints and such, until the measurement is at its end."""
    random_batch = train.random_batch

    def begin_step(*arguments, **options):
        """Stands in for random_batch, with which every step begins."""
        next(measurement)  # at the end a StopIteration, which ends the training, too
        return random_batch(*arguments, **options)

    train.random_batch = begin_step
    train.load_dataset = noise_pictures
    train.tqdm = lambda **options: tqdm(disable=True)
    train.STEPS = train.EVAL_EVERY = train.SAMPLE_EVERY = train.CHECKPOINT_EVERY = 10**9
    silent = contextlib.redirect_stdout(None)
    ended = contextlib.suppress(StopIteration)
    with tempfile.TemporaryDirectory() as train.OUT_DIR, silent, ended:
        train.train(state=None, init_from=None)


def time_shares(profiler, device):
    """{group of operators: share of the time}, in which nothing is counted twice. On MPS it is the
    CPU's time, which it takes to tell the GPU what to do."""
    seconds = dict.fromkeys([*GROUPS, "everything else"], 0)
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time the operator that launched it has already
        group = "everything else"
        for name, beginnings in GROUPS.items():
            if event.key.startswith(beginnings):
                group = name
        on_gpu = device.type == "cuda"
        seconds[group] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return {group: share / sum(seconds.values()) for group, share in seconds.items()}


def flops_per_image(sizes):
    """Floating-point operations of a picture's way through the network and back."""
    batch_size = 2  # a batch norm, if you add one, needs two
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes without data
        model = DiT(class_names=CLASSES, **sizes)
        x = torch.zeros(batch_size, 3, model.image_size, model.image_size)
        y = torch.zeros(batch_size, dtype=torch.long)
        train.rectified_flow_loss(model, x, y, torch.ones(batch_size), x).backward()
    return counter.get_total_flops() / batch_size


def main():
    options, flags = train.parse_flags(description=__doc__)
    if "resume" in options or "init_from" in options:
        raise UserError("every measurement begins anew: leave out --resume and --init-from")
    train.apply_settings({**options, "overwrite": True}, flags)
    device = machine.pick_device(train.DEVICE)
    sizes = {name.lower(): getattr(train, name) for name in train.MODEL_SETTINGS}
    model = DiT(class_names=CLASSES, **sizes).to(device)
    parameters = sum(weight.numel() for weight in model.parameters())
    images = train.STEPS * train.BATCH_SIZE  # of the whole run
    if train.COMPILE == "auto":
        train.COMPILE = "on" if device.type == "cuda" else "off"

    profiler = profile()
    turns = []
    run_training(measure(make_bare_step(model, device), device, profiler, turns))
    best = min(ours for ours, _ in turns)
    ratio = statistics.median(bare / ours for ours, bare in turns)
    rate = train.BATCH_SIZE / best
    precision = "bf16" if machine.uses_bf16(device, train.PRECISION) else "fp32"
    print(f"{parameters / 1e6:.2f} M parameters, on {device} in {precision}")
    print(f"{rate:,.1f} images/s, {1000 * best:.1f} ms a step of {train.BATCH_SIZE}", end=", ")
    print(f"compile {train.COMPILE}; {100 * ratio:.0f}% of the speed of a bare loop")
    for group, share in time_shares(profiler, device).items():
        print(f"{100 * share:5.1f}% {group}")
    # Last, as what you add to the network may not bear to be without data.
    flops = flops_per_image(sizes)
    print(f"{flops / 1e9:.2f} GFLOP per image, {flops * rate / 1e12:.3f} TFLOP/s", end="; ")
    print(f"the run {flops * images / 1e15:.3g} PFLOP, {images / rate / 60:,.1f} minutes")


if __name__ == "__main__":
    run_command(main, if_out_of_memory="lower --batch-size")
