"""At which t do samples go wrong? Real pictures are noised to t and sampled from there.

    python experiments/renoise.py out --dataset butterflies --held-out butterflies-held-out

A perfect network would turn them into pictures just as realistic, whatever t is. The kernel
distance x 1000 (experiments/score.py) to pictures that were not trained on measures how far this
network falls short. For scale, it is also printed for blurred copies of the same pictures. Without
guidance, which would add an error of its own, and with the same noise for all t. --dataset must
have the classes of the network.
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
from experiments.score import SIZE, features, kernel_distance, resized  # noqa: E402
from model import UserError  # noqa: E402

TIMES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
STEPS = 20  # for the whole path from t = 1 to 0; a shorter path takes proportionally fewer


@torch.no_grad()
def renoise(model, x, class_ids, t, seed=0):
    """Noise pictures x (N,3,S,S) to t, and follow the velocity back to 0, without guidance."""
    generator = torch.Generator().manual_seed(seed)
    settings = {**BASE, "steps": max(1, round(STEPS * t)), "scale": 1.0}
    pictures = []
    for batch, y in zip(x.split(sample.MAX_BATCH), class_ids.split(sample.MAX_BATCH)):
        z = (1 - t) * batch + t * torch.randn(batch.shape, generator=generator)
        with common.autocast(z.device):
            pictures.append(integrate(model, y, z, **settings, start=t)[0])
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
    if flags.dataset.resolve() == flags.held_out.resolve():
        raise UserError("--dataset and --held-out are the same folder: compare with other pictures")
    model = common.load_model(flags.checkpoint)
    images, labels, class_names = load_images(flags.dataset, model.image_size)
    if class_names != model.class_names:
        raise UserError(f"--dataset {flags.dataset} has other classes than {flags.checkpoint}")
    # The first few of each class.
    first = torch.cat([(labels == i).nonzero()[: flags.each, 0] for i in labels.unique()])
    held_out = load_images(flags.held_out, SIZE)[0]
    x, y = images[first].float() / 127.5 - 1, labels[first]
    real = features(held_out)
    print(f"{len(x)} pictures, {len(real)} held-out ones")

    def report(what, pictures):
        kid = kernel_distance(features(resized(sample.to_uint8(pictures))), real)
        print(f"{what}: KID {kid:.0f}", flush=True)

    report("as they are", x)
    for factor in (2, 4):
        report(f"at 1/{factor} of the resolution", blurred(x, factor))
    for t in TIMES:
        report(f"from t = {t:g}", renoise(model, x, y, t))


if __name__ == "__main__":
    common.run_command(main)
