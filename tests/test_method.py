"""The method against closed forms: loss, batches, schedule, averages, validation, sampler."""

import math

import pytest
import torch

import sample
import train
from model import MIN_T, DiT
from sample import euler_states, guided, renew_noise, sample_conditional_cfg
from train import held_out, losses_at, random_batch, rectified_flow_loss


class Field(torch.nn.Module):
    """A velocity field (z, t, y) -> v with ten classes, which keeps what it was called with."""

    num_classes = 10

    def __init__(self, v):
        super().__init__()
        self.device = torch.nn.Parameter(torch.zeros(()))  # tells where a network is
        self.v = v
        self.calls = []

    def forward(self, z, t, y):
        self.calls.append((z, t, y))
        return self.v(z, t, y)


def noise(b=4, size=8, seed=0):
    return torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(seed))


# The loss


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


def test_loss_and_sampler_draw_no_random_numbers_and_write_into_nothing():
    before = torch.get_rng_state()
    y, start, eps = torch.zeros(4, dtype=torch.long), noise(), noise(seed=5)
    model = Field(lambda z, t, y: z)
    rectified_flow_loss(model, start, y, torch.full((4,), 0.3), eps)
    sample_conditional_cfg(model, y, 3, 2.0, start)
    assert torch.equal(start, noise()) and torch.equal(eps, noise(seed=5))
    assert torch.equal(before, torch.get_rng_state())


# What is trained on


def few_pictures():
    """Three pictures, bright on the left; the second is so everywhere in red. Labels are ids."""
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images[:, :, :, 0] = 255
    images[1, 0] = 255
    return images, torch.arange(3), torch.arange(3)


def test_a_batch_is_distributed_as_the_constants_say(monkeypatch):
    monkeypatch.setattr(train, "BATCH_SIZE", 4000)
    x, y, t, eps = random_batch(*few_pictures(), 3, step=5)
    assert x.shape == eps.shape == (4000, 3, 4, 4) and y.shape == t.shape == (4000,)
    assert x.dtype == eps.dtype == t.dtype == torch.float32 and y.dtype == torch.int64
    assert x.unique().tolist() == [-1, 1]
    mirrored = (x[:, 1, 0, 3] == 1).float().mean()
    assert mirrored == pytest.approx(train.FLIP_SHARE, abs=0.04)
    assert (y == 3).float().mean() == pytest.approx(train.LABEL_DROP, abs=0.025)
    red = x[:, 0, 0, 1] == 1
    assert (red == (y == 1))[y != 3].all()  # labels stay with their pictures
    assert MIN_T <= t.min() < MIN_T + 0.05 and t.max() < 1
    logit = torch.logit(t.double())
    assert logit.mean().item() == pytest.approx(train.T_MEAN, abs=0.08)
    assert logit.std().item() == pytest.approx(train.T_STD, abs=0.06)
    assert abs(eps.mean()) < 0.02 and eps.std().item() == pytest.approx(1, abs=0.02)


def test_flips_and_label_dropout_can_be_none_or_all(monkeypatch):
    monkeypatch.setattr(train, "BATCH_SIZE", 50)
    for share in (0, 1):
        monkeypatch.setattr(train, "FLIP_SHARE", share)
        monkeypatch.setattr(train, "LABEL_DROP", share)
        x, y, _, _ = random_batch(*few_pictures(), 3, step=1)
        assert (x[:, 1, 0, 3] == 1).float().mean() == share
        assert (y == 3).float().mean() == share


def test_a_batch_follows_from_the_seed_and_the_step_alone(monkeypatch):
    def batch(seed, step):
        monkeypatch.setattr(train, "SEED", seed)
        return random_batch(*few_pictures(), 3, step)

    first = batch(0, 5)
    torch.manual_seed(77)
    assert all(torch.equal(a, b) for a, b in zip(batch(0, 5), first))
    for seed, step in ((0, 6), (1, 5), (1, 4), (5, 0), (2**32 - 1, 5)):
        assert not torch.equal(batch(seed, step)[3], first[3])


def test_only_the_pictures_for_training_are_drawn():
    images, labels, _ = few_pictures()
    _, y, _, _ = random_batch(images, labels, torch.tensor([0, 2]), 3, step=1)
    assert set(y.tolist()) <= {0, 2, 3}


def test_a_twentieth_of_each_class_is_held_out_and_small_classes_keep_theirs():
    labels = torch.tensor([0] * 1 + [1] * 3 + [2] * 20 + [3] * 60)
    assert labels[held_out(labels)].bincount(minlength=4).tolist() == [0, 0, 1, 3]
    thirty_of_three = torch.arange(90) // 3  # where all are small, a twentieth of them together
    assert thirty_of_three[held_out(thirty_of_three)].bincount().tolist().count(1) == 5
    assert not held_out(torch.arange(30)).any()  # of one picture each, all are trained on


@pytest.mark.parametrize("classes", [1, 10, 20, 40])
def test_held_out_pictures_are_of_all_classes_in_whatever_order_they_lie(classes):
    labels = torch.arange(40 * classes) % classes  # one of each class, and again
    assert labels[held_out(labels)].bincount(minlength=classes).tolist() == [2] * classes


