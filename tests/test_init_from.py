"""--init-from: a run that begins with the weights of a trained model."""

import pytest
import torch
from conftest import SMALL, call, refused
from PIL import Image

from model import DiT

STILL = ["--steps", 1, "--batch-size", 4, "--learning-rate", 0]  # the weights stay as they begin


def test_the_same_classes_begin_with_all_weights(trained, pictures, tmp_path):
    run = [*SMALL, *STILL, "--dataset", pictures, "--init-from", trained / "out"]
    out, _ = call("train.py", *run, cwd=tmp_path)
    assert "random values" not in out
    begun = DiT.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in DiT.from_pretrained(trained / "out").state_dict().items():
        torch.testing.assert_close(begun[name], tensor, atol=1e-7, rtol=1e-6)


def test_other_classes_get_new_class_embeddings_and_it_says_so(trained, tmp_path):
    for name in ("moth", "owl"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), "red").save(tmp_path / "other" / name / "1.png")
    run = [*SMALL, *STILL, "--dataset", "other", "--init-from", trained / "out"]
    out, _ = call("train.py", *run, cwd=tmp_path)
    assert "class embeddings start from random values" in out
    begun = DiT.from_pretrained(tmp_path / "out")
    assert begun.class_names == ["moth", "owl"]
    before = DiT.from_pretrained(trained / "out").state_dict()
    for name, tensor in begun.state_dict().items():
        if name == "class_embedding.weight":
            assert tensor.shape == (3, 16) and not torch.equal(tensor, before[name][:3])
        else:
            torch.testing.assert_close(tensor, before[name], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dim", 32], ["--init-from", "sizes", "size mismatch"]),
        (["--init-from", "nowhere"], ["no model in nowhere"]),
        (["--resume"], ["--init-from", "--resume"]),
    ],
)
def test_what_cannot_begin_there_is_one_line(trained, pictures, tmp_path, flags, words):
    run = [*SMALL, *STILL, "--dataset", pictures, "--init-from", trained / "out", *flags]
    line = refused("train.py", *run, cwd=tmp_path)
    assert all(word in line for word in words)
    assert not (tmp_path / "out" / "train_state.pt").exists()
