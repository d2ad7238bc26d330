"""What more training buys: the same classes from the same noise, at several steps of a run.

    python experiments/progress.py out --steps 1000 2000 4000 8000

Takes the first row of each of those steps' grids in samples/, and stacks the rows in progress.png.
"""

import json
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
from model import UserError  # noqa: E402

BORDER = 2  # pixels between the pictures of a grid: the padding of torchvision's make_grid


def first_rows(grids, image_size):
    """The first row of each grid, as one PIL image."""
    height = image_size + BORDER
    rows = Image.new("RGB", (grids[0].width, len(grids) * height + BORDER))
    for number, grid in enumerate(grids):
        rows.paste(grid.crop((0, 0, grid.width, height + BORDER)), (0, number * height))
    return rows


def main():
    parser = common.new_parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    text = "steps that have a grid in samples/: multiples of SAMPLE_EVERY, and the last"
    parser.add_argument("--steps", type=int, nargs="+", required=True, metavar="N", help=text)
    text = "the picture (default: %(default)s)"
    output = Path("progress.png")
    parser.add_argument("--output", type=common.parse_png, default=output, metavar="PNG", help=text)
    flags = parser.parse_args()
    config_file = flags.run / "config.json"
    if not config_file.is_file():
        raise UserError(f"no run in {flags.run}: {config_file} does not exist")
    paths = [flags.run / "samples" / f"step-{step:06}.png" for step in flags.steps]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: choose --steps that have a grid there")
    try:
        image_size = json.loads(config_file.read_text("utf-8"))["image_size"]
        rows = first_rows([Image.open(path) for path in paths], image_size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flags.run} is not a run, or is damaged: {error!r}") from error
    common.make_folder(flags.output.parent)
    common.save_picture(rows, flags.output)
    print(flags.output)


if __name__ == "__main__":
    common.run_command(main)
