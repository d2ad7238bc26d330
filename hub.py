"""What the Hub shows for a trained network: its card, and a grid of samples beside it."""

import csv
import os
import shutil
from pathlib import Path

from huggingface_hub import ModelCard

CARD = """---
library_name: nanodit
license: mit
pipeline_tag: unconditional-image-generation
tags: [rectified-flow, diffusion-transformer, dit, image-generation]
{widget}---
# nanoDiT

A class-conditional diffusion transformer on pixels, trained with nanoDiT on {dataset}: {classes}
classes, {size}x{size} pixels, {millions:.2f} M parameters.{figures}
{picture}
To sample from it: `python sample.py --checkpoint <the id of this repository> --class-id 0`
"""

WIDGET = """widget:
- text: samples
  output:
    url: grid.png
"""


def make_card(model, run):
    """The README.md of a model. run: the folder of the run that it comes from, or None; the card
    shows the run's last figures and newest grid."""
    has_grid = last_grid(run) is not None
    text = CARD.format(
        widget=WIDGET if has_grid else "",
        dataset=model.dataset or "pictures",
        classes=model.num_classes,
        size=model.image_size,
        millions=sum(weight.numel() for weight in model.parameters()) / 1e6,
        figures=last_figures(run),
        picture="\n![samples](grid.png)\n" if has_grid else "",
    )
    return ModelCard(text)


def last_grid(run):
    """The newest grid of a run, or None."""
    grids = Path(run, "samples").glob("step-*.png") if run else []
    # From a million steps on, names are longer.
    return max(grids, key=lambda path: (len(path.name), path.name), default=None)


def whole_rows(log):
    """The rows {column: text} of a log.csv, but for one that was cut short, as on a full disk."""
    with open(log, encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def last_figures(run):
    """The last row of a run's log, as a sentence; nothing without a log."""
    if run is None or not Path(run, "log.csv").is_file():
        return ""
    rows = whole_rows(Path(run, "log.csv"))
    if not rows:
        return ""
    row = rows[-1]
    try:
        step, loss = int(row["step"]), float(row["val_loss"])
    except (KeyError, ValueError):  # the log of another program
        return ""
    return f"\nAfter {step:,} steps the held-out loss was {loss:.4f}."


def complete(folder, run):
    """Add to the saved model in `folder` the newest grid of its run, if there is one, where the
    card shows it; and permissions, as safetensors lets only the owner read the weights."""
    grid = last_grid(run)
    if grid is not None:
        shutil.copyfile(grid, Path(folder, "grid.png"))
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    Path(folder, "model.safetensors").chmod(0o666 & ~umask)
