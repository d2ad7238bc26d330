"""Fixtures: a small folder of pictures, and a small run on them."""

import pytest
from helpers import SMALL, call, save
from torchvision.transforms.functional import to_pil_image

from data.drawn import draw_butterflies


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of three class folders with seven drawn pictures of 16x16 each."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    images, labels, names = draw_butterflies(7, 16, seed=3)
    for i, (image, label) in enumerate(zip(images, labels.tolist())):
        if label in (9, 36, 74):
            save(to_pil_image(image), folder / names[label] / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """The folder in which a run of 30 steps has left its out/."""
    folder = tmp_path_factory.mktemp("trained")
    settings = "--steps 30 --batch-size 8 --eval-every 10 --sample-every 15".split()
    call("train", *SMALL, *settings, "--dataset", pictures, cwd=folder)
    return folder
