"""A lab notebook: what does each line of the recipe buy? Variants trained at equal compute.

    python experiments/ablations.py screening --dataset butterflies --held-out butterflies-held-out
    python experiments/ablations.py finalists --dataset butterflies --held-out butterflies-held-out
    python experiments/ablations.py screening --only "no QK-norm" "v predicted" ...
    python experiments/ablations.py screening --size default ...   # train.py's own network: a GPU
    python experiments/ablations.py screening --table              # only the table and the plot

This script patches the network and the training at run time: it replaces methods of DiT, the
attention function of PyTorch and the optimizer, each within a process of its own. It is here so
that the figures in RESULTS.md can be measured again, and it holds the variants quoted there. Do not
read it to learn how nanoDiT works.

Each variant is the recipe of train.py with one thing changed: a constant where it is one, else a
function below. Every row of a stage trains for the same number of floating-point operations,
counted from its network, so a variant that costs twice as much sees half the pictures. A finished
row is kept in experiments/ablations.csv and not run again; a row that was interrupted is resumed.
Then experiments/ablations-<stage>.md and .png are written from all rows.

loss: held-out velocity error of the EMA weights at five t, on the pictures that train.py holds out
of --dataset. kid: kernel distance (experiments/score.py) of samples to the --held-out pictures.
"""

import csv
import functools
import math
import multiprocessing
import shlex
import statistics
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import model as network  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data.images import load_images  # noqa: E402
from experiments.plot_loss import pyplot, save_figure  # noqa: E402
from experiments.score import SIZE, features, frechet_distance, kernel_distance  # noqa: E402
from model import UserError  # noqa: E402

# The small network of the rows that two CPU cores run; everything else is as in train.py.
SMALL = {"PATCH_SIZE": 8, "DIM": 128, "DEPTH": 6, "HEADS": 4, "BATCH_SIZE": 16}
SMALL |= {"LEARNING_RATE": 4e-3, "DEVICE": "cpu"}


# Variants that are no constant: each function changes the loaded modules of its own process.


def after_initialize(change):
    """Let change(dit) alter every new network, once its weights have their starting values."""
    initialize = network.DiT.initialize

    def initialize_and_change(dit):
        initialize(dit)
        change(dit)

    network.DiT.initialize = initialize_and_change


def change_batches(change):
    """Let change(x, y, t, noise) alter every training batch."""
    random_batch = train.random_batch
    train.random_batch = lambda *arguments: change(*random_batch(*arguments))


def change_optimizer(**options):
    """AdamW with other options than train.py's."""
    AdamW = torch.optim.AdamW
    torch.optim.AdamW = lambda weights, **own: AdamW(weights, **{**own, **options})


def predict_v():
    """What the network puts out is v itself, instead of the x in v = (z_t - x) / t."""
    forward = network.DiT.forward
    network.MIN_T = train.MIN_T = 1e-6  # v needs no bound, so no t counts as a larger one

    def put_out(dit, z, t, y):
        return z.float() - t.float()[:, None, None, None] * forward(dit, z, t, y)

    network.DiT.forward = put_out


def path_around():
    """A share of z_t, which c decides for each pixel of a patch, goes past the blocks into x."""

    def change(dit):
        dit.path = nn.Linear(dit.final_layer.in_features, dit.final_layer.out_features)
        nn.init.zeros_(dit.path.weight)
        nn.init.zeros_(dit.path.bias)

    def with_path(dit, z, t, y):
        P, side = dit.patch_size, dit.image_size // dit.patch_size
        c = F.silu(dit.timestep_embedding(network.timestep_features(t)) + dit.class_embedding(y))
        share = dit.path(c).view(len(z), 3, P, P).repeat(1, 1, side, side)
        return forward(dit, z, t, y) - share * z / t.float()[:, None, None, None]

    forward = network.DiT.forward
    network.DiT.forward = with_path
    after_initialize(change)


def bottleneck(width=64):
    def change(dit):
        layer = dit.patch_embedding
        narrow = nn.Linear(layer.in_features, width, bias=False)
        dit.patch_embedding = nn.Sequential(narrow, nn.Linear(width, layer.out_features))

    after_initialize(change)


