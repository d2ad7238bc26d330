"""What the Hub shows for a trained network: its card, and a grid of samples beside it."""

import contextlib
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


def local_folder(model_id):
    """The absolute path of a model's folder; None if it is a Hub id."""
    return Path(model_id).resolve() if os.path.isdir(model_id) else None


def make_card(model, run, data):
    """The README.md of a model. run: the folder of the run that it comes from, or None; the card
    shows the run's last figures and newest grid. data: what its metadata should have instead, such
    as {"license": "cc-by-nc-4.0"}, the model_card_kwargs of push_to_hub."""
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
    card = ModelCard(text)
    for name, value in data.items():
        setattr(card.data, name, value)
    return card


def last_grid(run):
    """The newest grid of a run, or None."""
    if run is None:
        return None
    grids = Path(run, "samples").glob("step-*.png")
    saved = Path(run, "grid.png")  # beside a model that was saved elsewhere
    # From a million steps on, names are longer.
    newest = max(grids, key=lambda path: (len(path.name), path.name), default=saved)
    return newest if newest.is_file() else None


def whole_rows(log):
    """The rows {column: text} of a log.csv, but for one that was cut short, as on a full disk."""
    with open(log, encoding="utf-8", errors="replace") as file:
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
    grid, copy = last_grid(run), Path(folder, "grid.png").resolve()
    if grid is not None and grid.resolve() != copy:
        shutil.copyfile(grid, copy)
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    with contextlib.suppress(OSError):  # network and cloud drives may have no permissions
        Path(folder, "model.safetensors").chmod(0o666 & ~umask)
