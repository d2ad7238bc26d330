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

from support.machine import autocast
from support.settings import MAX_SEED, UserError, expanded, limited, new_parser, run_command

import torch

import sample
from data.drawn import draw_butterflies
from data.images import load_images
from experiments.score import SIZE, features, kernel_distance, resized
from model import DiT

# Arguments of samples(). Where a row says nothing else, there are 25 steps with the network's own
# guidance.
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


def guided_within(model, class_ids, scale, interval):
    """The velocity with guidance for t in (low, high], and without it elsewhere."""
    guided = sample.guided(model, class_ids, scale)
    plain = sample.guided(model, class_ids, 1)
    low, high = interval

    def velocity(z, t):
        return guided(z, t) if low < t[0] <= high else plain(z, t)

    return velocity


def heun_states(velocity, noise, times):
    """Like sample.euler_states, but by Heun's method."""
    z = noise
    yield z
    for t, t_next in zip(times, times[1:]):
        if t_next > 0:
            # Two Euler steps of this length go by the velocities at both ends of the step. Half of
            # their way is one step by the mean of these velocities.
            *_, z_ahead = sample.euler_states(velocity, z, [t, t_next, 2 * t_next - t])
            z = (z + z_ahead) / 2
        else:  # at t = 0 the velocity is not defined
            *_, z = sample.euler_states(velocity, z, [t, t_next])
        yield z


def samples(
    model,
    each,
    seed,
    steps=sample.DEFAULT_STEPS,
    scale=None,
    eta=0,
    interval=(0, 1),
    shift=1,
    heun=False,
):
    """uint8 pictures, `each` of every class, and how often the network ran per picture. In all
    ways, a picture begins with the noise that sample.generate gives it."""
    if scale is None:
        scale = model.cfg_scale
    times = [shift * t / (1 + (shift - 1) * t) for t in sample.uniform_times(steps)]
    class_ids = torch.arange(model.num_classes).repeat_interleave(each)
    counts = []  # of pictures, each time that the network runs
    hook = model.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    pictures = []
    for places in torch.arange(len(class_ids)).split(sample.MAX_BATCH):
        randn_like = sample.randn_like_of_places(seed, places.tolist())
        noise = randn_like(torch.empty(len(places), 3, model.image_size, model.image_size))
        velocity = guided_within(model, class_ids[places], scale, interval)
        velocity = autocast(noise.device)(velocity)
        if heun:
            states = heun_states(velocity, noise, times)
        else:
            states = sample.euler_states(velocity, noise, times, eta, randn_like)
        for z in states:
            pass
        pictures.append(sample.to_uint8(z))
    hook.remove()
    return torch.cat(pictures), sum(counts) // len(class_ids)


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
    against.add_argument("--held-out", type=expanded, metavar="FOLDER", help=text)
    text = "compare with freshly drawn butterflies"
    against.add_argument("--drawn", action="store_true", help=text)
    text = f"only these rows (default: all): {'; '.join(ROWS)}"
    parser.add_argument("--only", nargs="+", default=ROWS, choices=ROWS, metavar="ROW", help=text)
    text = "samples per class (default: %(default)s)"
    parser.add_argument("--samples", type=limited(int, 1), default=5, metavar="N", help=text)
    text = "seeds of the noise (default: 0)"
    seed = limited(int, 0, MAX_SEED)
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0], metavar="N", help=text)
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
