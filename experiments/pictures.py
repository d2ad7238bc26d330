"""Pictures of the README and of RESULTS.md: what the network is shown, and how samples come about.

    python -m experiments.pictures assets/laptop

drawn.png: a drawn butterfly of each of the 75 classes. strip.png: five classes, a row each, from
pure noise on the left to the sample on the right: 11 of the states that the Euler steps of
sample.py go through. Written to assets/, unless --output names another folder.
"""

from pathlib import Path

from support.checkpoint import save_picture
from support.settings import expanded, new_parser, run_command

import torch

import sample
from data.drawn import draw_butterflies
from model import DiT

COLUMNS = 11  # states of a picture that the strip shows


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", help="a folder or a Hub id")
    text = "folder to write to (default: %(default)s)"
    assets = Path("assets")
    parser.add_argument("--output", type=expanded, default=assets, metavar="FOLDER", help=text)
    flags = parser.parse_args()
    model = DiT.from_pretrained(flags.checkpoint)

    drawn, _, _ = draw_butterflies(1, 64, seed=0)
    path = flags.output / "drawn.png"
    save_picture(sample.to_grid(drawn), path)
    print(path)

    class_ids = torch.linspace(0, model.num_classes - 1, 5).round().long()
    states = []
    for batch in sample.generate_states(model, class_ids):
        states = [sample.to_uint8(z) for z in batch]  # five pictures are a single batch
    shown = torch.linspace(0, len(states) - 1, COLUMNS).round().long()
    rows = torch.stack([states[i] for i in shown], dim=1)  # class, state, picture
    path = flags.output / "strip.png"
    save_picture(sample.to_grid(rows.flatten(0, 1), COLUMNS), path)
    print(path)


if __name__ == "__main__":
    run_command(main)
