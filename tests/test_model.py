"""The network: shapes, what it is at the start, positions, and sizes it refuses."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, environment

from model import MIN_T, DiT

SIZES = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "heads": 2}


def make(**changes):
    torch.manual_seed(0)
    return DiT(**{**SIZES, "class_names": ["a", "b", "c"], **changes})


def inputs(b=5, size=16):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(b, 3, size, size, generator=generator)
    return z, torch.linspace(0.01, 1, b), torch.arange(b) % 4


def shaken(model):
    """The model with every weight moved a little: no longer the zero function of the start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


with_and_without_convolutions = pytest.mark.parametrize("conv_dim", [0, 8])


@with_and_without_convolutions
def test_returns_a_float32_velocity_of_the_pictures_shape(conv_dim):
    z, t, y = inputs()
    model = shaken(make(conv_dim=conv_dim))
    v = model(z, t, y)
    assert v.shape == z.shape and v.dtype == torch.float32 and v.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(z, t, y).dtype == torch.float32
        assert model(z.bfloat16(), t, y).dtype == torch.float32


@with_and_without_convolutions
def test_at_the_start_the_network_predicts_zero(conv_dim):
    z, t, y = inputs()
    expected = z / t[:, None, None, None]  # x = 0 means v = (z - 0) / t
    torch.testing.assert_close(make(conv_dim=conv_dim)(z, t, y), expected)


def test_blocks_start_as_the_identity():
    block = make().blocks[0]
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(block(x, c), x)


def test_attention_does_not_grow_with_queries_and_keys():
    attention = make().blocks[0].attention
    x = torch.randn(2, 16, 32)
    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:64] *= 1000  # of q and k
        attention.qkv.bias[:64] *= 1000
        torch.testing.assert_close(attention(x), before, atol=1e-3, rtol=0)
        attention.scale *= 3  # learned: how sharply each head looks
    assert not torch.allclose(attention(x), before, atol=1e-3)


@pytest.mark.parametrize("tokens", [4, 256, 257])  # written out, and PyTorch's own
def test_attention_is_a_mean_of_values_weighted_by_softmax(tokens):
    attention = make().blocks[0].attention
    torch.nn.init.constant_(attention.scale, 3)
    x = torch.randn(2, tokens, 32)
    q, k, v = attention.qkv(x).unflatten(2, (3, 2, 16)).unbind(2)  # each (B, T, H, D)
    q, k = 3 * F.layer_norm(q, (16,)), F.layer_norm(k, (16,))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(4).exp()  # 4 is the root of D
    weights /= weights.sum(dim=-1, keepdim=True)
    mean = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    torch.testing.assert_close(attention(x), attention.out(mean))


def moved_pixels(model, size, row, column):
    """How much a change of one pixel changes the predicted x: (4,3,size,size)."""
    z, t, y = inputs(size=size)
    changed = z.clone()
    changed[:, 1, row, column] += 1
    x, other = (z_ - t[:, None, None, None] * model(z_, t, y) for z_ in (z, changed))
    return (x - other)[1:].abs()


def test_patches_come_back_to_their_place():
    # While the blocks are the identity, what the network says of a patch is due to that patch.
    model = make()
    torch.nn.init.normal_(model.final_layer.weight)
    moved = moved_pixels(model, 16, row=5, column=10).amin((0, 1)) > 1e-4
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:8, 8:12] = True
    assert torch.equal(moved, expected)


def test_convolutions_join_the_pixels_on_both_sides_of_a_seam():
    model = make(image_size=32, conv_dim=8)  # its blocks have no say yet: final_layer is 0
    torch.nn.init.normal_(model.head.convs[-1].weight)
    moved = moved_pixels(model, 32, row=5, column=10).amax((0, 1))
    assert moved[:4, 8:12].min() > 0 and moved[4:8, 12:16].min() > 0  # the patches beside it
    # Five layers reach five squares of 2 x 2 pixels far.
    assert moved[16:].max() == 0 and moved[:, 22:].max() == 0


def test_the_head_hears_the_blocks():
    model = make(image_size=32, conv_dim=8)
    for layer in (model.head.convs[-1], model.final_layer, model.blocks[0].modulation):
        torch.nn.init.normal_(layer.weight, std=0.1)
    assert moved_pixels(model, 32, row=5, column=10).amax((0, 1)).min() > 0  # by way of attention


