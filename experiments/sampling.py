"""How few network evaluations does a picture need? Samples in many ways and scores each.

    python experiments/sampling.py out --held-out butterflies-held-out        # photographs
    python experiments/sampling.py out --drawn                                # the laptop model
    python experiments/sampling.py out --drawn --seeds 0 1 2 --samples 14 --only default "150 steps"

Rows differ in steps, guidance scale, the interval of t within which guidance acts (Kynkaanniemi et
al. 2024, arXiv 2404.07724), the spacing of the steps (shifted as in Esser et al. 2024, arXiv
2403.03206: above 1 more of them near the noise, below 1 near the data), and in the method: Heun's
takes the mean of the velocities at both ends of a step, for almost twice the evaluations; with eta,
each step replaces part of the noise by fresh noise (Song et al. 2020, arXiv 2010.02502). A finished
row is kept in experiments/sampling.csv, with a checksum of the network's weights and the name of
the held-out folder, and not run again: remove it there if you change what the row means.
sampling-drawn.md or sampling-photographs.md, and .png, show all rows of the network; --output keeps
yours apart from those of this repository.

evaluations: how often the network runs per picture, two per step with guidance. kid: kernel
distance (experiments/score.py) of the samples to pictures that were not trained on.
"""

import statistics
import sys
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import sample  # noqa: E402
from data.drawn import draw_butterflies  # noqa: E402
from data.images import load_images  # noqa: E402
from experiments.ablations import check_only, read_rows, write_row  # noqa: E402
from experiments.plot_loss import pyplot, save_figure  # noqa: E402
from experiments.score import SIZE, features, kernel_distance, resized  # noqa: E402
from model import UserError  # noqa: E402

# Where a row says nothing else. main() takes the network's own guidance scale, which is mostly 3.
BASE = {"steps": 25, "scale": 3.0, "interval": (0.0, 1.0), "shift": 1.0, "heun": False, "eta": 0.0}
ROWS = {
    "default": {"steps": sample.DEFAULT_STEPS},
    "150 steps, scale 5": {"steps": 150, "scale": 5.0},
    "150 steps": {"steps": 150},
    **{f"{n} steps": {"steps": n} for n in (5, 8, 12, 17, 35)},
    **{f"scale {w:g}": {"scale": w} for w in (1.0, 1.5, 2.0, 2.5, 4.0, 6.0)},
    **{
        f"guided from t = {high:g} to {low:g}": {"interval": (low, high)}
        for low, high in ((0.1, 1), (0.2, 1), (0.4, 1), (0, 0.9), (0, 0.8), (0.2, 0.9))
    },
    **{f"shift {s:g}": {"shift": s} for s in (0.5, 0.7, 1.5, 2.0)},
    "12 steps, shift 2": {"steps": 12, "shift": 2.0},
    "Heun, 6 steps": {"steps": 6, "heun": True},
    "Heun, 12 steps": {"steps": 12, "heun": True},
    "eta 0.5": {"eta": 0.5},
    "eta 1": {"eta": 1.0},
    "eta 1, 50 steps": {"steps": 50, "eta": 1.0},
    **{f"eta 1, scale {w:g}": {"eta": 1.0, "scale": w} for w in (2.0, 4.0)},
}
KEY = ["pictures", "weights", "row", "samples", "seed"]
COLUMNS = [*KEY, "evaluations", "kid"]


def integrate(
    model, class_ids, noise, steps, scale, interval, shift, heun, eta, start=1.0, generator=None
):
    """From noise, or z at `start`, to x (B,3,S,S), and how often the network ran per picture.
    generator: of the fresh noise."""
    low, high = interval
    y = torch.cat([class_ids, torch.full_like(class_ids, model.num_classes)])
    runs = 0

    def velocity(z, now):
        nonlocal runs
        t = torch.full((len(z),), now)
        if scale == 1 or not low <= now <= high:
            runs += 1
            return model(z, t, class_ids)
        runs += 2
        v_class, v_null = model(torch.cat([z, z]), torch.cat([t, t]), y).chunk(2)
        return v_null + scale * (v_class - v_null)

    times = [1 - i / steps for i in range(steps + 1)]
    times = [start * shift * t / (1 + (shift - 1) * t) for t in times]
    z = noise
    for now, then in zip(times, times[1:]):
        v = velocity(z, now)
        if heun and then > 0:  # at t = 0 the velocity is not defined: the last step is Euler's
            v = (v + velocity(z - (now - then) * v, then)) / 2
        z = z - (now - then) * v
        if eta > 0:
            z = common.renew_noise(z, then, v, now - then, eta, generator)
    return z, runs


