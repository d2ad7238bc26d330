"""Draw KID of several networks against time, pictures seen and arithmetic.

    python -m experiments.beside [--output experiments/beside.png]

Reads experiments/beside.csv, which holds what was measured: a row for each network and time, those
of a network one after the other. Minutes are of one machine; the short runs were made on another,
and have none. A GPU has arithmetic to spare, so that it orders networks otherwise than a CPU: more
by pictures seen. Needs matplotlib.
"""

import itertools
from pathlib import Path

from support.settings import new_parser, png_path, run_command

from experiments.plot_loss import column, pyplot, read_log, save_figure

PANELS = ("minutes", "thousand pictures seen", "TFLOP")  # columns of the file


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=png_path, default=Path("experiments/beside.png"))
    output = parser.parse_args().output
    rows = read_log(Path(__file__).with_name("beside.csv"))
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(11, 5), sharey=True, layout="constrained")
    for name, group in itertools.groupby(rows, lambda row: row["network"]):
        group = list(group)
        marker = "." if len(group) > 1 else "D"
        for axes, what in zip(panels, PANELS):
            axes.plot(column(group, what), column(group, "KID"), marker=marker, label=name)
    for axes, what in zip(panels, PANELS):
        axes.set_xlabel(what)
        axes.set_xlim(left=0)
    panels[0].set_ylabel("KID (lower is better)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, output)
    print(output)


if __name__ == "__main__":
    run_command(main)