@pytest.mark.parametrize("n", [20_000, 20_999, 39_999, 1_281_167, 1_999_999])
def test_of_very_many_pictures_about_a_thousand_are_held_out(n):
    assert 1000 <= held_out(torch.zeros(n, dtype=torch.long)).sum() <= 1100


def test_the_learning_rate_warms_up_stays_and_falls_towards_zero(monkeypatch):
    for name, value in {"STEPS": 100, "WARMUP_STEPS": 8, "DECAY_SHARE": 0.4}.items():
        monkeypatch.setattr(train, name, value)
    factors = [train.learning_rate_factor(step) for step in range(1, 101)]
    assert factors[:8] == pytest.approx([n / 8 for n in range(1, 9)])
    assert factors[8:61] == [1] * 53
    assert factors[60:] == pytest.approx([(101 - step) / 40 for step in range(61, 101)])
    monkeypatch.setattr(train, "STEPS", 6)  # a short run: warmup is cut to its length
    assert max(train.learning_rate_factor(step) for step in range(1, 7)) == 1
    monkeypatch.setattr(train, "DECAY_SHARE", 0)
    assert train.learning_rate_factor(6) == 1


def test_the_average_follows_the_first_steps_and_then_remembers(monkeypatch):
    monkeypatch.setattr(train, "EMA_DECAY", 0.999)
    ema, model = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    torch.nn.init.zeros_(ema.weight)
    model.running_mean += 7
    kept = 1.0  # of the initial weights; without their warmup 0.99 would be left
    for step in range(1, 11):
        train.update_ema(ema, model, step)
        kept *= (1 + step) / (10 + step)
    assert ema.weight.item() == pytest.approx(1 - kept, abs=1e-6) and kept < 0.01
    assert ema.running_mean.item() == 7  # a buffer is copied
    torch.nn.init.zeros_(model.weight)
    train.update_ema(ema, model, 100_000)
    assert ema.weight.item() == pytest.approx(0.999 * (1 - kept), abs=1e-6)


# Losses at fixed t


def test_the_loss_at_each_t_is_a_mean_over_all_pictures(monkeypatch):
    # Grey pictures from black to white, the last batch a smaller one. A network that answers 0 has
    # the loss (eps - x)^2, where eps is in the z that it was called with.
    monkeypatch.setattr(train, "BATCH_SIZE", 64)
    grey = torch.linspace(0, 255, 100).round().to(torch.uint8)
    images = grey[:, None, None, None].expand(100, 3, 16, 16)
    ids = torch.arange(100)
    model = Field(lambda z, t, y: torch.zeros_like(z))
    losses = losses_at((0.5, 1.0), model, images, ids, ids)
    assert [len(z) for z, _, _ in model.calls] == [64, 64, 36, 36]
    assert [t.unique().item() for _, t, _ in model.calls] == [0.5, 1.0, 0.5, 1.0]
    assert torch.equal(torch.cat([y for _, _, y in model.calls[::2]]), ids)
    for first, loss in enumerate(losses):
        errors = []
        for z, t, y in model.calls[first::2]:
            x = images[y].float() / 127.5 - 1
            eps = (z - (1 - t[0]) * x) / t[0]
            assert eps.std().item() == pytest.approx(1, abs=0.02)
            errors.append((eps - x).square().flatten(1).mean(1))
        assert loss == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)
    assert all(map(math.isnan, losses_at((0.5, 1.0), model, images, ids, ids[:0])))


def test_the_noise_of_these_losses_is_always_the_same(monkeypatch):
    images, labels, ids = few_pictures()
    seen = []
    for seed, batch_size in ((1, 32), (2, 1)):
        torch.manual_seed(seed)
        monkeypatch.setattr(train, "SEED", seed)
        monkeypatch.setattr(train, "BATCH_SIZE", batch_size)
        model = Field(lambda z, t, y: torch.zeros_like(z))
        before = torch.get_rng_state()
        losses = losses_at((0.5, 1.0), model, images, labels, ids[1:])
        assert torch.equal(before, torch.get_rng_state())
        seen.append((losses, torch.cat([z for z, _, _ in model.calls])))
    (losses, z), (same_losses, same_z) = seen
    assert losses == pytest.approx(same_losses) and model.calls[0][2].tolist() == [1]
    assert torch.equal(z, same_z[[0, 2, 1, 3]])  # picture after picture, each at both t


# The sampler


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("cfg_scale", [1, 3.0])
def test_euler_is_exact_on_a_constant_field(steps, cfg_scale):
    model = Field(lambda z, t, y: torch.full_like(z, 0.75))
    x = sample_conditional_cfg(model, torch.arange(4), steps, cfg_scale, noise())
    torch.testing.assert_close(x, noise() - 0.75, atol=1e-5, rtol=0)


