"""Pictures of the README and of RESULTS.md: what the network is shown, and how samples come about.

    python experiments/pictures.py assets/laptop

drawn.png: a drawn butterfly of each of the 75 classes. strip.png: five classes, a row each, from
pure noise on the left to the sample on the right: 11 of the states that the Euler steps of
sample.py go through. Written to assets/, unless --output names another folder.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import sample  # noqa: E402
from data.drawn import draw_butterflies  # noqa: E402

ASSETS = Path(__file__).parents[1] / "assets"
COLUMNS = 11  # states of a picture that the strip shows


def main():
    parser = common.new_parser(__doc__)
    parser.add_argument("checkpoint", help="a folder or a Hub id")
    text = "folder to write to (default: assets)"
    parser.add_argument("--output", type=Path, default=ASSETS, metavar="FOLDER", help=text)
    flags = parser.parse_args()
    common.make_folder(flags.output)
    model = common.load_model(flags.checkpoint)
    classes = torch.linspace(0, model.num_classes - 1, 5).round().long()
    states = []
    list(sample.generate(model, classes, record=lambda z: states.append(sample.to_uint8(z))))
    shown = torch.linspace(0, len(states) - 1, COLUMNS).round().long()
    rows = torch.stack([states[i] for i in shown], dim=1).flatten(0, 1)  # class by class
    for name, pictures, columns in (
        ("drawn", draw_butterflies(1, 64, seed=0)[0], None),
        ("strip", rows, COLUMNS),
    ):
        path = flags.output / f"{name}.png"
        common.save_picture(sample.to_grid(pictures, columns), path)
        print(path)


if __name__ == "__main__":
    common.run_command(main)
