"""The page that the Hub shows of a trained network."""

from pathlib import Path

from support.checkpoint import write_beside

CARD = Path(__file__).with_name("card.md").read_text("utf-8")
REWRITTEN = "<!-- train.py rewrites this page"  # while a page has this line, train.py does


def write_card(folder, network, training, rows):
    """Write README.md, which the Hub shows once the folder is uploaded. training: for how long the
    network in it was trained, in words. rows: of the log. A page that its owner has written, or
    wants to keep, stays as it is."""
    path = folder / "README.md"
    if path.exists() and REWRITTEN not in path.read_text("utf-8", errors="replace"):
        return
    if rows and rows[-1]["val_loss"] > 0:  # it is nan if no picture was held out
        training += f" (held-out loss: {rows[-1]['val_loss']:.4f})"
    millions = sum(weight.numel() for weight in network.parameters()) / 1e6
    grids = sorted(folder.glob("samples/step-*.png"), key=lambda grid: (len(grid.name), grid.name))
    grid = f"![samples](samples/{grids[-1].name})" if grids else ""
    text = CARD.format(network=network, millions=millions, training=training, grid=grid)
    write_beside(path, lambda beside: beside.write_text(text, "utf-8"), needed=False)
