"""Draw the losses of a run: python experiments/plot_loss.py out [--output loss.png]

Reads log.csv in the folder of a run and writes a PNG, loss.png in that folder unless named: the
training and the held-out loss against steps. Needs matplotlib.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
from model import UserError  # noqa: E402


def pyplot():
    """matplotlib's drawing functions, which need no screen. Raises UserError if it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is missing: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def main():
    parser = common.new_parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, with log.csv in it")
    text = "(loss.png in that folder)"
    parser.add_argument("--output", type=common.parse_png, metavar="PNG", help=text)
    args = parser.parse_args()
    try:
        with open(args.run / "log.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        steps = [int(row["step"]) for row in rows]
        losses = {name: [float(row[name]) for row in rows] for name in ("train_loss", "val_loss")}
    except (OSError, KeyError, TypeError, ValueError) as error:
        parser.error(f"{args.run / 'log.csv'} is not the log of a run: {error!r}")
    if not rows:
        parser.error(f"{args.run / 'log.csv'} has no row yet: wait for the first EVAL_EVERY steps")
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, losses["train_loss"], label="training")
    axes.plot(steps, losses["val_loss"], label="held-out pictures, averaged weights")
    axes.set(xlabel="step", ylabel="mean squared velocity error")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    output = args.output or args.run / "loss.png"
    common.make_folder(output.parent)
    common.write_beside(output, lambda beside: figure.savefig(beside, dpi=110))
    print(output)


if __name__ == "__main__":
    common.run_command(main)
