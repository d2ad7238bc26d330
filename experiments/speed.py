"""What a training step costs, and where its time goes.

    python -m experiments.speed                        # train.py's constants as they stand
    python -m experiments.speed --preset laptop
    python -m experiments.speed --compile on           # takes every flag of train.py

Takes train.py's own steps, in turns with bare ones: the same network, loss and optimizer on a batch
that lies ready. Prints parameters; images per second; from a profile, what takes the time; and
floating-point operations. Needs no data set: the pictures are noise. On a CPU, --compile auto means
off here.
"""

import copy
import statistics
import time

from support import machine
from support.settings import UserError, run_command

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import train

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
    "optimizer and EMA": ("aten::_fused_adam", "aten::_foreach", "aten::linalg_vector"),
    "random numbers": ("aten::normal", "aten::rand", "aten::uniform"),
}


def noise_pictures():
    """In place of a data set, as many pictures as a batch needs: images, labels, and which of them
    are trained on, which is all."""
    shape = (max(train.BATCH_SIZE, 64), 3, train.IMAGE_SIZE, train.IMAGE_SIZE)
    images = torch.randint(256, shape, dtype=torch.uint8)
    places = torch.arange(len(images))
    return images, places % len(CLASSES), places


def steps_of_train(device, compiling):
    """Train a network by train.py's own steps, without end: after STEPS of them anew."""
    network = train.make_network(CLASSES).to(device)
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    optimizer = train.make_optimizer(network)
    if compiling == "on":
        machine.compile_model(network)
    pictures = noise_pictures()
    while True:
        yield from train.training_steps(network, ema, optimizer, *pictures)


def bare_steps(device, compiling):
    """Train a network with nothing around it, without end."""
    network = train.make_network(CLASSES).to(device)
    optimizer = train.make_optimizer(network)
    if compiling == "on":
        machine.compile_model(network)
    batch = train.random_batch(*noise_pictures(), len(CLASSES), step=1)
    batch = machine.to_device(batch, device)
    while True:
        with machine.autocast(device, train.PRECISION):
            loss = train.rectified_flow_loss(network, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def now(device):
    """The time, when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def take_turns(steps, bare, device):
    """Pairs of seconds, one for each round: of a step of train.py, and of a bare one."""
    for _ in range(WARMUP):
        next(steps)
        next(bare)
    turns = []
    for _ in range(ROUNDS):
        count = 0
        begin = now(device)
        while count < 2 or time.perf_counter() - begin < SECONDS:
            next(steps)
            count += 1
        middle = now(device)
        for _ in range(count):
            next(bare)
        end = now(device)
        turns.append(((middle - begin) / count, (end - middle) / count))
    return turns


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


def flops_per_image(network):
    """Floating-point operations of a picture's way through the network and back. Leaves the network
    without weights: shapes are all that it takes."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network.to("meta")
        x = torch.zeros(1, 3, network.image_size, network.image_size)
        y = torch.zeros(1, dtype=torch.long)
        train.rectified_flow_loss(network, x, y, torch.ones(1), x).backward()
    return counter.get_total_flops()


def main():
    options, flags = train.parse_flags(description=__doc__)
    if "resume" in options or "init_from" in options:
        raise UserError("every measurement begins anew: leave out --resume and --init-from")
    train.apply_settings({"overwrite": True}, flags)
    device = machine.pick_device(train.DEVICE)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as in train.py
    compiling = train.COMPILE
    if compiling == "auto":
        compiling = "on" if device.type == "cuda" else "off"
    network = train.make_network(CLASSES)
    parameters = sum(weight.numel() for weight in network.parameters())
    images = train.STEPS * train.BATCH_SIZE  # of the whole run

    steps = steps_of_train(device, compiling)
    turns = take_turns(steps, bare_steps(device, compiling), device)
    with profile() as profiler:
        for _ in range(PROFILED):
            next(steps)
        now(device)
    best = min(ours for ours, _ in turns)
    ratio = statistics.median(bare / ours for ours, bare in turns)
    rate = train.BATCH_SIZE / best
    precision = "bf16" if machine.uses_bf16(device, train.PRECISION) else "fp32"
    print(f"{parameters / 1e6:.2f} M parameters, on {device} in {precision}")
    print(f"{rate:,.1f} images/s, {1000 * best:.1f} ms a step of {train.BATCH_SIZE}", end=", ")
    print(f"compile {compiling}; {100 * ratio:.0f}% of the speed of a bare loop")
    for group, share in time_shares(profiler, device).items():
        print(f"{100 * share:5.1f}% {group}")
    flops = flops_per_image(network)
    print(f"{flops / 1e9:.2f} GFLOP per image, {flops * rate / 1e12:.3f} TFLOP/s", end="; ")
    print(f"the run {flops * images / 1e15:.3g} PFLOP, {images / rate / 60:,.1f} minutes")


if __name__ == "__main__":
    run_command(main, if_out_of_memory="lower --batch-size")
