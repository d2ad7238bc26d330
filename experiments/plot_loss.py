"""Draw the losses of a run: python -m experiments.plot_loss out [--output loss.png]

Reads log.csv in the folder of a run and writes a PNG, loss.png in that folder unless named: the
training and the held-out loss against steps. Needs matplotlib.
"""

import os
from pathlib import Path

from support.checkpoint import read_log, write_beside
from support.settings import UserError, new_parser, png_path, run_command


def pyplot():
    """matplotlib's drawing functions, which need no screen. Raises UserError if it is missing."""
    # Agg only writes files. Another backend, which a notebook may have named here, may be missing.
    os.environ["MPLBACKEND"] = "Agg"
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise UserError(f"matplotlib is missing: pip install matplotlib ({error})") from error
    return matplotlib.pyplot


def save_figure(figure, path, dpi=110):
    """Write a figure of matplotlib as support.checkpoint.write_beside does."""
    write_beside(path, lambda beside: figure.savefig(beside, dpi=dpi))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, with log.csv in it")
    text = "the figure (default: loss.png in that folder)"
    parser.add_argument("--output", type=png_path, metavar="PNG", help=text)
    flags = parser.parse_args()
    plt = pyplot()
    log = flags.run / "log.csv"
    rows = read_log(log)
    if not rows or "val_loss" not in rows[0]:
        raise UserError(f"no losses in {log}: a run writes them every EVAL_EVERY steps")
    steps = [int(row["step"]) for row in rows]
    train_losses = [float(row["train_loss"]) for row in rows]
    val_losses = [float(row["val_loss"]) for row in rows]

    marker = "." if len(steps) == 1 else None  # a line through one point cannot be seen
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, train_losses, marker=marker, label="training")
    axes.plot(steps, val_losses, marker=marker, label="held-out pictures, averaged weights")
    axes.set(xlabel="step", ylabel="mean squared velocity error")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    output = flags.output or flags.run / "loss.png"
    save_figure(figure, output)
    print(output)


if __name__ == "__main__":
    run_command(main)
