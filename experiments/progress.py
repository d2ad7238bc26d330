"""What more training buys: the same classes from the same noise, at several steps of a run.

    python experiments/progress.py out --steps 1000 2000 4000 8000

Cuts the first row out of these grids in samples/, and writes them to progress.png, one below the
other.
"""

import json
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
from model import UserError  # noqa: E402

BORDER = 2  # pixels between the pictures of a grid


def first_rows(grids, image_size):
    """One PIL image of the first rows of pictures of all grids."""
    height = image_size + BORDER
    rows = Image.new("RGB", (grids[0].width, len(grids) * height + BORDER))
    for number, grid in enumerate(grids):
        rows.paste(grid.crop((0, 0, grid.width, height + BORDER)), (0, number * height))
    return rows


def main():
    parser = common.new_parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    text = "those of a multiple of SAMPLE_EVERY have a grid"
    parser.add_argument("--steps", type=int, nargs="+", required=True, metavar="N", help=text)
    parser.add_argument("--output", type=Path, default=Path("progress.png"), metavar="PNG")
    flags = parser.parse_args()
    paths = [flags.run / "samples" / f"step-{step:06}.png" for step in flags.steps]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: --steps {text}")
    image_size = json.loads((flags.run / "config.json").read_text("utf-8"))["image_size"]
    rows = first_rows([Image.open(path) for path in paths], image_size)
    common.save_picture(rows, flags.output)
    print(flags.output)


if __name__ == "__main__":
    common.run_command(main)
