"""Draw KID of several networks against time, pictures seen and arithmetic.

    python -m experiments.beside [--output experiments/beside.png]

Reads experiments/beside.csv, which holds what was measured: a row for each network and time, those
of a network one after the other. A GPU has arithmetic to spare, so that it orders networks
otherwise than a CPU: more by pictures seen. Needs matplotlib.
"""

import itertools
from pathlib import Path

from support.settings import UserError, new_parser, png_path, run_command

from experiments.plot_loss import column, pyplot, read_log, save_figure

PANELS = {"minutes": "minutes", "images": "thousand pictures seen", "tflop": "TFLOP"}


def main(arguments=None):
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=png_path, default=Path("experiments/beside.png"))
    output = parser.parse_args(arguments).output
    rows = read_log(Path(__file__).with_name("beside.csv"))
    if not rows:
        raise UserError("experiments/beside.csv is missing, or empty")
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for name, group in itertools.groupby(rows, lambda row: row["network"]):
        group = list(group)
        for axes, (what, label) in zip(panels, PANELS.items()):
            amounts = [x / 1000 if what == "images" else x for x in column(group, what)]
            axes.plot(amounts, column(group, "kid"), marker=".", label=name)
            axes.set_xlabel(label)
    for axes in panels:
        axes.set_xlim(left=0)
    panels[0].set_ylabel("KID (lower is better)")
    panels[0].legend()
    save_figure(figure, output)
    print(output)


if __name__ == "__main__":
    run_command(main)
