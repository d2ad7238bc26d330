"""The network: shapes, what it is at the start, positions, and sizes it refuses."""

import pytest
import torch
import torch.nn.functional as F

from model import DiT, UserError, rotary_table, rotate

SIZES = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "heads": 2}


def make(**changes):
    torch.manual_seed(0)
    return DiT(**{**SIZES, "class_names": ["a", "b", "c"], **changes})


def inputs(b=5, size=16):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(b, 3, size, size, generator=generator)
    return z, torch.linspace(0, 1, b), torch.arange(b) % 4


def shaken(model):
    """The model with every weight moved a little: no longer the zero function of the start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


def test_returns_a_float32_velocity_of_the_pictures_shape():
    z, t, y = inputs()
    v = shaken(make())(z, t, y)
    assert v.shape == z.shape and v.dtype == torch.float32 and v.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        for picture in (z, z.bfloat16()):
            assert shaken(make())(picture, t, y).dtype == torch.float32


def test_at_the_start_the_network_predicts_zero():
    z, t, y = inputs()
    # x = 0 means v = (z - 0) / t, with t bounded below; v = 0 is just that.
    expected = z / t.clamp_min(0.05)[:, None, None, None]
    torch.testing.assert_close(make()(z, t, y), expected)


def test_blocks_start_as_the_identity():
    block = make().blocks[0]
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(block(x, c, *rotary_table(4, 16)), x)


def test_the_skip_path_puts_every_pixel_back_where_it_was():
    # With x predicted as z_t itself, patchified and unpatchified, the velocity is 0 at each pixel.
    model = make()
    torch.nn.init.ones_(model.skip.bias)
    z, t, y = inputs()
    assert model(z, t, y).abs().max() < 1e-6


def test_time_and_class_matter_and_pictures_do_not_mix():
    model = shaken(make())
    z, t, y = inputs()
    v = model(z, t, y)
    assert not torch.allclose(v, model(z, t, (y + 1) % 4), atol=1e-3)
    assert not torch.allclose(v[1:4], model(z, t.flip(0) * 0.9 + 0.05, y)[1:4], atol=1e-3)
    torch.testing.assert_close(v[2:3], model(z[2:3], t[2:3], y[2:3]), atol=1e-5, rtol=1e-5)


def test_the_null_class_is_one_more_than_the_classes():
    model = make()
    assert model.num_classes == 3 and model.class_names == ["a", "b", "c"]
    z, t, _ = inputs(1)
    model(z, t, torch.tensor([model.num_classes]))
    with pytest.raises(IndexError):
        model(z, t, torch.tensor([model.num_classes + 1]))


def test_rotary_positions_see_only_distances_in_both_directions():
    cos, sin = rotary_table(6, 16)
    q, k = torch.randn(16), torch.randn(16)
    scores = F.linear(rotate(q.expand(36, 16), cos, sin), rotate(k.expand(36, 16), cos, sin))
    scores = scores.view(6, 6, 6, 6)  # (row of q, column of q, row of k, column of k)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[3, 1, 5, 4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores[4, 5, 1, 2], scores[5, 3, 2, 0], atol=1e-4, rtol=1e-4)
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3  # rows are not columns
    assert (scores[0, 0, 0, 1] - scores[0, 0, 0, 2]).abs() > 1e-3


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"patch_size": 5}, "PATCH_SIZE"),
        ({"heads": 3}, "HEADS"),
        ({"dim": 36}, "DIM"),
        ({"dim": 0}, "DIM"),
        ({"depth": 100_000}, "DEPTH"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes, name):
    with pytest.raises(UserError, match=name):
        make(**changes)


def test_no_float64_anywhere():
    # MPS has none; the meta device runs every operation's shapes and types without computing.
    with torch.device("meta"):
        model = make()
        v = model(torch.zeros(2, 3, 16, 16), torch.ones(2), torch.zeros(2, dtype=torch.long))
    tensors = [v, *model.parameters(), *model.buffers()]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
