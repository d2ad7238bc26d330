"""Do samples of the drawn butterflies look like their class? A small classifier judges.

    python -m experiments.judge_drawn out     # 4 samples of each class, of the model in out/
    python -m experiments.judge_drawn out --steps 20 --cfg-scale 2 --seed 1

Trains a convolutional classifier with three heads (colour, pattern, shape) on freshly drawn
butterflies, half a minute on two cores. Prints its accuracy on other drawings, for comparison; then
the share of samples that it finds right in colour, in pattern, in shape, and in all three.

It judges only the class. Whether wings are clean and outlines smooth it does not see, nor variety:
one rough but recognisable picture of each class, repeated, would score just as well.
"""

from support.settings import MAX_SEED, UserError, limited, new_parser, run_command

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.drawn import draw_butterflies
from model import DiT
from sample import DEFAULT_STEPS, generate

HEADS = (5, 5, 3)  # how many colours, patterns and shapes there are


def targets(labels):
    """Colour, pattern and shape (N,) of class ids (N,)."""
    return labels // 15, labels // 3 % 5, labels % 3


def halving_layer(channels, next_channels):
    """A convolution that halves the size of its picture, with norm and ReLU."""
    convolution = nn.Conv2d(channels, next_channels, 3, stride=2, padding=1)
    return [convolution, nn.BatchNorm2d(next_channels), nn.ReLU()]


def train_judge(images_per_class=100, epochs=4, seed=1):
    """A classifier of pictures (N,3,64,64) in [-1, 1]: logits (N,13) of 5 + 5 + 3 answers."""
    torch.manual_seed(seed)
    judge = nn.Sequential(
        *halving_layer(3, 24),
        *halving_layer(24, 48),
        *halving_layer(48, 96),
        *halving_layer(96, 96),  # (N, 96, 4, 4)
        nn.Flatten(),
        nn.Linear(96 * 4 * 4, sum(HEADS)),
    )
    images, labels, _ = draw_butterflies(images_per_class, 64, seed)
    optimizer = torch.optim.AdamW(judge.parameters())
    steps = epochs * len(images) // 50
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        i = torch.randint(len(images), (50,))
        logits = judge(scaled(images[i])).split(HEADS, dim=1)
        losses = map(F.cross_entropy, logits, targets(labels[i]))
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def scaled(images):
    """uint8 pictures as floats in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def shares(judge, images, labels):
    """Share of pictures (N,3,64,64) in [-1, 1] that are judged right: {"colour", "pattern",
    "shape", "class": all three}."""
    logits = torch.cat([judge(batch) for batch in images.split(100)])
    guesses = [head.argmax(1) for head in logits.split(HEADS, dim=1)]
    colour, pattern, shape = map(torch.eq, guesses, targets(labels))
    right = {"colour": colour, "pattern": pattern, "shape": shape}
    right["class"] = colour & pattern & shape
    return {name: correct.float().mean().item() for name, correct in right.items()}


def report(what, judged):
    percentages = [f"{name} {100 * share:.1f}%" for name, share in judged.items()]
    print(f"{what}: {', '.join(percentages)}")


def main():
    parser = new_parser(__doc__)
    text = "a folder with a model trained on the drawn butterflies, or a Hub id"
    parser.add_argument("checkpoint", help=text)
    count = limited(int, 1)
    text = "samples of each of the 75 classes (default: %(default)s)"
    parser.add_argument("--num-images", type=count, default=4, metavar="N", help=text)
    text = "Euler steps (default: %(default)s)"
    parser.add_argument("--steps", type=count, default=DEFAULT_STEPS, metavar="N", help=text)
    text = "guidance (default: the model's own)"
    parser.add_argument("--cfg-scale", type=limited(float), metavar="W", help=text)
    text = "seed of the noise (default: %(default)s)"
    parser.add_argument("--seed", type=limited(int, 0, MAX_SEED), default=0, metavar="N", help=text)
    flags = parser.parse_args()
    model = DiT.from_pretrained(flags.checkpoint)
    drawings, classes, names = draw_butterflies(10, 64, seed=2)
    if model.class_names != names or model.image_size != 64:
        raise UserError(f"{flags.checkpoint} was not trained on drawn butterflies of 64x64 pixels")

    judge = train_judge()
    report("fresh drawings", shares(judge, scaled(drawings), classes))
    class_ids = torch.arange(75).repeat_interleave(flags.num_images)
    batches = generate(model, class_ids, flags.seed, flags.steps, flags.cfg_scale)
    samples = torch.cat(list(batches))
    report(f"{len(samples)} samples", shares(judge, scaled(samples), class_ids))
    print("(only whether the class can be recognised, not how clean the wings are)")


if __name__ == "__main__":
    run_command(main)