@with_and_without_convolutions
def test_time_and_class_matter_and_pictures_do_not_mix(conv_dim):
    model = shaken(make(conv_dim=conv_dim))
    z, t, y = inputs()
    v = model(z, t, y)
    assert not torch.allclose(v, model(z, t, (y + 1) % 4), atol=1e-3)
    assert not torch.allclose(v[1:4], model(z, t.flip(0) * 0.9 + 0.05, y)[1:4], atol=1e-3)
    torch.testing.assert_close(v[2:3], model(z[2:3], t[2:3], y[2:3]), atol=1e-5, rtol=1e-5)


def test_t_that_training_never_draws_looks_like_the_smallest_that_it_does():
    model = shaken(make())
    z, _, y = inputs()

    def predicted_x(t):
        return z - t * model(z, torch.full((5,), t), y)

    for t in (0.001, 0.01, 0.04):
        torch.testing.assert_close(predicted_x(t), predicted_x(MIN_T), atol=1e-5, rtol=0)
    assert not torch.allclose(predicted_x(0.06), predicted_x(MIN_T), atol=1e-4)


def test_the_null_class_is_one_more_than_the_classes():
    model = make()
    assert model.num_classes == 3 and model.class_names == ["a", "b", "c"]
    z, t, _ = inputs(1)
    model(z, t, torch.tensor([model.num_classes]))
    with pytest.raises(IndexError):
        model(z, t, torch.tensor([model.num_classes + 1]))


def test_positions_tell_patches_apart():
    model = shaken(make())
    z, t, y = inputs()
    swapped = z.roll(8, dims=3)  # the halves change places, and so do their patches
    assert not torch.allclose(model(swapped, t, y), model(z, t, y).roll(8, dims=3), atol=1e-2)
    torch.nn.init.zeros_(model.positions)  # without them the network sees a bag of patches
    expected = model(z, t, y).roll(8, dims=3)
    torch.testing.assert_close(model(swapped, t, y), expected, atol=1e-4, rtol=1e-4)


IMPOSSIBLE = [
    ({"patch_size": 5}, "image_size 16 is not a multiple of patch_size 5"),
    ({"heads": 3}, "dim 32 is not a multiple of heads 3"),
    ({"dim": 0}, "dim is 0, not a whole number from 1"),
    ({"depth": "2"}, "depth is '2', not a whole number from 1"),
    ({"conv_dim": -1}, "conv_dim is -1, not a whole number from 0"),
    ({"conv_dim": 8.5}, "conv_dim is 8.5, not a whole number from 0"),
    ({"conv_dim": 8, "image_size": 15, "patch_size": 3}, "conv_dim 8 needs an even patch_size"),
    ({"class_names": ["a", 2]}, "class_names"),
]


@pytest.mark.parametrize("changes, message", IMPOSSIBLE)
def test_what_no_network_can_have_is_a_value_error_with_the_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


# model.py taken away: alone in an empty folder, in a Python that finds nothing else of ours.

ALONE = """
import sys
import torch
from model import DiT

torch.manual_seed(0)
model = DiT(image_size=16, patch_size=4, dim=32, depth=2, heads=2, class_names=["a", "b"])
z, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1]), torch.tensor([0, 2])
((model(z, t, y) - z) ** 2).mean().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.save_pretrained("mine")
again = DiT.from_pretrained("mine")
assert torch.equal(again(z, t, y), model.eval()(z, t, y)) and again.class_names == ["a", "b"]
for bad in ({"dim": 33}, {"patch_size": 5}):
    try:
        DiT.from_pretrained("mine", **bad)
    except ValueError as error:
        print(error)
print(*sorted(name for name in sys.modules if name in ("support", "sample", "train", "data")))
"""


def test_a_network_of_other_arguments_is_saved_and_loaded(tmp_path):
    class Own(DiT):
        def __init__(self, class_names):
            super().__init__(16, 4, 16, 1, 2, class_names)

    model = Own(["a"])
    model.class_names = ["b"]
    model.save_pretrained(tmp_path)
    assert Own.from_pretrained(tmp_path).class_names == ["b"]


def test_alone_in_an_empty_folder_it_builds_trains_saves_and_loads(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    command = [sys.executable, "-c", ALONE]
    run = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second, ours = run.stdout.splitlines()
    assert "dim 33 is not a multiple of heads 2" in first and "patch_size 5" in second
    assert ours == "" and run.stderr == ""
