"""Do samples of the drawn butterflies look like their class? A small classifier judges.

    python experiments/judge_drawn.py out               # 4 samples per class of the model in out/
    python experiments/judge_drawn.py out --steps 20 --cfg-scale 2 --seed 1

Trains a convolutional classifier with three heads (colour, pattern, shape) on freshly drawn
butterflies, half a minute on two cores. Prints its accuracy on other drawings, for comparison; then
the share of samples that it finds right in colour, in pattern, in shape, and in all three. It does
not see variety: one good picture of each class, repeated, would score just as well.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import int_in_range, load_model, new_parser, parse_finite, run_command  # noqa: E402
from data.drawn import draw_butterflies  # noqa: E402
from model import UserError  # noqa: E402
from sample import DEFAULT_STEPS, generate  # noqa: E402


def targets(labels):
    """Colour, pattern and shape (N,) of class ids (N,)."""
    return labels // 15, labels // 3 % 5, labels % 3


def train_judge(images_per_class=100, epochs=4, seed=1):
    """A classifier of pictures (N,3,64,64) in [-1, 1]: logits (N,13) of 5 + 5 + 3 answers."""
    torch.manual_seed(seed)
    layers, width = [], 3
    for next_width in (24, 48, 96, 96):
        layers += [
            nn.Conv2d(width, next_width, 3, stride=2, padding=1),
            nn.BatchNorm2d(next_width),
            nn.ReLU(),
        ]
        width = next_width
    judge = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 13))
    images, labels, _ = draw_butterflies(images_per_class, 64, seed)
    optimizer = torch.optim.AdamW(judge.parameters())
    steps = epochs * len(images) // 50
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        i = torch.randint(len(images), (50,))
        heads = judge(scaled(images[i])).split((5, 5, 3), dim=1)
        loss = sum(F.cross_entropy(logits, y) for logits, y in zip(heads, targets(labels[i])))
        optimizer.zero_grad()
        loss.backward()
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
    heads = torch.cat([judge(batch) for batch in images.split(100)]).split((5, 5, 3), dim=1)
    right = [logits.argmax(1) == y for logits, y in zip(heads, targets(labels))]
    right.append(right[0] & right[1] & right[2])
    return {
        name: r.float().mean().item()
        for name, r in zip(("colour", "pattern", "shape", "class"), right)
    }


def main():
    parser = new_parser(__doc__)
    parser.add_argument(
        "checkpoint", help="a folder with a model trained on the drawn butterflies, or a Hub id"
    )
    count = int_in_range(1)
    text = "samples of each of the 75 classes (default: %(default)s)"
    parser.add_argument("--num-images", type=count, default=4, metavar="N", help=text)
    text = "Euler steps (default: %(default)s)"
    parser.add_argument("--steps", type=count, default=DEFAULT_STEPS, metavar="N", help=text)
    text = "guidance (default: the model's own)"
    parser.add_argument("--cfg-scale", type=parse_finite, metavar="W", help=text)
    text = "seed of the noise (default: %(default)s)"
    parser.add_argument("--seed", type=int_in_range(0), default=0, metavar="N", help=text)
    args = parser.parse_args()
    model = load_model(args.checkpoint)
    images, labels, names = draw_butterflies(10, 64, seed=2)
    if model.class_names != names or model.image_size != 64:
        raise UserError(f"{args.checkpoint} was not trained on drawn butterflies of 64x64 pixels")
    judge = train_judge()
    report("fresh drawings", shares(judge, scaled(images), labels))
    labels = torch.arange(75).repeat_interleave(args.num_images)
    samples = torch.cat(list(generate(model, labels, args.seed, args.steps, args.cfg_scale)))
    report(f"{len(labels)} samples", shares(judge, scaled(samples), labels))


def report(what, share):
    print(f"{what}: " + ", ".join(f"{name} {100 * value:.1f}%" for name, value in share.items()))


if __name__ == "__main__":
    run_command(main)
