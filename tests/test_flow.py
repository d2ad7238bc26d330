"""The loss and the sampler against closed forms."""

import pytest
import torch

from model import DiT
from sample import sample_conditional_cfg
from train import rectified_flow_loss


class Field:
    """A velocity field (z, t, y) -> v with ten classes, which keeps what it was called with."""

    num_classes = 10

    def __init__(self, v):
        self.v, self.calls = v, []

    def __call__(self, z, t, y):
        self.calls.append((z, t, y))
        return self.v(z, t, y)


def noise(b=4, size=8, seed=0):
    return torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_loss_by_hand():
    # x = 2, eps = 5: z_t = 2 + 3t and v = 3 everywhere. The model answers 10 z: by hand at two t.
    x, eps = torch.full((2, 3, 4, 4), 2.0), torch.full((2, 3, 4, 4), 5.0)
    model = Field(lambda z, t, y: 10 * z)
    loss = rectified_flow_loss(model, x, torch.tensor([1, 2]), torch.tensor([0.0, 0.5]), eps)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(((20 - 3) ** 2 + (35 - 3) ** 2) / 2)
    z, t, y = model.calls[0]
    assert z[0].unique().tolist() == [2.0] and z[1].unique().tolist() == [3.5]
    assert t.tolist() == [0.0, 0.5] and y.tolist() == [1, 2]


def test_loss_is_zero_for_the_true_velocity_only():
    x, eps = noise(seed=1), noise(seed=2)
    t, y = torch.rand(4), torch.zeros(4, dtype=torch.long)
    assert rectified_flow_loss(Field(lambda z, t, y: eps - x), x, y, t, eps) == 0
    assert rectified_flow_loss(Field(lambda z, t, y: eps - x + 0.1), x, y, t, eps) > 0.009


def test_loss_and_sampler_draw_no_random_numbers():
    before = torch.get_rng_state()
    x, y = noise(), torch.zeros(4, dtype=torch.long)
    model = Field(lambda z, t, y: z)
    first = rectified_flow_loss(model, x, y, torch.full((4,), 0.3), noise(seed=5))
    again = rectified_flow_loss(model, x, y, torch.full((4,), 0.3), noise(seed=5))
    start = noise()
    sample_conditional_cfg(model, y, 3, 2.0, start)
    assert first == again
    assert torch.equal(start, noise())  # not written into
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("cfg_scale", [1, 3.0])
def test_euler_is_exact_on_a_constant_field(steps, cfg_scale):
    model = Field(lambda z, t, y: torch.full_like(z, 0.75))
    x = sample_conditional_cfg(model, torch.arange(4), steps, cfg_scale, noise())
    torch.testing.assert_close(x, noise() - 0.75, atol=1e-5, rtol=0)


def test_euler_visits_the_times_from_noise_to_data():
    model = Field(lambda z, t, y: z)
    sample_conditional_cfg(model, torch.arange(4), 4, 1, noise())
    assert [call[1].unique().item() for call in model.calls] == [1.0, 0.75, 0.5, 0.25]


def test_euler_error_falls_as_one_over_steps_on_a_gaussian():
    # Data N(m, s^2): z_t is Gaussian with mean (1-t) m and variance (1-t)^2 s^2 + t^2. Its velocity
    # is E[eps - x | z_t], and the flow takes noise eps to m + s eps.
    m, s = 0.3, 0.5

    def velocity(z, t, y):
        t = t[:, None, None, None]
        whitened = (z - (1 - t) * m) / ((1 - t) ** 2 * s**2 + t**2)
        return t * whitened - (m + (1 - t) * s**2 * whitened)

    def error(steps):
        x = sample_conditional_cfg(Field(velocity), torch.arange(4), steps, 1, noise())
        return (x - (m + s * noise())).abs().mean().item()

    errors = [error(steps) for steps in (20, 40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:]):
        assert 1.8 < coarse / fine < 2.2, errors
    assert errors[-1] < 0.01


@pytest.mark.parametrize("w", [0.0, 0.5, 1, 1.0, 2.0, 5.0])
def test_guidance_is_linear_in_w(w):
    # Velocity 2 for a class, -1 for none: one step of length 1 goes from z to z - (-1 + 3 w).
    v = Field(lambda z, t, y: torch.where(y == 10, -1.0, 2.0)[:, None, None, None].expand_as(z))
    x = sample_conditional_cfg(v, torch.tensor([0, 3, 9, 3]), 1, w, noise())
    torch.testing.assert_close(x, noise() - (-1 + 3 * w), atol=1e-5, rtol=0)


def test_network_calls_and_null_class():
    ids = torch.tensor([4, 2, 7])
    model = Field(lambda z, t, y: z)
    sample_conditional_cfg(model, ids, 5, 1, noise(3))
    assert [len(z) for z, _, _ in model.calls] == [3] * 5
    assert all(torch.equal(y, ids) for _, _, y in model.calls)

    model = Field(lambda z, t, y: z)
    sample_conditional_cfg(model, ids, 5, 3.0, noise(3))
    assert [len(z) for z, _, _ in model.calls] == [6] * 5
    for z, t, y in model.calls:
        assert torch.equal(z[:3], z[3:]) and torch.equal(t[:3], t[3:])
        assert y.tolist() == [4, 2, 7, 10, 10, 10]


def test_record_sees_the_whole_way():
    seen = []
    model = Field(lambda z, t, y: torch.ones_like(z))
    x = sample_conditional_cfg(model, torch.arange(4), 3, 1, noise(), record=seen.append)
    assert len(seen) == 4
    assert torch.equal(seen[0], noise()) and torch.equal(seen[-1], x)


@pytest.mark.parametrize("steps", [1, 10, 25, 100])
@pytest.mark.parametrize("cfg_scale", [1, 3.0])
def test_sampling_lands_on_the_picture_that_the_network_predicts(steps, cfg_scale):
    # A new network's last layer is zero but for its bias: it predicts this picture, whatever it
    # sees. No noise may be left of it, however small t becomes.
    model = DiT(8, 4, 16, 1, 2, ["a", "b"])
    torch.nn.init.normal_(model.final_layer.bias)
    patch = model.final_layer.bias.detach().view(3, 4, 4)
    x = sample_conditional_cfg(model, torch.tensor([0, 1]), steps, cfg_scale, noise(2))
    torch.testing.assert_close(x, patch.repeat(2, 1, 2, 2), atol=1e-5, rtol=0)
