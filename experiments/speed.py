"""What a training step costs, and where its time goes.

    python experiments/speed.py                                 # train.py's constants as they stand
    python experiments/speed.py --preset laptop
    python experiments/speed.py --image-size 128 --batch-size 64   # takes every flag of train.py

Prints parameters, floating-point operations and memory an image; the milliseconds of data, forward,
backward, optimizer and EMA; pictures a second; the share that this is of the machine's own rate of
multiplying matrices (fp32, on CUDA bf16); and, measured in turns with it, the same sizes as a step
of DiT the plain way: this project's predecessor. Then sampling, in turns with nothing but the
network's forward passes on the same batches. Needs no data set: the pictures are noise.
"""

import copy
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from model import autocast, pick_device  # noqa: E402

ROUNDS = 7  # of so many seconds at least, ours and the plain one in turns
SECONDS = 0.5
CLASSES = [str(i) for i in range(75)]


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
    """DiT as this project's predecessor has it: fixed positions, and v is what comes out."""

    def __init__(self, image_size, patch_size, dim, depth, heads):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, patch_size)
        self.positions = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2, dim) / 50)
        self.positions.requires_grad_(False)
        self.timestep_embedding = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_embedding = nn.Embedding(76, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.final_layer = nn.Linear(dim, 3 * patch_size**2)
        self.unpatchify = nn.PixelShuffle(patch_size)

    def forward(self, z, t, y):
        frequencies = torch.exp(-math.log(1e4) * torch.arange(128, device=z.device) / 128)
        angles = 1000 * t[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        c = self.timestep_embedding(waves) + self.class_embedding(y)
        x = self.patch_embedding(z).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=2)
        x = self.final_layer(self.norm(x) * (1 + scale) + shift)
        return self.unpatchify(x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1))).float()


def wait(device):
    """Until the device has done all that it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matmul_rate(device):
    """FLOP a second of the product of two large matrices: the best of many tries."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
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


class Ours:
    """The step of train.py, in parts that can be timed."""

    parts = ("data", "forward", "backward", "optimizer", "EMA")

    def __init__(self, device, data):
        self.device, self.data, self.count = device, data, 0
        self.model = train.new_model(CLASSES).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.weights = list(self.model.parameters())
        options = {"betas": (0.9, 0.95), "weight_decay": 0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, **options)
        if train.COMPILE == "on" or (train.COMPILE == "auto" and device.type == "cuda"):
            self.model.compile()

    def step(self, done=lambda part: None):
        self.count += 1
        batch = train.random_batch(*self.data, len(CLASSES), self.count)
        done("data")
        with autocast(self.device):
            loss = train.rectified_flow_loss(self.model, *batch)
        done("forward")
        loss.backward()
        done("backward")
        torch.nn.utils.clip_grad_norm_(self.weights, train.GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        done("optimizer")
        train.update_ema(self.ema, self.model, self.count)
        done("EMA")


class Plain:
    """The predecessor's step on data that lie ready: bf16 only where ours has it too."""

    def __init__(self, device, data):
        self.device = device
        sizes = {name.lower(): getattr(train, name) for name in train.MODEL_SETTINGS}
        self.model = PlainDiT(**sizes).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x = data[0][: train.BATCH_SIZE].float() / 127.5 - 1
        self.y = data[1][: train.BATCH_SIZE]

    def step(self):
        t = torch.rand(len(self.x), device=self.device)[:, None, None, None]
        noise = torch.randn_like(self.x)
        with autocast(self.device):
            v = self.model((1 - t) * self.x + t * noise, t.flatten(), self.y)
            loss = F.mse_loss(v, noise - self.x)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()


def seconds_a_step(trainer):
    """Mean over as many steps as fill SECONDS, two at least."""
    steps, start = 0, time.perf_counter()
    while steps < 2 or time.perf_counter() - start < SECONDS:
        trainer.step()
        steps += 1
        wait(trainer.device)
    return (time.perf_counter() - start) / steps


def shares(ours, steps=10):
    """part -> median seconds in it, of steps that wait after each part."""
    times = {part: [] for part in ours.parts}

    def done(part):
        nonlocal last
        wait(ours.device)
        times[part].append(time.perf_counter() - last)
        last = time.perf_counter()

    for _ in range(steps):
        last = time.perf_counter()
        ours.step(done)
    return {part: statistics.median(values) for part, values in times.items()}


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
        list(sample.generate(model, y, steps=steps))

    best = {bare: math.inf, whole: math.inf}
    for _ in range(ROUNDS + 1):
        for run in best:
            start = time.perf_counter()
            run()
            best[run] = min(best[run], time.perf_counter() - start)
    return n / best[whole], n / best[bare]


def main():
    options, settings = train.parse_flags()
    vars(train).update(train.PRESETS.get(options.get("preset"), {}) | settings)
    train.check_settings()
    device, n = pick_device(train.DEVICE), train.BATCH_SIZE
    torch.set_float32_matmul_precision("high")
    flops, size = train.flops_per_image(), train.IMAGE_SIZE
    images = torch.randint(256, (max(n, 64), 3, size, size), dtype=torch.uint8).to(device)
    data = images, torch.randint(75, (len(images),)).to(device)
    ours, plain = Ours(device, data), Plain(device, data)
    parameters = sum(w.numel() for w in ours.weights)
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{parameters / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOP per image, batch {n}")
    print(f"{device}{threads}, torch {torch.__version__}")
    # Weights, gradients, two moments, average: five numbers of four bytes for each parameter.
    one = [x[:1].cpu() for x in train.random_batch(*data, 75, 0)]
    fixed, kept = 20 * parameters, activation_bytes(train.new_model(CLASSES), one)
    print(f"memory in fp32, computed: {fixed / 2**20:,.0f} MiB,", end=" ")
    print(f"and {kept / 2**20:,.1f} MiB an image: {(fixed + n * kept) / 2**30:.2f} GiB a step")
    for trainer in (ours, plain):  # the first steps compile and fill caches
        for _ in range(3):
            trainer.step()
    parts = shares(ours)
    turns = [(seconds_a_step(ours), seconds_a_step(plain)) for _ in range(ROUNDS)]
    whole, plainly = map(min, zip(*turns))
    ratios = sorted(theirs / own for own, theirs in turns)
    rate = matmul_rate(device)
    for part, seconds in parts.items():
        print(f"{part:>10} {1000 * seconds:9.2f} ms  {100 * seconds / sum(parts.values()):5.1f}%")
    print(f"{'step':>10} {1000 * whole:9.2f} ms  {n / whole:,.1f} img/s")
    speed = flops * n / whole
    print(
        f"{speed / 1e12:.3f} TFLOP/s: {100 * speed / rate:.0f}% of {rate / 1e12:.3f} for matrices"
    )
    print(f"a run of {train.STEPS} steps: {flops * n * train.STEPS / 1e15:.3g} PFLOP,", end=" ")
    print(f"{whole * train.STEPS / 60:,.1f} minutes")
    print(
        f"plain step {1000 * plainly:9.2f} ms: {ratios[len(ratios) // 2]:.2f} times ours", end=" "
    )
    print(f"({ratios[0]:.2f} to {ratios[-1]:.2f})")
    rate, bare = sampling_rates(ours.ema, device, min(n, sample.MAX_BATCH))
    print(
        f"sampling in 5 steps: {rate:,.1f} img/s, {100 * rate / bare:.0f}% of bare forward passes"
    )
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    common.run_command(main)
