"""At which t do samples go wrong? Real pictures are noised to t and sampled from there.

    python experiments/renoise.py out --dataset butterflies --held-out butterflies-held-out

A perfect network would turn them into pictures as real as they were, whatever the t. The kernel
distance (experiments/score.py) to pictures that were not trained on says how far this one is from
that. It also says what blurring would do to the same pictures: a scale to read the others by.
Needs --dataset with the classes of the network, several pictures of each.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import sample  # noqa: E402
from data.images import load_images  # noqa: E402
from experiments.sampling import BASE, integrate  # noqa: E402
from experiments.score import SIZE, features, kernel_distance  # noqa: E402
from model import UserError  # noqa: E402

TIMES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
STEPS = 25  # of a whole way from t = 1 to 0; a part of the way takes its share


@torch.no_grad()
def renoise(model, x, class_ids, t, seed=0):
    """Noise pictures x (N,3,S,S) to t, and follow the velocity back to 0, without guidance."""
    generator = torch.Generator().manual_seed(seed)
    way, pictures = {**BASE, "steps": max(1, round(STEPS * t)), "scale": 1.0}, []
    for part, y in zip(x.split(sample.MAX_BATCH), class_ids.split(sample.MAX_BATCH)):
        z = (1 - t) * part + t * torch.randn(part.shape, generator=generator)
        with common.autocast(z.device):
            pictures.append(integrate(model, y, z, **way, start=t)[0])
    return torch.cat(pictures)


def blurred(x, factor):
    """x (N,3,S,S) at a lower resolution, enlarged again."""
    return F.interpolate(F.avg_pool2d(x, factor), x.shape[-1], mode="bicubic")


def main():
    parser = common.new_parser(__doc__)
    parser.add_argument("checkpoint", help="a folder or a Hub id")
    parser.add_argument("--dataset", type=Path, required=True, help="a folder of class folders")
    text = "real pictures that were not trained on"
    parser.add_argument("--held-out", type=Path, required=True, metavar="FOLDER", help=text)
    text = "pictures of each class (default: %(default)s)"
    parser.add_argument("--each", type=common.int_in_range(1), default=6, metavar="N", help=text)
    flags = parser.parse_args()
    model = common.load_model(flags.checkpoint)
    images, labels, class_names = load_images(flags.dataset, model.image_size)
    if class_names != model.class_names:
        raise UserError(f"--dataset {flags.dataset} has other classes than {flags.checkpoint}")
    first = torch.cat([(labels == i).nonzero()[: flags.each, 0] for i in labels.unique()])
    x, y = images[first].float() / 127.5 - 1, labels[first]
    real = features(load_images(flags.held_out, SIZE)[0])

    def report(what, pictures):
        pictures = F.interpolate(sample.to_uint8(pictures).float(), SIZE, mode="bicubic")
        print(f"{what}: KID {kernel_distance(features(pictures.clamp(0, 255)), real):.0f}")

    report("as they are", x)
    for factor in (2, 4):
        report(f"at 1/{factor} of the resolution", blurred(x, factor))
    for t in TIMES:
        report(f"from t = {t:g}", renoise(model, x, y, t))


if __name__ == "__main__":
    common.run_command(main)
