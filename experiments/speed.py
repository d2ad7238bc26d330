"""What a training step costs, and where its time goes.

    python experiments/speed.py                                 # train.py's constants as they stand
    python experiments/speed.py --preset laptop
    python experiments/speed.py --image-size 128 --batch-size 64   # takes every flag of train.py

Runs train.py's own loop, once as it is and once compiled (--compile on or off: only so), in turns
with the plain step: DiT of the same sizes, built of PyTorch's modules. Prints parameters,
floating-point operations and memory per image; images per second; the share that this is of the
machine's own rate of multiplying matrices; and, from a profile, what takes the time. Then sampling,
in turns with nothing but the network's forward passes on the same batches. Needs no data set: the
pictures are noise.
"""

import contextlib
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from common import autocast, pick_device, uses_bf16  # noqa: E402
from model import UserError, timestep_features  # noqa: E402

ROUNDS = 7  # of our steps and of plain ones, in turns
SECONDS = 0.5  # a round takes at least this long
PROFILED = 5  # steps that are profiled
WARMUP = 3  # steps at first that do not count: they compile and fill caches
CLASSES = [str(i) for i in range(75)]

# Operators, by the beginnings of their names. What torch.compile makes runs as one call each, in
# which norms, GELU, softmax and the residual stream are fused; matrix products stay on their own.
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "fused attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient"),
    "compiled code": ("## Call CompiledFxGraph", "triton_"),
    "optimizer and EMA": (
        "aten::_fused_adam",
        "aten::lerp",
        "aten::linalg_vector",
        "aten::_foreach",
    ),
    "random numbers": ("aten::normal", "aten::rand", "aten::uniform"),
}


class PlainBlock(nn.Module):
    """A block of DiT (Peebles & Xie 2022, arXiv 2212.09748), of PyTorch's own modules."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        gelu = nn.GELU("tanh")
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), gelu, nn.Linear(4 * dim, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=2)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, y, y, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """DiT with fixed positions, whose output is v."""

    def __init__(self, image_size, patch_size, dim, depth, heads):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, patch_size)
        tokens = (image_size // patch_size) ** 2
        self.register_buffer("positions", 0.02 * torch.randn(1, tokens, dim))
        self.timestep_embedding = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_embedding = nn.Embedding(len(CLASSES) + 1, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.final_layer = nn.Linear(dim, 3 * patch_size**2)
        self.unpatchify = nn.PixelShuffle(patch_size)

    def forward(self, z, t, y):
        c = self.timestep_embedding(timestep_features(t)) + self.class_embedding(y)
        x = self.patch_embedding(z).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=2)
        x = self.final_layer(self.norm(x) * (1 + scale) + shift)
        return self.unpatchify(x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1))).float()


def wait(device):
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_rate(device):
    """FLOP a second of the product of two large matrices: the best of many tries."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if uses_bf16(device, train.PRECISION) else torch.float32
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def activation_bytes(model, batch):
    """What one forward pass keeps for the backward one, the weights aside."""
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = x, storage.nbytes()  # x, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        train.rectified_flow_loss(model, *batch)
    return sum(size for _, size in kept.values())


class PlainStep:
    """A training step of PlainDiT on data that lie ready, in the precision of ours."""

    def __init__(self, images, labels, compiled):
        self.device = images.device
        sizes = {name.lower(): getattr(train, name) for name in train.MODEL_SETTINGS}
        del sizes["conv_dim"]  # a plain DiT has no convolutions
        self.model = PlainDiT(**sizes).to(self.device)
        if compiled:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.x = images[: train.BATCH_SIZE].float() / 127.5 - 1
        self.y = labels[: train.BATCH_SIZE]

    def __call__(self):
        t = torch.rand(len(self.x), device=self.device)[:, None, None, None]
        noise = torch.randn_like(self.x)
        with autocast(self.device, train.PRECISION):
            v = self.model((1 - t) * self.x + t * noise, t.flatten(), self.y)
            loss = F.mse_loss(v, noise - self.x)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Enough(Exception):
    """Ends a training that has been measured."""


def measure_training(images, labels, arguments, compiled):
    """Seconds per step of train.py's loop and of the plain one, as pairs of rounds in turns; and
    the profile of some steps."""
    device, random_batch = images.device, train.random_batch
    plain_step = PlainStep(images, labels, compiled)
    try:
        for _ in range(WARMUP):
            plain_step()
    except torch._dynamo.exc.TorchDynamoException as error:
        message = "torch.compile fails here: --compile off measures without it"
        raise UserError(f"{message} ({str(error)[:200]})") from error
    steps, turns, begun, profiler = -WARMUP, [], math.nan, None

    def begin_step(*batch, **options):
        """Stands in for random_batch, with which every step begins."""
        nonlocal steps, begun, profiler
        if steps >= 2 and time.perf_counter() - begun > SECONDS and not profiler:  # a round is over
            wait(device)
            ours = (time.perf_counter() - begun) / steps
            steps, begun = 0, time.perf_counter()
            while steps < 2 or time.perf_counter() - begun < SECONDS:
                plain_step()
                steps += 1
            wait(device)
            turns.append((ours, (time.perf_counter() - begun) / steps))
            steps = 0
            if len(turns) == ROUNDS:
                activities = [ProfilerActivity.CPU]
                if device.type == "cuda":
                    activities.append(ProfilerActivity.CUDA)
                profiler = profile(activities=activities).__enter__()
        if profiler and steps == PROFILED:
            wait(device)
            profiler.__exit__(None, None, None)
            raise Enough
        if steps == 0:
            wait(device)
            begun = time.perf_counter()
        steps += 1
        return random_batch(*batch, **options)

    vary = {"load_dataset": lambda name, size: (images.cpu(), labels.cpu(), CLASSES)}
    vary["random_batch"] = begin_step
    vary["tqdm"] = lambda **options: tqdm(disable=True)  # no progress bar between the figures
    arguments = [*arguments, "--steps", "1000000000", "--compile", "on" if compiled else "off"]
    for interval in ("eval", "sample", "checkpoint"):
        arguments += [f"--{interval}-every", "1000000000"]
    folder, enough = tempfile.TemporaryDirectory(), contextlib.suppress(Enough)
    with folder as out, replaced(train, vary), enough:
        train.main([*arguments, "--out-dir", out])
    return turns, profiler


