"""lesson.ipynb: every cell runs, and the pictures saved in it are those of the code as it is."""

import base64
import io
import shutil

import pytest
from helpers import ROOT, edited, environment
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

LESSON = ROOT / "lesson.ipynb"
# A shorter training, on the few pictures of the lesson: what it draws isn't compared.
SHORTER = ("--steps 500", "--steps 20 --depth 1")
FEWER = "train.load_dataset = lambda name, image_size: (images, labels, names)\n"
TOLERANCE = 3  # mean difference in brightness, of 0 to 255: of other CPUs and versions


def read_lesson():
    return nbformat.read(LESSON, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    """The pictures among the outputs of a cell, as PIL images."""
    found = []
    for output in cell.outputs:
        data = output.get("data", {})
        encoded = data.get("image/png") or data.get("image/jpeg")
        if encoded:
            image = Image.open(io.BytesIO(base64.b64decode(encoded)))
            found.append(image.convert("RGB"))
    return found


def test_every_cell_of_the_lesson_runs_and_its_saved_pictures_are_those_of_this_code(tmp_path):
    copy = edited(tmp_path, "train.py")  # with no change
    for network in ("laptop", "butterflies"):
        shutil.copytree(ROOT / "assets" / network, copy / "assets" / network)
    saved, fresh = read_lesson(), read_lesson()
    (training,) = (cell for cell in code_cells(fresh) if "train.main(" in cell.source)
    assert SHORTER[0] in training.source
    training.source = FEWER + training.source.replace(*SHORTER)
    kernel = nbclient.NotebookClient(fresh, timeout=300, resources={"metadata": {"path": copy}})
    kernel.execute(env=environment(MPLBACKEND="Agg"))  # a cell that fails raises its error

    compared = 0
    for old_cell, new_cell in zip(code_cells(saved), code_cells(fresh)):
        old, new = pictures(old_cell), pictures(new_cell)
        assert [image.size for image in old] == [image.size for image in new], old_cell.source
        if "trained" in old_cell.metadata.get("tags", []):
            continue  # what they show depends on the whole training
        for old_picture, new_picture in zip(old, new):
            difference = pil_to_tensor(old_picture).float() - pil_to_tensor(new_picture)
            assert difference.abs().mean() < TOLERANCE, old_cell.source
            compared += 1
    assert compared > 20


def test_the_saved_lesson_has_run_from_top_to_bottom_and_is_small():
    notebook = read_lesson()
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source
    assert notebook.metadata.kernelspec.name == "python3"
    assert sum(len(pictures(cell)) for cell in cells) > 25
    assert LESSON.stat().st_size < 3_000_000
