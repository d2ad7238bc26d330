"""Draw the losses of a run: python -m experiments.plot_loss out [--output loss.png]

Reads log.csv in the folder of a run and writes a PNG, loss.png in that folder unless named. Left:
the training loss, whose t are drawn at random. Right: the losses of the averaged weights at fixed
t, of pictures held out and of as many that are trained on ("seen"). They are other averages, of
other weights: compare curves within a panel. Where held-out pictures have a higher loss than seen
ones, the network overfits. Needs matplotlib.
"""

import csv
import os
import re

from support.checkpoint import write_beside
from support.settings import UserError, expanded, new_parser, png_path, run_command


def read_log(path):
    """The rows {column: text} of a log.csv; none if there is no such file."""
    text = path.read_text("utf-8") if path.is_file() else ""
    return list(csv.DictReader(text.splitlines()))


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


def column(rows, name):
    """A column of the log as numbers. Rows that were written before it was added have nan."""
    return [float(row[name] or "nan") for row in rows]


def draw_fixed_times(axes, rows, times):
    """A colour for each t; held-out pictures are solid lines, seen ones dashed."""
    held_out, seen = {"linestyle": "-"}, {"linestyle": "--"}
    if len(rows) == 1:  # a line through one point cannot be seen
        held_out, seen = {"marker": "."}, {"marker": "x"}
    steps = column(rows, "step")
    for number, t in enumerate(times):
        colour = f"C{number % 10}"
        axes.plot(steps, column(rows, f"val_{t}"), color=colour, label=f"t = {t}", **held_out)
        axes.plot(steps, column(rows, f"seen_{t}"), color=colour, **seen)
    axes.plot([], [], color="0.4", label="held out", **held_out)
    axes.plot([], [], color="0.4", label="seen", **seen)
    # The losses at small t are many times those at large t.
    axes.set_yscale("log", subs=(2, 3, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(title="averaged weights, at fixed t", xlabel="step")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("run", type=expanded, help="the folder of a run, with log.csv in it")
    text = "the figure (default: loss.png in that folder)"
    parser.add_argument("--output", type=png_path, metavar="PNG", help=text)
    flags = parser.parse_args()
    plt = pyplot()
    log = flags.run / "log.csv"
    rows = read_log(log)
    columns = rows[0] if rows else {}
    times = [name.removeprefix("val_") for name in columns if re.match(r"val_\d", name)]
    if not times:
        raise UserError(f"no losses in {log}: a run writes them every EVAL_EVERY steps")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.5), layout="constrained")
    marker = "." if len(rows) == 1 else None
    left.plot(column(rows, "step"), column(rows, "train_loss"), marker=marker)
    left.set(title="training", xlabel="step", ylabel="mean squared velocity error")
    left.set_ylim(bottom=0)
    draw_fixed_times(right, rows, times)
    for axes in (left, right):
        axes.grid(which="both", alpha=0.3)
    output = flags.output or flags.run / "loss.png"
    save_figure(figure, output)
    print(output)


if __name__ == "__main__":
    run_command(main)