@contextlib.contextmanager
def replaced(module, attributes):
    """Let a module have other attributes for a while."""
    originals = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(originals)


def time_shares(profiler, device):
    """{group of operators: share of the time}, in which nothing is counted twice. On MPS it is the
    CPU's time, which it takes to tell the GPU what to do."""
    shares = dict.fromkeys([*GROUPS, "everything else"], 0)
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time the operator that launched it has already
        seconds = event.self_cpu_time_total
        if device.type == "cuda":
            seconds = event.self_device_time_total
        groups = [name for name, start in GROUPS.items() if event.key.startswith(start)]
        shares[groups[0] if groups else "everything else"] += seconds
    return {group: seconds / sum(shares.values()) for group, seconds in shares.items()}


@torch.no_grad()
def sampling_rates(model, device, n, steps=5):
    """Pictures a second of sample.generate and, in turns with it, of bare forward passes."""
    y, size = torch.zeros(n, dtype=torch.long), train.IMAGE_SIZE
    z = torch.randn(2 * n, 3, size, size, device=device)
    t, y_both = torch.full((2 * n,), 0.5, device=device), torch.cat([y, y]).to(device)

    def bare():
        with autocast(device):
            for _ in range(steps):
                model(z, t, y_both)
        wait(device)

    def whole():
        list(sample.generate(model, y, steps=steps, cfg_scale=3.0))

    best = {bare: math.inf, whole: math.inf}
    for _ in range(ROUNDS + 1):
        for run in best:
            start = time.perf_counter()
            run()
            best[run] = min(best[run], time.perf_counter() - start)
    return n / best[whole], n / best[bare]


def main():
    options, settings = train.parse_flags(description=__doc__)
    if "resume" in options:
        raise UserError("--resume: there is no run to continue, as every measurement begins anew")
    vars(train).update(train.PRESETS.get(options.get("preset"), {}) | settings)
    common.check_settings(vars(train))
    device, n, size = pick_device(train.DEVICE), train.BATCH_SIZE, train.IMAGE_SIZE
    torch.set_float32_matmul_precision("high")
    images = torch.randint(256, (max(n, 64), 3, size, size), dtype=torch.uint8).to(device)
    labels = torch.randint(len(CLASSES), (len(images),)).to(device)

    flops = common.flops_per_image(train.new_model, ["any"], train.rectified_flow_loss)
    model = train.new_model(CLASSES)
    parameters = sum(weight.numel() for weight in model.parameters())
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{device}{threads}, torch {torch.__version__}, batches of {n}")
    # Weights, gradients, two moments, average: five numbers of four bytes for each parameter.
    one = [x[:1].cpu() for x in train.random_batch(images, labels, len(CLASSES), 0)]
    fixed, kept = 20 * parameters, activation_bytes(model, one)
    print(f"memory in fp32, computed: {fixed / 2**20:,.0f} MiB,", end=" ")
    step_bytes = fixed + math.ceil(n / train.ACCUMULATE) * kept
    print(f"and {kept / 2**20:,.1f} MiB per image: {step_bytes / 2**30:.2f} GiB a step")
    rate, steps = matmul_rate(device), train.STEPS
    ways = {"on": [True], "off": [False]}.get(settings.get("COMPILE"), [False, True])
    for compiled in ways:
        print("compiled:" if compiled else "as it is:")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        turns, profiler = measure_training(images, labels, sys.argv[1:], compiled)
        ours, plain = map(min, zip(*turns))
        ratios = sorted(theirs / own for own, theirs in turns)
        speed = flops * n / ours
        print(f"  {1000 * ours:.2f} ms a step: {n / ours:,.1f} images/s,", end=" ")
        print(f"{speed / 1e12:.3f} TFLOP/s, {100 * speed / rate:.0f}% of", end=" ")
        print(f"{rate / 1e12:.3f} for large matrices in the same precision")
        print(f"  a run of {steps} steps: {flops * n * steps / 1e15:.3g} PFLOP,", end=" ")
        print(f"{ours * steps / 60:,.1f} minutes")
        print(f"  plain step {1000 * plain:.2f} ms:", end=" ")
        print(f"{statistics.median(ratios):.2f} times ours", end=" ")
        print(f"({ratios[0]:.2f} to {ratios[-1]:.2f})")
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            print(f"  peak memory, the plain network included: {peak:.2f} GiB")
        for group, share in time_shares(profiler, device).items():
            print(f"  {100 * share:5.1f}% {group}")
    model = model.to(device).eval()
    rate, bare = sampling_rates(model, device, min(n, sample.MAX_BATCH))
    print(f"sampling in 5 steps: {rate:,.1f} images/s,", end=" ")
    print(f"{100 * rate / bare:.0f}% of bare forward passes")


if __name__ == "__main__":
    common.run_command(main, if_out_of_memory="lower --batch-size")
