"""The Hub: downloads, and the page that it shows of a trained network."""

import math
from pathlib import Path

from support.checkpoint import write_beside
from support.settings import UserError

from huggingface_hub import snapshot_download
from huggingface_hub.utils.logging import set_verbosity_error

set_verbosity_error()  # no warnings of the library's own

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"  # you/butterflies

CARD = Path(__file__).with_name("card.md").read_text("utf-8")
KEEP = CARD.splitlines()[6]  # the line that lets train.py write the card anew


def download(repo_id, **options):
    """The folder, in the Hub's own cache, of a repository on the Hub. options: as
    snapshot_download takes them. Raises UserError if the repository or the network is missing."""
    try:
        return Path(snapshot_download(repo_id, **options))
    except Exception as error:  # of whichever library makes the requests, its proxies and so on
        raise UserError(f"cannot download {repo_id} from the Hub: {error}") from error


def write_card(folder, network, training, rows):
    """Write README.md, which the Hub shows once the folder is uploaded. training: for how long the
    network in it was trained, in words. rows: of the log. A page that its owner has written, or
    wants to keep, stays as it is."""
    path = folder / "README.md"
    if path.exists() and KEEP not in path.read_text("utf-8", errors="replace"):
        return
    if rows and not math.isnan(rows[-1]["val_loss"]):
        training += f" (held-out loss: {rows[-1]['val_loss']:.4f})"
    millions = sum(weight.numel() for weight in network.parameters()) / 1e6
    text = CARD.format(network=network, millions=millions, training=training)
    write_beside(path, lambda beside: beside.write_text(text, "utf-8"))
