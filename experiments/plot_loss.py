"""Draw the losses of a run: python experiments/plot_loss.py out [--output loss.png]

Reads log.csv in the folder of a run and writes a PNG, loss.png in that folder unless named: the
training and the validation loss against steps. Needs matplotlib, which nothing else here does.
"""

import argparse
import csv
import sys
from pathlib import Path


def pyplot():
    """matplotlib's drawing functions, which need no screen; without matplotlib, one line and 2."""
    try:
        import matplotlib
    except ImportError:
        print("error: matplotlib is missing: pip install matplotlib", file=sys.stderr)
        sys.exit(2)
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("run", type=Path, help="the folder of a run, with log.csv in it")
    parser.add_argument("--output", type=Path, metavar="PNG", help="(loss.png in that folder)")
    args = parser.parse_args()
    try:
        with open(args.run / "log.csv") as file:
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
    figure.savefig(output, dpi=110)
    print(output)


if __name__ == "__main__":
    main()