def test_the_states_are_those_at_the_given_times():
    ones = Field(lambda z, t, y: torch.ones_like(z))
    velocity = guided(ones, torch.arange(4), 1)
    states = list(euler_states(velocity, noise(), [1, 0.75, 0.25, 0]))
    assert [t.unique().item() for _, t, _ in ones.calls] == [1.0, 0.75, 0.25]
    for gone, z in zip((0, 0.25, 0.75, 1), states):
        torch.testing.assert_close(z, noise() - gone)
    x = sample_conditional_cfg(ones, torch.arange(4), 5, 1, noise())
    for times in ([1, 0.8, 0.6, 0.4, 0.2, 0], torch.linspace(1, 0, 6)):
        torch.testing.assert_close(x, list(euler_states(velocity, noise(), times))[-1])


def test_a_solver_starts_in_the_middle_and_takes_data_of_any_shape():
    # In two dimensions, with one point of data: the velocity (z - x) / t leads to it from anywhere.
    x, eps = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.3, 0.7]])
    z = 0.5 * x + 0.5 * eps
    *_, end = euler_states(lambda z, t: (z - x) / t[:, None], z, [0.5, 0.3, 0])
    torch.testing.assert_close(end, x)


M, S = 0.3, 0.5  # mean and standard deviation of normally distributed data


def gaussian_velocity(z, t, y):
    """E[eps - x | z_t] for x from N(M, S^2): z_t is Gaussian with mean (1-t) M and variance
    (1-t)^2 S^2 + t^2. The flow takes noise eps to M + S eps."""
    t = t[:, None, None, None]
    whitened = (z - (1 - t) * M) / ((1 - t) ** 2 * S**2 + t**2)
    return t * whitened - (M + (1 - t) * S**2 * whitened)


def test_euler_error_falls_as_one_over_steps_on_a_gaussian():
    def error(steps):
        x = sample_conditional_cfg(Field(gaussian_velocity), torch.arange(4), steps, 1, noise())
        return (x - (M + S * noise())).abs().mean().item()

    errors = [error(steps) for steps in (20, 40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:]):
        assert 1.8 < coarse / fine < 2.2, errors
    assert errors[-1] < 0.01


@pytest.mark.parametrize("eta, low, high", [(0, 0.999, 1.001), (0.5, 0.1, 0.5), (1, -0.05, 0.05)])
def test_fresh_noise_keeps_the_distribution_and_forgets_the_first_noise(eta, low, high):
    start, y = noise(2, 64), torch.zeros(2, dtype=torch.long)
    randn_like = sample.randn_like_of_places(1, [5, 6])
    model = Field(gaussian_velocity)
    x = sample_conditional_cfg(model, y, 200, 1, start, eta=eta, randn_like=randn_like)
    assert x.mean().item() == pytest.approx(M, abs=0.02)
    assert x.std().item() == pytest.approx(S, rel=0.03)
    correlation = torch.corrcoef(torch.stack([x.flatten(), start.flatten()]))[0, 1].item()
    assert low < correlation < high


@pytest.mark.parametrize("eta", [0.5, 1])
def test_renewed_noise_by_hand(eta):
    # At t = 1/3, before which it was 2/3, going back to 2/3 would leave a correlation of 1/4.
    x, eps, new = noise(seed=1), noise(seed=2), noise(seed=3)
    z, v = (2 * x + eps) / 3, eps - x
    renewed = renew_noise(z, 1 / 3, v, 1 / 3, eta, new)
    fresh = eta * math.sqrt(15) / 4
    mixed = math.sqrt(1 - fresh**2) * eps + fresh * new
    torch.testing.assert_close(renewed, (2 * x + mixed) / 3)
    end = renew_noise(x, 0.0, v, 1 / 3, eta, new)
    torch.testing.assert_close(end, x)  # data have no noise to renew


@pytest.mark.parametrize("w", [0.0, 0.5, 1, 1.0, 2.0, 5.0])
def test_guidance_is_linear_in_w(w):
    # Velocity 2 for a class, -1 for none: one step of length 1 goes from z to z - (-1 + 3 w).
    v = Field(lambda z, t, y: torch.where(y == 10, -1.0, 2.0)[:, None, None, None].expand_as(z))
    x = sample_conditional_cfg(v, torch.tensor([0, 3, 9, 3]), 1, w, noise())
    torch.testing.assert_close(x, noise() - (-1 + 3 * w), atol=1e-5, rtol=0)


def test_the_network_runs_once_a_step_and_sees_the_null_class():
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


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize("cfg_scale", [1, 3.0])
def test_sampling_lands_on_the_picture_that_the_network_predicts(steps, cfg_scale):
    # A new network's last layer is zero but for its bias: it predicts this picture, whatever it
    # sees. No noise may be left of it, however small t becomes.
    model = DiT(8, 4, 16, 1, 2, ["a", "b"])
    torch.nn.init.normal_(model.final_layer.bias)
    patch = model.final_layer.bias.detach().view(3, 4, 4)
    x = sample_conditional_cfg(model, torch.tensor([0, 1]), steps, cfg_scale, noise(2))
    torch.testing.assert_close(x, patch.repeat(2, 1, 2, 2), atol=1e-5, rtol=0)
