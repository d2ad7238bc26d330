"""How few network evaluations does a picture need? Samples in many ways and scores each.

    python -m experiments.sampling out --held-out butterflies-held-out        # photographs
    python -m experiments.sampling out --drawn                                # the laptop model
    python -m experiments.sampling out --drawn --seeds 0 1 2 --samples 14 --only default "150 steps"

Prints a table with a row for each way. evaluations: how often the network runs per picture, two per
step with guidance. KID: kernel distance (experiments/score.py) of the samples to pictures that were
not trained on; the mean and the standard deviation over seeds.

Rows differ in steps, guidance scale and fresh noise (eta), as sample.py does; in the interval of t
within which guidance acts (Kynkaanniemi et al. 2024, arXiv 2404.07724); in the spacing of the steps
(shifted as in Esser et al. 2024, arXiv 2403.03206: above 1 more of them near the noise); and in the
method: Heun's takes the mean of the velocities at both ends of a step, for almost twice the
evaluations.
"""

import statistics
from pathlib import Path

from support.machine import autocast
from support.settings import UserError, limited, new_parser, run_command

import torch

import sample
from data.drawn import draw_butterflies
from data.images import load_images
from experiments.score import SIZE, features, kernel_distance, resized
from model import DiT

# The first group is what sample.py can do; integrate() takes the second. Where a row says nothing
# else, there are 25 steps with the network's own guidance.
ROWS = {
    "default": {},
    "5 steps": {"steps": 5},
    "8 steps": {"steps": 8},
    "12 steps": {"steps": 12},
    "17 steps": {"steps": 17},
    "150 steps": {"steps": 150},
    "150 steps, scale 5": {"steps": 150, "scale": 5.0},
    "scale 1": {"scale": 1.0},
    "scale 1.5": {"scale": 1.5},
    "scale 2": {"scale": 2.0},
    "scale 4": {"scale": 4.0},
    "eta 0.5": {"eta": 0.5},
    "eta 1": {"eta": 1.0},
    "eta 1, 50 steps": {"steps": 50, "eta": 1.0},
    "eta 1, scale 2": {"scale": 2.0, "eta": 1.0},
    "eta 1, scale 4": {"scale": 4.0, "eta": 1.0},
    "guided from t = 0.9 to 0.2": {"interval": (0.2, 0.9)},
    "12 steps, shift 2": {"steps": 12, "shift": 2.0},
    "Heun, 6 steps": {"steps": 6, "heun": True},
    "Heun, 12 steps": {"steps": 12, "heun": True},
}


def integrate(model, class_ids, noise, steps, scale, interval=(0.0, 1.0), shift=1.0, heun=False):
    """From noise to x (B,3,S,S), and how often the network ran per picture."""
    low, high = interval
    y_both = torch.cat([class_ids, torch.full_like(class_ids, model.num_classes)])
    runs = 0

    def velocity(z, now):
        nonlocal runs
        t = torch.full((len(z),), now)
        if scale == 1 or not low <= now <= high:
            runs += 1
            return model(z, t, class_ids)
        runs += 2
        v_both = model(torch.cat([z, z]), torch.cat([t, t]), y_both)
        v_class, v_null = v_both.chunk(2)
        return v_null + scale * (v_class - v_null)

    times = [1 - i / steps for i in range(steps + 1)]
    times = [shift * t / (1 + (shift - 1) * t) for t in times]
    z = noise
    for now, then in zip(times, times[1:]):
        v = velocity(z, now)
        if heun and then > 0:  # at t = 0 the velocity is not defined: the last step is Euler's
            at_the_end = velocity(z - (now - then) * v, then)
            v = (v + at_the_end) / 2
        z = z - (now - then) * v
    return z, runs


@torch.no_grad()
def samples(model, each, seed, steps=sample.DEFAULT_STEPS, scale=None, eta=0, **way):
    """uint8 pictures, `each` of every class, and how often the network ran per picture."""
    if scale is None:
        scale = model.cfg_scale
    class_ids = torch.arange(model.num_classes).repeat_interleave(each)
    if not way:
        batches = sample.generate(model, class_ids, seed, steps, scale, eta)
        return torch.cat(list(batches)), steps if scale == 1 else 2 * steps
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for y in class_ids.split(sample.MAX_BATCH):
        shape = (len(y), 3, model.image_size, model.image_size)
        noise = torch.randn(shape, generator=generator)
        with autocast(noise.device):
            x, runs = integrate(model, y, noise, steps, scale, **way)
        pictures.append(sample.to_uint8(x))
    return torch.cat(pictures), runs


def load_real(flags, model):
    """Pictures to compare with, uint8 (N,3,64,64): of a folder, or drawn."""
    if not flags.drawn:
        return load_images(flags.held_out, SIZE)[0]
    images, _, class_names = draw_butterflies(14, SIZE, seed=1)
    if class_names != model.class_names:
        raise UserError(f"{flags.checkpoint} was not trained on drawn butterflies")
    return images


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", help="a folder or a Hub id")
    against = parser.add_mutually_exclusive_group(required=True)
    text = "real pictures to compare with"
    against.add_argument("--held-out", type=Path, metavar="FOLDER", help=text)
    text = "compare with freshly drawn butterflies"
    against.add_argument("--drawn", action="store_true", help=text)
    text = f"only these rows (default: all): {'; '.join(ROWS)}"
    parser.add_argument("--only", nargs="+", default=ROWS, choices=ROWS, metavar="ROW", help=text)
    text = "samples per class (default: %(default)s)"
    parser.add_argument("--samples", type=limited(int, 1), default=5, metavar="N", help=text)
    text = "seeds of the noise (default: 0)"
    whole = limited(int, 0)
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0], metavar="N", help=text)
    flags = parser.parse_args()
    model = DiT.from_pretrained(flags.checkpoint)
    real = features(load_real(flags, model))
    count = flags.samples * model.num_classes
    seeds = " ".join(map(str, flags.seeds))
    print(f"| {count} samples, seeds {seeds} | evaluations | KID |")
    print("|---|---|---|")
    for name in flags.only:
        kids = []
        for seed in flags.seeds:
            pictures, runs = samples(model, flags.samples, seed, **ROWS[name])
            kids.append(kernel_distance(features(resized(pictures)), real))
        kid = f"{statistics.mean(kids):.0f}"
        if len(kids) > 1:
            kid += f" ± {statistics.stdev(kids):.0f}"
        print(f"| {name} | {runs} | {kid} |", flush=True)


if __name__ == "__main__":
    run_command(main)
