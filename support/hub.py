"""Trained networks: loaded from a folder or from the Hub, and the card that the Hub shows."""

import inspect
import json
import re
from pathlib import Path

from support.checkpoint import read_log
from support.settings import UserError

from huggingface_hub import snapshot_download
from huggingface_hub.utils.logging import set_verbosity_error
from safetensors.torch import load_model as load_weights

set_verbosity_error()  # no warnings of the library's own

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"  # you/butterflies

CARD = Path(__file__).with_name("card.md").read_text("utf-8")  # a template of Jinja


def download(repo_id, **options):
    """The folder, in the Hub's own cache, of a repository on the Hub. options: as
    snapshot_download takes them. Raises UserError if the repository or the network is missing."""
    try:
        return Path(snapshot_download(repo_id, **options))
    except Exception as error:  # of whichever library makes the requests, its proxies and so on
        raise UserError(f"cannot download {repo_id} from the Hub: {error}") from error


def load_network(network_class, checkpoint, **options):
    """The trained network in a folder, such as "out", or at a Hub id, such as "you/butterflies", in
    evaluation mode. options: as snapshot_download takes them. Raises UserError if there is none, or
    if its files are damaged or do not fit."""
    folder = Path(checkpoint).expanduser()
    if not folder.exists() and re.fullmatch(HUB_ID, str(checkpoint)):
        files = ["config.json", "model.safetensors"]
        folder = download(str(checkpoint), allow_patterns=files, **options)
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    if not config_file.is_file():
        raise UserError(f"no model in {checkpoint}: it has no config.json, as train.py writes it")

    try:
        config = json.loads(config_file.read_text("utf-8"))
        inspect.signature(network_class).bind(**config)  # a TypeError if the names are others
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{config_file} is not the config of a nanoDiT model: {error}") from error
    try:
        network = network_class(**config)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error
    try:
        load_weights(network, weights_file)  # which knows of weights that layers share
    except Exception as error:  # a damaged file may raise anything
        raise UserError(
            f"{weights_file} is damaged, or does not fit: {str(error)[:200]}"
        ) from error
    network.folder = folder.resolve()  # for the card
    return network.eval()


# The card, and a grid of samples beside it


def card_facts(network):
    """What the card says of a network, and of the run that it comes from."""
    rows = read_log(network.folder / "log.csv") if network.folder else []
    parameters = sum(weight.numel() for weight in network.parameters())
    grid = newest_grid(network.folder)
    return {"network": network, "millions": parameters / 1e6, "rows": rows, "grid": grid}


def newest_grid(folder):
    """The newest grid of a run, or the one beside a network that was saved elsewhere."""
    grids = [*folder.glob("samples/step-*.png"), *folder.glob("grid.png")] if folder else []
    # From a million steps on, names are longer.
    return max(grids, key=lambda path: (len(path.name), path.name), default=None)
