"""What the Hub shows of a trained network: its card, and a grid of samples beside it."""

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

A class-conditional diffusion transformer on pixels, trained by nanoDiT on {dataset}: {classes}
classes, {size}x{size} pixels, {millions:.2f} M parameters.{figures}
{picture}
To sample from it: `python sample.py --checkpoint <the id of this repository> --class-id 0`
"""

WIDGET = """widget:
- text: samples
  output:
    url: grid.png
"""


def make_card(model, folder):
    """The README.md of a model. folder: of the run that it was loaded from, or None; a run has
    figures of its own, and grids of samples."""
    has_grid = last_grid(folder) is not None
    text = CARD.format(
        widget=WIDGET if has_grid else "",
        dataset=model.dataset,
        classes=model.num_classes,
        size=model.image_size,
        millions=sum(weight.numel() for weight in model.parameters()) / 1e6,
        figures=last_figures(folder),
        picture="\n![samples](grid.png)\n" if has_grid else "",
    )
    return ModelCard(text)


def last_grid(folder):
    """The newest grid of a run, or None."""
    grids = sorted(Path(folder, "samples").glob("step-*.png")) if folder else []
    return grids[-1] if grids else None


def last_figures(folder):
    """The last row of a run's log, as a sentence; nothing without a log."""
    if folder is None or not Path(folder, "log.csv").is_file():
        return ""
    with open(Path(folder, "log.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return ""
    row = rows[-1]
    return f"\nAfter {int(row['step']):,} steps the held-out loss was {float(row['val_loss']):.4f}."


def complete(folder, run):
    """Add to the saved model in `folder` the newest grid of its run, if there is one, where the
    card shows it; and permissions, as safetensors lets only the owner read the weights."""
    grid = last_grid(run)
    if grid is not None:
        shutil.copyfile(grid, Path(folder, "grid.png"))
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    Path(folder, "model.safetensors").chmod(0o666 & ~umask)
