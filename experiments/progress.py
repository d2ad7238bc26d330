"""What more training buys: the same classes from the same noise, at several steps of a run.

    python -m experiments.progress out --steps 1000 2000 4000 8000

Takes the first row of each of those steps' grids in samples/, and stacks the rows in progress.png.
"""

from pathlib import Path

from support.checkpoint import save_picture
from support.settings import UserError, expanded, new_parser, png_path, run_command

from PIL import Image

from model import DiT

BORDER = 2  # pixels between the pictures of a grid: the padding of torchvision's make_grid


def first_rows(grids, image_size):
    """The first row of each grid, as one PIL image."""
    height = image_size + BORDER
    rows = Image.new("RGB", (grids[0].width, len(grids) * height + BORDER))
    for number, grid in enumerate(grids):
        row = grid.crop((0, 0, grid.width, height + BORDER))
        rows.paste(row, (0, number * height))
    return rows


def main():
    parser = new_parser(__doc__)
    parser.add_argument("run", type=expanded, help="the folder of a run")
    text = "steps that have a grid in samples/: multiples of SAMPLE_EVERY, and the last"
    parser.add_argument("--steps", type=int, nargs="+", required=True, metavar="N", help=text)
    text = "the picture (default: %(default)s)"
    output = Path("progress.png")
    parser.add_argument("--output", type=png_path, default=output, metavar="PNG", help=text)
    flags = parser.parse_args()
    image_size = DiT.from_pretrained(flags.run).image_size
    grids = []
    for step in flags.steps:
        path = flags.run / "samples" / f"step-{step:06}.png"
        if not path.exists():
            raise UserError(f"{path} does not exist: choose --steps that have a grid there")
        grids.append(Image.open(path))
    save_picture(first_rows(grids, image_size), flags.output)
    print(flags.output)


if __name__ == "__main__":
    run_command(main)
