"""The drawn butterflies: classes, ids, variety."""

import torch

from data.drawn import draw_butterflies


def test_classes_and_shapes():
    images, labels, names = draw_butterflies(3, 32, seed=0)
    assert images.shape == (225, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [3] * 75
    assert len(set(names)) == 75 and names == sorted(names)
    colours, patterns, shapes = zip(*(name.split("-") for name in names))
    for i in range(75):  # 15*colour + 3*pattern + shape
        assert colours[i] == colours[i // 15 * 15]
        assert patterns[i] == patterns[i // 3 % 5 * 3]
        assert shapes[i] == shapes[i % 3]
    assert [len(set(part)) for part in (colours, patterns, shapes)] == [5, 5, 3]


def test_the_seed_decides_and_pictures_of_a_class_differ():
    first, again, other = (draw_butterflies(2, 32, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(
        (a.int() - b.int()).abs().float().mean() > 3 for a, b in first.view(75, 2, 3, 32, 32)
    )


def test_wings_have_the_colour_of_their_class():
    images, labels, names = draw_butterflies(8, 64, seed=4)
    plain = [i for i, label in enumerate(labels.tolist()) if "plain" in names[label]]
    channels = {"blue": [2], "green": [1], "red": [0], "violet": [0, 2], "yellow": [0, 1]}
    for i in plain:
        pixels = images[i].flatten(1).float()
        vivid = pixels[:, (pixels.amax(0) - pixels.amin(0)) > 110]  # the background is pale
        assert vivid.shape[1] > 200
        high = channels[names[labels[i]].split("-")[0]]
        low = [c for c in range(3) if c not in high]
        assert vivid[high].mean(1).min() > vivid[low].mean(1).max() + 20, names[labels[i]]
