"""Draw the losses of a run: python experiments/plot_loss.py out [--output loss.png]

Reads log.csv in the folder of a run and writes a PNG, loss.png in that folder unless named: the
training and the held-out loss against steps. Needs matplotlib.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import hub  # noqa: E402
from model import UserError  # noqa: E402


def pyplot():
    """matplotlib's drawing functions, which need no screen. Raises UserError if it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"matplotlib is missing: pip install matplotlib ({error})") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure, path, dpi=110):
    """Write a figure of matplotlib as common.write_beside does; makes the folder."""
    common.make_folder(path.parent)
    common.write_beside(path, lambda beside: figure.savefig(beside, dpi=dpi))


def read_log(path):
    """The steps of a log.csv, and {"train_loss", "val_loss"} at them. Raises UserError if it is not
    the log of a run, or has no row yet."""
    if not path.is_file():
        raise UserError(f"no run in {path.parent}: {path} does not exist")
    try:
        rows = hub.whole_rows(path)
        names = ("train_loss", "val_loss")
        steps = [int(row["step"]) for row in rows]
        losses = {name: [float(row[name]) for row in rows] for name in names}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not the log of a run: {error!r}") from error
    if not rows:
        raise UserError(f"{path} has no row yet: wait for the first EVAL_EVERY steps")
    return steps, losses


def main():
    parser = common.new_parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, with log.csv in it")
    text = "the figure (default: loss.png in that folder)"
    parser.add_argument("--output", type=common.parse_png, metavar="PNG", help=text)
    flags = parser.parse_args()
    plt = pyplot()
    steps, losses = read_log(flags.run / "log.csv")
    marker = "." if len(steps) == 1 else None  # a line through one point cannot be seen
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, losses["train_loss"], marker=marker, label="training")
    label = "held-out pictures, averaged weights"
    axes.plot(steps, losses["val_loss"], marker=marker, label=label)
    axes.set(xlabel="step", ylabel="mean squared velocity error")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    output = flags.output or flags.run / "loss.png"
    save_figure(figure, output)
    print(output)


if __name__ == "__main__":
    common.run_command(main)
