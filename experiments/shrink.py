"""Save a trained network in half precision, for sharing: half the size, almost the same pictures.

    python -m experiments.shrink out assets/butterflies --cfg-scale 4

Writes weights, config and card, with the last grid of the run. sample.py loads it like any other.
To share it: hf upload you/butterflies assets/butterflies. (push_to_hub would double its size.)
"""

import shutil

from support.hub import write_card
from support.settings import UserError, expanded, limited, new_parser, run_command

from experiments.plot_loss import read_log
from model import DiT


def copy_grid(run, output):
    """Copy the newest grid of a run, if it has one, which the card shows."""
    grids = sorted(run.glob("samples/step-*.png"), key=lambda path: (len(path.name), path.name))
    if grids:
        (output / "samples").mkdir()
        shutil.copy(grids[-1], output / "samples")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("run", type=expanded, help="the folder of a run")
    parser.add_argument("output", type=expanded, help="a folder that does not exist yet")
    text = "the guidance that sample.py then uses by default (default: that of the run)"
    parser.add_argument("--cfg-scale", type=limited(float), metavar="W", help=text)
    flags = parser.parse_args()
    if flags.output.exists():
        raise UserError(f"{flags.output} exists: choose another folder")
    if not flags.run.is_dir():
        raise UserError(f"{flags.run} is not a folder")
    model = DiT.from_pretrained(flags.run)
    if flags.cfg_scale is not None:
        model.cfg_scale = flags.cfg_scale

    # The card comes before the weights: save_pretrained writes one of its own if there is none.
    flags.output.mkdir(parents=True)
    copy_grid(flags.run, flags.output)
    rows = read_log(flags.run / "log.csv")
    losses = [{"val_loss": float(row["val_loss"])} for row in rows]
    training = "How long it was trained is not known"
    if rows:
        training = f"{int(rows[-1]['step']):,} steps"
    write_card(flags.output, model, training, losses)
    model.half().save_pretrained(flags.output)
    print(flags.output)


if __name__ == "__main__":
    run_command(main)
