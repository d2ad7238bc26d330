"""The method in one figure, which the README shows.

    python -m experiments.method_figure assets/laptop

(a) A picture x and noise eps, z_t on the line between them, and v along it. (b) A drawn butterfly
that was not trained on, at five t: z_t, the picture that the network predicts from it, and the
velocity. (c) Two dimensions, where everything is known: many straight lines cross, the velocity is
their mean, and its path bends; in few Euler steps it still ends near the data. Needs matplotlib.
"""

from pathlib import Path

from support.settings import UserError, new_parser, png_path, run_command

import torch

import sample
from data.drawn import draw_butterflies
from experiments.plot_loss import pyplot, save_figure
from model import DiT

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
CLASS_ID = 6  # the drawn butterfly of (b)
DATA = torch.tensor([[2.2, 1.6], [2.9, 0.5], [2.4, -1.6], [3.1, -0.9]])  # the "pictures" of (c)
NOISE_CENTRE = torch.tensor([-2.0, 0.0])  # not 0, so that lines can be told apart
STARTS = torch.tensor([[-2.6, 1.5], [-1.4, 0.1], [-2.3, -1.4]])  # noise that is followed to data
EULER_STEPS = 5


def mean_velocity(z, t):
    """The velocity that a perfect network has learned for DATA, in closed form.

    z: (B,2); t: (B,). Of all lines through z at t, that to data point i has a weight in proportion
    to the density of the noise at its other end; the velocity is their mean, (z - mean x) / t.
    """
    t_ = t[:, None, None]
    eps = (z[:, None] - (1 - t_) * DATA) / t_  # (B, 4, 2): the other ends of the lines
    log_density = -(eps - NOISE_CENTRE).square().sum(dim=2) / 2
    weights = torch.softmax(log_density, dim=1)
    x = weights @ DATA
    return (z - x) / t[:, None]


def euler_paths(steps):
    """The states that Euler's method goes through from each of STARTS, (steps + 1, 3, 2)."""
    states = sample.euler_states(mean_velocity, STARTS, sample.uniform_times(steps))
    return torch.stack(list(states))


def draw_line(axes):
    """(a) One line, from a picture to noise."""
    t = 0.6
    x = torch.tensor([0.0, 0.0])
    eps = torch.tensor([3.0, 1.2])
    z = (1 - t) * x + t * eps
    axes.plot(*zip(x, eps), color="0.6", zorder=1)
    v = 0.35 * (eps - x)
    arrow = {"arrowstyle": "-|>", "color": "C3", "lw": 2}
    axes.annotate("", xy=z + v, xytext=z, arrowprops=arrow)
    axes.scatter(*zip(x, eps, z), color=["C0", "0.3", "C1"], s=45, zorder=2)
    axes.text(-0.1, -0.42, "picture x\n(t = 0)", ha="center", va="top")
    axes.text(3.0, 1.5, "noise $\\epsilon$\n(t = 1)", ha="center")
    axes.text(z[0] - 0.1, z[1] + 0.2, "$z_t = (1-t)\\,x + t\\,\\epsilon$", ha="right")
    axes.text(2.35, 0.45, "$v = \\epsilon - x$", color="C3")
    axes.set(xlim=(-1.3, 4), ylim=(-1.6, 2.6), title="(a) a straight line")
    axes.axis("off")


def draw_pictures(grid_axes, model, x):
    """(b) What the network makes of a picture x (1,3,S,S), in [-1, 1], at five t."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([CLASS_ID])
    for column, t in enumerate(TIMES):
        z = (1 - t) * x + t * noise
        with torch.no_grad():
            v = model(z, torch.tensor([t]), y)
        # v is halved, as it is up to twice as large as what a picture can show.
        rows = {"$z_t$": z, "predicted x": z - t * v, "v = ($z_t$ - x) / t": v / 2}
        for row, (name, picture) in enumerate(rows.items()):
            axes = grid_axes[row][column]
            brightness = (picture[0].clamp(-1, 1) + 1) / 2
            axes.imshow(brightness.permute(1, 2, 0))  # height, width, RGB
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"t = {t}", fontsize=9)
            if column == 0:
                axes.set_ylabel(name, fontsize=9)


def draw_paths(axes):
    """(c) Crossing lines, and where their mean leads."""
    generator = torch.Generator().manual_seed(4)
    noise = NOISE_CENTRE + torch.randn(60, 2, generator=generator)
    ends = DATA[torch.arange(60) % len(DATA)]
    for start, end in zip(noise, ends):
        axes.plot(*zip(start, end), color="0.85", lw=0.7, zorder=1)
    smooth = axes.plot(*euler_paths(400).unbind(2), color="C0", lw=2)
    coarse = axes.plot(*euler_paths(EULER_STEPS).unbind(2), "o-", color="C3", ms=4, lw=1)
    all_noise = torch.cat([noise, STARTS])
    axes.scatter(*all_noise.T, color="0.3", s=6, zorder=2)
    axes.scatter(*DATA.T, color="C0", s=60, marker="s", zorder=4)
    axes.text(NOISE_CENTRE[0], -3.0, "noise", ha="center")
    axes.text(2.7, -2.4, "data", ha="center", color="C0")
    axes.set(ylim=(-3.2, 3.2), title="(c) many lines, and their mean")
    axes.invert_xaxis()  # data on the left, as in (a)
    axes.axis("off")
    lines = [smooth[0], coarse[0]]
    names = ["path of the mean velocity", f"{EULER_STEPS} Euler steps"]
    axes.legend(lines, names, loc="upper left", fontsize=8, frameon=False)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", help="trained on drawn butterflies: a folder or a Hub id")
    text = "the figure (default: %(default)s)"
    output = Path("assets/method.png")
    parser.add_argument("--output", type=png_path, default=output, metavar="PNG", help=text)
    flags = parser.parse_args()
    plt = pyplot()
    model = DiT.from_pretrained(flags.checkpoint)
    images, labels, class_names = draw_butterflies(1, model.image_size, seed=7)
    if model.class_names != class_names:
        raise UserError(f"{flags.checkpoint} was not trained on drawn butterflies")
    x = images[labels == CLASS_ID].float() / 127.5 - 1
    figure = plt.figure(figsize=(12, 3.9), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.25, 1.1))
    draw_line(left.subplots())
    draw_pictures(middle.subplots(3, len(TIMES)), model, x)
    middle.suptitle("(b) one butterfly at five times t", fontsize=12)
    draw_paths(right.subplots())
    save_figure(figure, flags.output, dpi=100)
    print(flags.output)


if __name__ == "__main__":
    run_command(main)