class Positions(nn.Module):
    """Adds the sines and cosines of DiT to the tokens (B, T, dim): half for the row, half for the
    column of each."""

    def __init__(self, side, dim):
        super().__init__()
        angles = torch.outer(torch.arange(side), 1e-4 ** (torch.arange(dim // 4) / (dim // 4)))
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        table = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x):
        return x + self.table


def no_positions():
    def change(dit):
        dit.positions.requires_grad_(False).zero_()

    after_initialize(change)


def sin_cos():
    def change(dit):
        positions = Positions(dit.image_size // dit.patch_size, dit.patch_embedding.out_features)
        dit.patch_embedding = nn.Sequential(dit.patch_embedding, positions)

    no_positions()
    after_initialize(change)


def rotary():
    """2-D rotary positions (Su et al. 2021, arXiv 2104.09864) instead of learned ones: half of each
    head turns with the token's row, half with its column, by 1 radian a token down to 1/100."""

    def turn(x):
        T, D = x.shape[2:]
        side = math.isqrt(T)
        angles = torch.outer(torch.arange(side), 100.0 ** -(torch.arange(D // 4) / (D // 4)))
        angles = torch.cat([angles.repeat_interleave(side, 0), angles.repeat(side, 1)], dim=-1)
        angles = F.pad(angles, (0, 0, T - side**2, 0)).to(x.device)  # others go in front, unturned
        a, b = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    no_positions()
    attend = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v: attend(turn(q), turn(k), v)


def fixed_scale():
    """Queries and keys are normed, but how sharply a head looks is not learned."""

    def change(dit):
        for block in dit.blocks:
            block.attention.scale.requires_grad_(False)

    after_initialize(change)


def no_qk_norm():
    """Queries and keys as they come, of any length."""

    def attend(attention, x):
        heads = attention.qkv(x).unflatten(2, (3, attention.heads, -1))
        x = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))
        return attention.out(x.transpose(1, 2).flatten(2))

    network.Attention.forward = attend


class InContext(nn.Module):
    """The blocks, with more tokens in front that are made of the condition c."""

    def __init__(self, blocks, dim, tokens=4):
        super().__init__()
        self.blocks, self.shape = blocks, (tokens, dim)
        self.tokens = nn.Linear(dim, tokens * dim)

    def forward(self, x, c):
        tokens = self.tokens(c)
        x = torch.cat([tokens.unflatten(1, self.shape), x], dim=1)
        for block in self.blocks:
            x = block(x, c)
        return x[:, self.shape[0] :]


def class_tokens():
    def change(dit):
        dim = dit.patch_embedding.out_features
        dit.blocks = nn.ModuleList([InContext(dit.blocks, dim)])

    after_initialize(change)


class Scaled(nn.Module):
    """Adam moves all weights alike: what is multiplied by 3 moves three times as fast."""

    def __init__(self, layer, scale):
        super().__init__()
        self.layer, self.scale = layer, scale

    def forward(self, x):
        return self.scale * self.layer(x)


def class_start(std, scale):
    def change(dit):
        nn.init.normal_(dit.class_embedding.weight, std=std)
        dit.class_embedding = Scaled(dit.class_embedding, scale)

    after_initialize(change)


fast_classes = functools.partial(class_start, 1 / 3, 3)


def xavier_start():
    """Glorot & Bengio 2010, as in DiT: for the layers that do not start at zero."""

    def change(dit):
        zeros = ("modulation", "final_layer", "path")
        for name, layer in dit.named_modules():
            if isinstance(layer, nn.Linear) and not name.endswith(zeros):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    after_initialize(change)


def few_pictures(each):
    """Training sees the first `each` pictures of a class; held out are the same as ever."""
    load_dataset, held_out = train.load_dataset, train.held_out
    kept = []

    def load(*arguments):
        images, labels, names = load_dataset(*arguments)
        val = held_out(labels)
        place = torch.cat([torch.arange(n) for n in torch.bincount(labels[~val])])
        keep = val.clone()
        keep[~val] = place < each
        kept[:] = [val[keep]]
        return images[keep], labels[keep], names

    train.load_dataset, train.held_out = load, lambda labels: kept[0]


def uniform_t():
    generator = torch.Generator().manual_seed(0)

    def change(x, y, t, noise):
        t = torch.rand(len(t), generator=generator).to(t.device).clamp_min(train.MIN_T)
        return x, y, t, noise

    change_batches(change)


def seed_recipe():
    """What no constant says of DiT as this project's predecessor trained it."""
    xavier_start()
    predict_v()
    sin_cos()
    no_qk_norm()
    class_start(0.02, 1)
    uniform_t()
    change_optimizer(betas=(0.9, 0.999), weight_decay=0.01)


SEED = {"LEARNING_RATE": 1e-4, "WARMUP_STEPS": 1, "DECAY_SHARE": 0.0}
SEED |= {"EMA_DECAY": 0.0, "FLIP_SHARE": 0.0, "GRAD_CLIP": 1e9, "BATCH_SIZE": 128}

# Screening began with another recipe than train.py has now, in part by its results. Its rows,
# "default" too, are compared with that one: with these functions, but for rows that say so.
T_BEFORE = {"T_MEAN": 0.8}
BEFORE = (path_around, rotary, fixed_scale, xavier_start, fast_classes)
WITHOUT = {
    "no path around the blocks": [path_around],
    "t mean 0.4, no path around the blocks": [path_around],
    "learned positions": [rotary],
    "sin-cos positions": [rotary],
    "PyTorch's own start of weights": [xavier_start],
    "class embedding at the common rate": [fast_classes],
    "predecessor, patch 8": BEFORE,  # has its own
}


def before(without=()):
    for function in BEFORE:
        if function not in without:
            function()


LONGEST_BAR = 30  # percent, in the plot of the screening

# name -> constants that differ from the default, and a function that changes the modules
VARIANTS = {
    "default": ({}, None),
    "v predicted": ({}, predict_v),
    "no path around the blocks": ({}, None),
    "predecessor, patch 8": ({**SEED, "PATCH_SIZE": 8}, seed_recipe),
    "t mean 0.4": ({"T_MEAN": 0.4}, None),
    "patch 4": ({"PATCH_SIZE": 4}, None),
    "t mean 0.4, no path around the blocks": ({"T_MEAN": 0.4}, None),
    "t mean 0.4, no QK-norm": ({"T_MEAN": 0.4}, no_qk_norm),
    "t uniform": ({}, uniform_t),
    "width 192": ({"DIM": 192, "HEADS": 6}, None),
    "sin-cos positions": ({}, sin_cos),
    "no QK-norm": ({}, no_qk_norm),
    "learned positions": ({}, None),
    "PyTorch's own start of weights": ({}, None),
    "no EMA": ({"EMA_DECAY": 0.0}, None),
    "class tokens in context": ({}, class_tokens),
    "bottleneck 64": ({}, bottleneck),
    "batch 8": ({"BATCH_SIZE": 8}, None),
    "patch 4, v predicted": ({"PATCH_SIZE": 4}, predict_v),
    "batch 32": ({"BATCH_SIZE": 32}, None),
    "class embedding at the common rate": ({}, None),
    **{f"learning rate {r:g}": ({"LEARNING_RATE": r}, None) for r in (2e-3, 8e-3)},
}
FINALISTS = {"recipe before": (T_BEFORE, before)}
LONG = {"ten pictures a class": ({}, functools.partial(few_pictures, 10))}
HEAD_TO_HEAD = {  # smaller pictures, or patches of 2 would take a day
    "32x32: predecessor, patch 2": ({**SEED, "IMAGE_SIZE": 32, "PATCH_SIZE": 2}, seed_recipe),
    "32x32: default": ({"IMAGE_SIZE": 32, "PATCH_SIZE": 4}, None),
}

# stage -> its rows, variants with the TFLOP they train for; random seeds; samples a class, and
# their steps. The guidance scale is the best of `guidance`, found with `search` samples a class.
LONG_ROWS = {
    "compile": True,
    "bf16": False,
    "seeds": [0],
    "samples": 14,
    "steps": 25,
    "guidance": [2.0, 3.0, 4.0, 5.0, 6.0],
    "search": 5,
}
STAGES = {
    "screening": {
        "rows": {variant: [12] for variant in VARIANTS},
        "compile": False,
        "bf16": False,
        "seeds": [0],
        "samples": 5,
        "steps": 15,
        "guidance": [2.0],
    },
    "finalists": {
        **LONG_ROWS,
        "rows": {variant: [90] for variant in ("default", *FINALISTS)},
        "seeds": [0, 1, 2],
    },
    "head-to-head": {
        **LONG_ROWS,
        "rows": {
            "32x32: predecessor, patch 2": [320, 720],
            "32x32: default": [2, 4, 8, 16],
        },
        "bf16": True,  # the predecessor's 256 tokens gain most
        "guidance": [1.5, 3.0, 5.0],
        "search": 2,
    },
    "long": {
        **LONG_ROWS,
        "rows": {"default": [180], "no QK-norm": [180], "ten pictures a class": [60]},
        "search": 2,
    },
}
ALL = {**VARIANTS, **FINALISTS, **HEAD_TO_HEAD, **LONG}
T = [f"loss_{t}" for t in train.EVAL_T]
COLUMNS = ["stage", "size", "variant", "seed", "tflop", "parameters", "gflop_image", "images"]
COLUMNS += ["minutes", *T, "guidance", "kid", "frechet", "curve", "train_curve"]


def record_loss_on(images, labels, path):
    """Whenever train.py takes the held-out loss, note the same loss on pictures trained on."""
    validation_loss = train.validation_loss

    def both(dit, *data, **options):
        if not options:  # one that train.py takes
            with open(path, "a") as file:
                file.write(f"{validation_loss(dit, images, labels):.4f} ")
        return validation_loss(dit, *data, **options)

    train.validation_loss = both


def train_row(row, flags, real, stage):
    """Train, measure and append one row to the table: to be run in a process of its own."""
    settings, change = ALL[row["variant"]]
    if row["stage"] == "screening":
        settings = {**T_BEFORE, **settings}
        before(WITHOUT.get(row["variant"], ()))
    settings = {**(SMALL if row["size"] == "small" else {}), **settings, "SEED": int(row["seed"])}
    if change:
        change()
    train.load_dataset = functools.cache(train.load_dataset)  # read here and again by train.main
    vars(train).update({**settings, "DATASET": flags.dataset})
    flops = common.flops_per_image(train.new_model, ["any"], train.rectified_flow_loss)
    batch = train.BATCH_SIZE
    steps = max(1, round(float(row["tflop"]) * 1e12 / (flops * batch)))
    # Without decay of the rate a longer run begins as a shorter one does: it can go on from it.
    length = "" if train.DECAY_SHARE == 0 else f"-{row['tflop']}"
    out = flags.runs / f"{row['size']}-{row['variant'].replace(' ', '-')}-{row['seed']}{length}"
    settings |= {"DATASET": flags.dataset, "OUT_DIR": str(out), "STEPS": steps}
    settings |= {"EVAL_EVERY": max(1, steps // 10), "CHECKPOINT_EVERY": max(1, steps // 20)}
    settings["SAMPLE_EVERY"] = max(1, steps // 4)
    words = [f"--{name.lower().replace('_', '-')}={value}" for name, value in settings.items()]
    if (out / "train_state.pt").exists():
        words.append("--resume")
    print("+ train.py", shlex.join(words), flush=True)
    device = common.pick_device(train.DEVICE)
    images, labels, _ = train.load_dataset(train.DATASET, train.IMAGE_SIZE)
    val = train.held_out(labels)
    seen = torch.arange(len(labels))[~val][:: max(1, (~val).sum() // val.sum().clamp_min(1))]
    record_loss_on(images[seen].to(device), labels[seen].to(device), out / "train-curve.txt")
    words += ["--compile", "on" if stage["compile"] else "off"]
    words += ["--precision", "auto" if stage["bf16"] else "fp32"]
    train.main(words)

    dit = common.load_model(out).to(device)
    data = images[val].to(device), labels[val].to(device)
    losses = [train.validation_loss(dit, *data, times=(t,)) for t in train.EVAL_T]
    with open(out / "log.csv") as file:
        log = list(csv.DictReader(file))
    row |= {"parameters": sum(w.numel() for w in dit.parameters()), "images": steps * batch}
    row |= {"gflop_image": f"{flops / 1e9:.4f}", "minutes": f"{float(log[-1]['seconds']) / 60:.2f}"}
    row |= {name: f"{loss:.5f}" for name, loss in zip(T, losses)}
    spent = [f"{int(line['step']) * batch * flops / 1e12:.3g}" for line in log]
    curve = [f"{float(line['val_loss']):.4f}" for line in log]
    row["curve"] = " ".join(map(":".join, zip(spent, curve)))
    row["train_curve"] = (out / "train-curve.txt").read_text().strip()
    if real is not None:
        row |= score(dit, torch.load(real), stage)
    write_row(row, flags.output / "ablations.csv", COLUMNS)


def score(dit, real, stage):
    """Distances at the guidance scale that comes nearest with few samples, taken with many."""

    def samples(each, scale):
        classes = torch.arange(dit.num_classes).repeat_interleave(each)
        pictures = torch.cat(list(sample.generate(dit, classes, 0, stage["steps"], scale)))
        return features(F.interpolate(pictures.float(), SIZE, mode="bicubic").clamp(0, 255))

    (scale, *others) = stage["guidance"]
    if others:
        kids = {w: kernel_distance(samples(stage["search"], w), real) for w in stage["guidance"]}
        print("kernel distance by guidance:", kids, flush=True)
        scale = min(kids, key=kids.get)
    seen = samples(stage["samples"], scale)
    kid, frechet = kernel_distance(seen, real), frechet_distance(seen, real)
    return {"guidance": scale, "kid": f"{kid:.1f}", "frechet": f"{frechet:.1f}"}


def read_rows(path):
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def write_row(row, path, columns):
    """Add a row to a CSV file, by renaming a whole file."""
    rows = [*read_rows(path), row]

    def write(beside):
        with open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    common.write_beside(path, write)


def spread(rows, column, digits):
    """Mean of a column, and plus or minus the standard deviation of several seeds."""
    values = [float(row[column]) for row in rows if row[column]]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def write_table(stage, folder):
    """ablations-<stage>.md: a line a variant, best first: by kernel distance, or where rows have
    none, by the geometric mean of the five losses, in which each of them weighs alike."""
    groups = {}
    for row in read_rows(folder / "ablations.csv"):
        if row["stage"] == stage:
            groups.setdefault((row["variant"], row["size"], row["tflop"]), []).append(row)
    head = ["variant", *(f"t = {t}" for t in train.EVAL_T), "KID", "guidance", "TFLOP", "images"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    scored = all(row["kid"] for rows in groups.values() for row in rows)

    def order(item):
        if scored:
            return statistics.mean(float(row["kid"]) for row in item[1])
        losses = ([float(row[name]) for name in T] for row in item[1])
        return statistics.mean(map(statistics.geometric_mean, losses))

    for (variant, _, tflop), rows in sorted(groups.items(), key=order):
        cells = [variant, *(spread(rows, name, 3) for name in T), spread(rows, "kid", 0)]
        cells += [", ".join(sorted({row["guidance"] for row in rows} - {""})), tflop]
        lines.append("| " + " | ".join([*cells, f"{int(rows[0]['images']):,}"]) + " |")
    path = folder / f"ablations-{stage}.md"
    path.write_text("\n".join(lines) + "\n")
    print(path)


def draw_curves(stage, folder):
    """ablations-<stage>.png: mean held-out loss against training FLOPs, a line a row."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rows = [
        row
        for row in read_rows(folder / "ablations.csv")
        if row["stage"] == stage and row["seed"] == "0"
    ]
    rows.sort(key=lambda row: -float(row["curve"].split(":")[-1]))
    lengths = len({row["tflop"] for row in rows}) > 1  # then a label says which
    for i, row in enumerate(rows):
        points = [tuple(map(float, pair.split(":"))) for pair in row["curve"].split()]
        style = {"color": "black", "lw": 2.5, "zorder": 3} if row["variant"] == "default" else {}
        style = style or {"color": plt.cm.turbo(i / len(rows)), "lw": 1}
        label = row["variant"] + f", {row['tflop']} TFLOP" * lengths
        axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel="training TFLOP", ylabel="held-out velocity error", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.legend(fontsize=6, loc="outside right upper")
    path = folder / f"ablations-{stage}.png"
    save_figure(figure, path)
    plt.close(figure)
    print(path)


def draw_differences(folder):
    """ablations-screening.png: by how much the loss of each variant differs from the recipe's, in a
    panel for each t. The grey band is twice the standard deviation of the recipe's seeds."""
    plt = pyplot()
    rows = [row for row in read_rows(folder / "ablations.csv") if row["stage"] == "screening"]
    recipe = [row for row in rows if row["variant"] == "default"]
    others = [row for row in rows if row["variant"] != "default" and row["seed"] == "0"]
    if not recipe or not others:
        return
    means = {name: statistics.mean(float(row[name]) for row in recipe) for name in T}

    def difference(row, name):
        return 100 * (float(row[name]) / means[name] - 1)

    others.sort(key=lambda row: -statistics.mean(difference(row, name) for name in T))
    size = (11, 1.2 + 0.22 * len(others))
    figure, panels = plt.subplots(1, len(T), figsize=size, sharey=True, layout="constrained")
    for name, t, axes in zip(T, train.EVAL_T, panels):
        values = [difference(row, name) for row in others]
        colours = ["C2" if value < 0 else "C3" for value in values]
        names = [row["variant"].replace("predecessor", "predecessor's recipe") for row in others]
        axes.barh(names, values, color=colours, zorder=2)
        if len(recipe) > 1:
            band = 200 * statistics.stdev(float(row[name]) for row in recipe) / means[name]
            axes.axvspan(-band, band, color="0.75", zorder=1)
        axes.axvline(0, color="black", lw=0.8, zorder=3)
        for position, value in enumerate(values):
            if value > LONGEST_BAR:
                axes.text(LONGEST_BAR, position, f"+{value:.0f}% ", ha="right", va="center", size=7)
        axes.set(xlim=(-LONGEST_BAR, LONGEST_BAR), title=f"t = {t}")
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("difference of the held-out loss from the recipe's, in percent", size=10)
    path = folder / "ablations-screening.png"
    save_figure(figure, path, dpi=100)
    plt.close(figure)
    print(path)


def check_only(flags, rows):
    """UserError if --only names something that is no row."""
    for name in flags.only or []:
        if name not in rows:
            raise UserError(f'--only "{name}" is none of: {", ".join(rows)}')


def parse_flags():
    parser = common.new_parser(__doc__)
    add = parser.add_argument
    add("stage", choices=[*STAGES], help="how long a row trains, and how it is scored")
    add("--only", nargs="+", metavar="VARIANT", help="these instead of all; see VARIANTS")
    add("--dataset", default="sayakpaul/butteflies_with_classes", help="to train on (%(default)s)")
    add("--held-out", type=Path, metavar="FOLDER", help="real pictures to score samples against")
    add("--size", choices=["small", "default"], default="small", help="(%(default)s)")
    add("--tflop", type=float, help="training TFLOP of a row, instead of the stage's")
    add("--seeds", type=int, nargs="+", help="instead of the stage's")
    add("--runs", type=Path, default=Path("out-ablations"), help="runs go here (%(default)s)")
    add(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        help="where the table goes (experiments)",
    )
    add("--table", action="store_true", help="train nothing: only write the table and the plot")
    flags = parser.parse_args()
    check_only(flags, STAGES[flags.stage]["rows"])
    return flags


def main():
    flags = parse_flags()
    pyplot()  # if it is missing, now is the time to say so
    stage = STAGES[flags.stage]
    rows = [
        (variant, str(seed), f"{tflop:g}")
        for variant in flags.only or stage["rows"]
        for tflop in ([flags.tflop] if flags.tflop else stage["rows"][variant])
        for seed in flags.seeds or stage["seeds"]
        if not flags.table
    ]
    keys = ("stage", "size", "variant", "seed", "tflop")
    known = {tuple(row[key] for key in keys) for row in read_rows(flags.output / "ablations.csv")}
    real = None
    for values in rows:
        row = dict(zip(keys, (flags.stage, flags.size, *values)))
        if tuple(row.values()) in known:
            continue
        flags.runs.mkdir(parents=True, exist_ok=True)
        if flags.held_out and real is None:
            real = flags.runs / "held-out-features.pt"
            torch.save(features(load_images(flags.held_out, SIZE)[0]), real)
        arguments = row, flags, real, stage
        # A new process for each: it starts from the modules as they are written.
        process = multiprocessing.get_context("spawn").Process(target=train_row, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise UserError(f'"{row["variant"]}" ended with status {process.exitcode}: see above')
    write_table(flags.stage, flags.output)
    if flags.stage == "screening":
        draw_differences(flags.output)
    else:
        draw_curves(flags.stage, flags.output)


if __name__ == "__main__":
    common.run_command(main)