@torch.no_grad()
def samples(model, each, seed, **way):
    """uint8 pictures, `each` of every class, and how often the network ran per picture."""
    classes = torch.arange(model.num_classes).repeat_interleave(each)
    generator = torch.Generator().manual_seed(seed)
    pictures, size = [], model.image_size
    for y in classes.split(sample.MAX_BATCH):
        noise = torch.randn(len(y), 3, size, size, generator=generator)
        with common.autocast(noise.device):
            x, runs = integrate(model, y, noise, **way, generator=generator)
        pictures.append(sample.to_uint8(x))
    return torch.cat(pictures), runs


def checksum(model):
    """A number, as text, that tells networks apart by their weights."""
    value = 0
    for weight in model.state_dict().values():
        value = zlib.crc32(weight.numpy().tobytes(), value)
    return f"{value:08x}"


def grouped(rows):
    """[(row, samples, evaluations, [kid of each seed])], fewest evaluations first."""
    groups = {}
    for row in rows:
        key = row["row"], row["samples"], int(row["evaluations"])
        groups.setdefault(key, []).append(float(row["kid"]))
    groups = [(*key, kids) for key, kids in groups.items()]
    return sorted(groups, key=lambda group: (group[2], statistics.mean(group[3])))


def write_table(rows, path):
    lines = ["| | evaluations | KID | samples | seeds |", "|---|---|---|---|---|"]
    for name, count, evaluations, kids in grouped(rows):
        kid = f"{statistics.mean(kids):.0f}"
        kid += f" ± {statistics.stdev(kids):.0f}" if len(kids) > 1 else ""
        lines.append(f"| {name} | {evaluations} | {kid} | {count} | {len(kids)} |")
    text = "\n".join(lines) + "\n"
    common.write_beside(path, lambda beside: beside.write_text(text, "utf-8"))
    print(path)


def draw_plot(rows, path):
    """Score against network evaluations, both logarithmic; a kind of row, a colour."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    kinds = ("steps", "scale", "guided", "shift", "Heun", "eta", "default")
    points = {kind: ([], []) for kind in kinds}
    for name, _, evaluations, kids in grouped(rows):
        kind = next(kind for kind in reversed(kinds) if kind in name)
        points[kind][0].append(evaluations)
        points[kind][1].append(statistics.mean(kids))
    for kind, (x, y) in points.items():
        axes.plot(x, y, "o-" if kind == "steps" else "o", label=kind)
    axes.set(xlabel="network evaluations per picture", ylabel="kernel distance, x 1000")
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_figure(figure, path)
    plt.close(figure)
    print(path)


def parse_flags():
    parser = common.new_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", help="a folder or a Hub id")
    against = parser.add_mutually_exclusive_group(required=True).add_argument
    against("--held-out", type=Path, metavar="FOLDER", help="real pictures to compare with")
    against("--drawn", action="store_true", help="compare with freshly drawn butterflies")
    add("--only", nargs="+", metavar="ROW", help="only these rows, which ROWS names (default: all)")
    text = "samples per class (default: %(default)s)"
    add("--samples", type=common.int_in_range(1), default=5, metavar="N", help=text)
    text = "seeds of the noise (default: 0)"
    add("--seeds", type=common.int_in_range(0), nargs="+", default=[0], metavar="N", help=text)
    text = "where the rows, the table and the figure go (default: experiments)"
    add("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER", help=text)
    flags = parser.parse_args()
    check_only(flags, ROWS)
    return flags


def main():
    flags = parse_flags()
    pyplot()  # if it is missing, now is the time to say so
    common.make_folder(flags.output)
    model = common.load_model(flags.checkpoint)
    reference = "drawn" if flags.drawn else flags.held_out.resolve().name
    path, weights = flags.output / "sampling.csv", checksum(model)
    known = {tuple(row[name] for name in KEY) for row in read_rows(path)}
    real = None
    for seed in dict.fromkeys(flags.seeds):
        for name in dict.fromkeys(flags.only or ROWS):
            key = reference, weights, name, str(flags.samples * model.num_classes), str(seed)
            if key in known:
                continue
            if real is None:
                if flags.drawn:
                    images, _, class_names = draw_butterflies(14, SIZE, seed=1)
                    if class_names != model.class_names:
                        raise UserError(f"{flags.checkpoint} was not trained on drawn butterflies")
                else:
                    images = load_images(flags.held_out, SIZE)[0]
                real = features(images)
            way = {**BASE, "scale": model.cfg_scale, **ROWS[name]}
            pictures, runs = samples(model, flags.samples, seed, **way)
            kid = kernel_distance(features(resized(pictures)), real)
            row = dict(zip(COLUMNS, (*key, runs, f"{kid:.1f}")))
            print(row, flush=True)
            write_row(row, path, COLUMNS)
    own = {"pictures": reference, "weights": weights}
    rows = [row for row in read_rows(path) if own.items() <= row.items()]
    kind = "drawn" if flags.drawn else "photographs"
    write_table(rows, flags.output / f"sampling-{kind}.md")
    draw_plot(rows, flags.output / f"sampling-{kind}.png")


if __name__ == "__main__":
    common.run_command(main)
