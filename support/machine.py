"""The machine: which device, in which precision, compiled or not, how many processes, signals."""

import contextlib
import os
import signal
import sys
import threading

from support.settings import UserError, print_once

import torch
import torch.distributed as dist


def pick_device(name):
    """The torch device with the given name; "auto" is a GPU (CUDA, or MPS on a Mac) if there is
    one that works, else the CPU. Each process of torchrun has a GPU of its own. Raises UserError if
    this machine does not have the device."""
    has_gpu = torch.accelerator.is_available()
    gpu = torch.accelerator.current_accelerator().type if has_gpu else "cpu"
    instead = () if "LOCAL_RANK" in os.environ else ("cpu",)  # no process falls back on its own
    for device in (gpu, *instead) if name == "auto" else (name,):
        if device.startswith("cuda") and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            return torch.zeros(1, device=device).device
        except Exception as error:  # which one depends on how torch was built
            problem = error
    raise UserError(f'no DEVICE "{device}" here: try auto, cpu or fewer processes ({problem})')


def to_device(tensors, device):
    """Move tensors from the CPU to the device. A GPU copies pinned memory while it computes."""
    on_gpu = device.type == "cuda"
    tensors = [tensor.pin_memory() for tensor in tensors] if on_gpu else tensors
    return [tensor.to(device, non_blocking=on_gpu) for tensor in tensors]


def uses_bf16(device, precision):
    """Whether "bf16", "fp32" or "auto" means bfloat16 on this device. "auto" is bfloat16 on
    CUDA from Ampere on, and on x86 CPUs that compute in it: emulated, it is slow."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # from Ampere on
    # torch.cpu.get_capabilities() would say it from torch 2.11 on; these are older.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def autocast(device, precision="auto"):
    """A context in which matrix products and attention run in bfloat16, if that is the precision,
    while the weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


def join_processes(device, batch_size):
    """Join the other processes that torchrun has started, if it has. Raises UserError if there are
    more than pictures in a batch."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > batch_size:
        raise UserError(f"BATCH_SIZE {batch_size} is too small for {world_size} processes")
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Named, as without a name the group would have the accelerator's backend alone. Processes
        # wait for each other for up to a day (48 times 30 minutes): one may read pictures longer.
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=48 * dist.constants.default_pg_timeout)


def processes():
    """The rank of this process, and how many there are: 0 and 1, unless torchrun started them."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def compiling_pays(device, parameters, pictures):
    """Whether a run is worth the wait for torch.compile: on CUDA always, on a CPU from some twenty
    minutes on. pictures: of all steps together. Training takes about 6 operations for each
    parameter and token, of which a picture has about 64; a core does about 50 G a second."""
    seconds = 6 * parameters * pictures * 64 / (50e9 * torch.get_num_threads())
    return device.type == "cuda" or (device.type == "cpu" and seconds > 1200)


def compile_model(model):
    """Let torch.compile translate the model's forward and backward pass, which happens when it is
    first called. If it cannot, there is a warning, and the model stays as it is."""
    eager = model.forward

    def first_call(*arguments, **options):
        print_once("compiling: the first step takes up to a minute")
        try:
            model.forward = torch.compile(eager)
            # The compiler translates the backward pass when it is first needed, and may fail then.
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            with torch.random.fork_rng({weight.device for weight in weights if weight.is_cuda}):
                loss = model.forward(*arguments, **options).sum()
                torch.autograd.grad(loss, weights, allow_unused=True)
        except Exception as error:  # the compiler's; one of the model's own comes again below
            print_once(f"warning: not compiled, as with --compile off: {error!r:.200}", sys.stderr)
            model.forward = eager
        return model.forward(*arguments, **options)

    model.forward = first_call


@contextlib.contextmanager
def stop_signals():
    """Yield a list in which Ctrl-C, SIGTERM and SIGHUP are noted, so that a training step can end
    and be saved before the run stops. A second Ctrl-C stops it at once, except under torchrun."""
    received = []

    def on_signal(number, frame):
        # torchrun passes signals on, so that one Ctrl-C comes twice.
        if received and number == signal.SIGINT and "WORLD_SIZE" not in os.environ:
            raise KeyboardInterrupt
        received.append(number)
        if number not in (signal.SIGINT, signal.SIGTERM):  # the terminal is gone
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.write(2, b"\nstopping after this step, which is saved\n")

    with contextlib.ExitStack() as at_the_end:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
            ignored = signal.getsignal(number) == signal.SIG_IGN  # as nohup does
            if threading.current_thread() is threading.main_thread() and not ignored:
                at_the_end.callback(signal.signal, number, signal.signal(number, on_signal))
        yield received
