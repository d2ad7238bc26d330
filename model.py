"""The network of nanoDiT: a class-conditional diffusion transformer (DiT) on pixels, without a VAE.

- Transformer blocks with adaLN-zero, as in DiT (Peebles & Xie 2022, arXiv 2212.09748).
- x-prediction on large patches of pixels (Li & He 2025, arXiv 2511.13720): the network predicts
  the clean picture x, which forward() turns into the velocity.
- Optional convolutions before and after the transformer, which draw detail and hide the seams
  between patches (after Chen et al. 2025, arXiv 2511.18822).
- Learned position embeddings.
- QK-norm (Henry et al. 2020, arXiv 2010.04245), by layer norm, with a learned scale per head.
- No dropout, and no parameters in the norms themselves: adaLN scales the tokens instead.

This file needs only torch and huggingface_hub[torch], so you can copy it into a project of your
own. Images are in [-1, 1]; t = 0 is data, t = 1 is noise.

Shapes in the comments: B pictures of S x S pixels, cut into T = (S/P)^2 patches of P x P pixels;
each of the H attention heads is D numbers wide, and H * D = dim.
"""

import contextlib
import inspect
import json
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download

# v = (z_t - x) / t magnifies an error in x by 1/t, so train.py draws no smaller t than this.
# Sampling may go lower: to the network, every smaller t looks like this one.
MIN_T = 0.05


class NetworkError(ValueError):
    """Sizes, a config or weights that do not make a network."""

    mendable = True  # by the user: nanoDiT's scripts print it in one line


def norm(x):
    """Layer norm over the last dimension, without learned parameters."""
    return F.layer_norm(x, x.shape[-1:])


def modulate(x, shift, scale):
    """adaLN: shift and scale all tokens of a picture, x (B, T, dim), by `shift` and `scale`, both
    (B, dim)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class ConvNet(nn.Module):
    """A stack of 3x3 convolutions with channels[0] channels going in, then channels[1], and so on.
    All but the last are scaled and shifted by the condition c (B, dim), and go through a GELU."""

    def __init__(self, dim, channels):
        super().__init__()
        pairs = zip(channels[:-1], channels[1:])
        self.convs = nn.ModuleList(nn.Conv2d(i, o, kernel_size=3, padding=1) for i, o in pairs)
        self.modulations = nn.ModuleList(nn.Linear(dim, 2 * o) for o in channels[1:-1])

    def forward(self, x, c):
        for conv, modulation in zip(self.convs, self.modulations):  # all but the last
            shift, scale = modulation(c)[:, :, None, None].chunk(2, dim=1)
            x = F.gelu(conv(x) * (1 + scale) + shift)
        return self.convs[-1](x)


def attend(q, k, v):
    """softmax(q k^T / sqrt(D)) v, for q, k and v of shape (B, H, T, D)."""
    if not q.is_cuda and q.shape[2] <= 256:
        # Written out, for few tokens, as it holds all T x T products: on a CPU, bf16 training is up
        # to 1.5 times as fast, and on MPS the call below has given wrong values (pytorch#163597).
        # 1/sqrt(D) multiplies q, as torch.compile would recognise softmax(q k^T / sqrt(D)) v, and
        # replace it by that slower call.
        q = q * q.shape[3] ** -0.5
        return (q @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens (B, T, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        # QK-norm bounds the products of queries and keys, and with them how sharp attention can be,
        # so each head learns by how much to scale them.
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3 * self.heads, -1))  # (B, T, 3 H, D)
        qk, v = qkv.split([2 * self.heads, self.heads], dim=2)
        # The norm comes before the transposition, as compiled training is then a fifth faster.
        q, k = norm(qk).transpose(1, 2).chunk(2, dim=1)  # each (B, H, T, D)
        v = v.transpose(1, 2).contiguous()  # on MPS a permuted v gave wrong values (pytorch#181133)
        x = attend(self.scale * q, k, v).transpose(1, 2).flatten(2)  # (B, T, dim)
        return self.out(x)


class Block(nn.Module):
    """A transformer block. The condition c (B, dim), which has been through a SiLU, shifts, scales
    and gates both of its halves."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attention(modulate(norm(x), shift1, scale1))
        x = x + gate2[:, None] * self.mlp(modulate(norm(x), shift2, scale2))
        return x


def timestep_features(t):
    """Sinusoidal features of t: (B,) -> (B, 256), the cos and sin of 1000 t at 128 frequencies
    from 1 down to almost 1e-4. A t below MIN_T has the features of MIN_T."""
    frequencies = 1e-4 ** (torch.arange(128, device=t.device) / 128)
    angles = 1000 * t.float().clamp_min(MIN_T)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def check_sizes(image_size, patch_size, dim, depth, heads, conv_dim):
    """Raise NetworkError, with the numbers, if there is no DiT of these sizes."""
    for name, size in list(locals().items()):  # the arguments
        least = 0 if name == "conv_dim" else 1
        if not isinstance(size, int) or size < least:
            raise NetworkError(f"{name} is {size!r}, not a whole number from {least}")
    if image_size % patch_size:
        raise NetworkError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    if dim % heads:
        raise NetworkError(f"dim {dim} is not a multiple of heads {heads}")
    if conv_dim > 0 and patch_size % 2:
        raise NetworkError(f"conv_dim {conv_dim} needs an even patch_size, not {patch_size}")


class DiT(nn.Module, PyTorchModelHubMixin):
    """A diffusion transformer that returns the velocity v = eps - x of a rectified flow.

    The arguments are JSON-serialisable, and are what config.json holds:
    image_size: side length of the pictures in pixels; a multiple of patch_size.
    patch_size: side length in pixels of the patches that become tokens.
    dim: width of the tokens; a multiple of heads.
    depth: number of blocks.
    heads: attention heads in each block.
    class_names: one string per class, in the order of the class ids.
    dataset: where the pictures came from, for whoever reads config.json.
    cfg_scale: the guidance that suits this network; sample.py uses it unless told otherwise.
    conv_dim: channels of the convolutions before and after the blocks; 0 for a plain DiT.

    Raises NetworkError, a ValueError, if the sizes or the class names are impossible.
    """

    def __init__(
        self,
        image_size,
        patch_size,
        dim,
        depth,
        heads,
        class_names,
        dataset="",
        cfg_scale=3.0,
        conv_dim=0,
    ):
        super().__init__()
        check_sizes(image_size, patch_size, dim, depth, heads, conv_dim)
        names = class_names if isinstance(class_names, (list, tuple)) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise NetworkError("class_names must be a list with one string per class")
        self.image_size = image_size
        self.class_names = [str(name) for name in names]  # plain str, even from NumPy
        self.dataset = dataset
        self.cfg_scale = cfg_scale
        self.num_classes = len(names)  # also the id of the null class: "no class given"

        # A plain DiT cuts the pixels themselves into patches, and its final layer draws each patch
        # from its token alone: outlines break at the seams, and fine detail is lost. With conv_dim,
        # a stem extracts features from the noisy picture, the transformer works on patches of
        # these, and a head draws the clean picture from what the transformer returns and, as in a
        # U-Net, from the features. Stem and head see cells of 2 x 2 pixels, which is faster.
        self.stem = self.head = None
        self.patch_cells = patch_size  # cells along a side of a patch: pixels, in a plain DiT
        # Numbers in a patch of 3 channels. For C channels, change this 3, both 12s below (to 4 C),
        # sample.generate_states, and data/images.py, which reads RGB.
        patch_dim = 3 * patch_size**2
        if conv_dim > 0:
            self.patch_cells = patch_size // 2
            patch_dim = conv_dim * self.patch_cells**2
            self.stem = ConvNet(dim, [12, conv_dim, conv_dim])  # a cell has 2 x 2 x 3 numbers
            self.head = ConvNet(dim, [2 * conv_dim, conv_dim, conv_dim, 12])

        self.patch_embedding = nn.Linear(patch_dim, dim)
        self.positions = nn.Parameter(torch.randn((image_size // patch_size) ** 2, dim))
        self.timestep_embedding = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        # Starts at a standard deviation of 1. At DiT's 0.02, samples ignore their class for most
        # of the training.
        self.class_embedding = nn.Embedding(self.num_classes + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.final_layer = nn.Linear(dim, patch_dim)
        self.initialize()

    def initialize(self):
        """adaLN-zero: each block starts as the identity, and the prediction of x starts at 0.
        The other layers keep PyTorch's own initialisation."""
        zero_layers = [block.modulation for block in self.blocks]
        zero_layers += [self.final_modulation, self.final_layer]
        if self.head:
            zero_layers += [*self.stem.modulations, *self.head.modulations, self.head.convs[-1]]
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, t, y):
        """The velocity at z_t = (1-t) x + t eps.

        z: (B,3,S,S) float, noisy pictures; t: (B,) in (0, 1], near 0 data, and at 1 noise;
        y: (B,) int64 class ids, where num_classes is the null class. Returns (B,3,S,S) float32.
        """
        # The condition is the same for all tokens: time plus class.
        c = self.timestep_embedding(timestep_features(t)) + self.class_embedding(y)
        c = F.silu(c)  # (B, dim)

        features = z  # a plain DiT has no stem: its features are the pixels
        if self.stem:
            features = self.stem(F.pixel_unshuffle(z, 2), c)  # (B, conv_dim, S/2, S/2)

        # Patchify: every P x P patch becomes a token, of N = patch_dim numbers at first.
        x = F.pixel_unshuffle(features, self.patch_cells)  # (B, N, S/P, S/P)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, T, N), as MPS needs it (pytorch#161641)
        x = self.patch_embedding(x) + self.positions  # (B, T, dim)

        for block in self.blocks:
            x = block(x, c)

        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        x = self.final_layer(modulate(norm(x), shift, scale))  # (B, T, N)

        # Unpatchify, to the shape of the features.
        x = x.transpose(1, 2).unflatten(2, grid)  # (B, N, S/P, S/P)
        x = F.pixel_shuffle(x, self.patch_cells)
        if self.head:
            x = self.head(torch.cat([x, features], dim=1), c)
            x = F.pixel_shuffle(x, 2)

        # x (B, 3, S, S) is now the predicted clean picture. On the line from x to eps, z_t - x =
        # t (eps - x) = t v. The division is by the true t, so that the last Euler step, of length
        # t, ends at the predicted x. (To predict v instead, return x.float(). To predict eps, mind
        # that v = (eps - z_t) / (1 - t) has no value at t = 1, where sampling begins.)
        return (z.float() - x.float()) / t.float()[:, None, None, None]

    # A trained network in a folder, or on the Hub: what save_pretrained("mine") or, by the mixin,
    # push_to_hub("you/mine") has written, DiT.from_pretrained reads.

    def save_pretrained(self, save_directory, **options):
        """Write config.json, model.safetensors and a README.md into a folder: see the mixin. If
        class_names, dataset or cfg_scale have been set since, the new values are written."""
        names = self._hub_mixin_config.keys() & {"class_names", "dataset", "cfg_scale"}
        changed = {name: getattr(self, name) for name in names}
        options["config"] = options.get("config") or {**self._hub_mixin_config, **changed}
        return super().save_pretrained(save_directory, **options)

    @classmethod
    def from_pretrained(cls, checkpoint, strict=True, **options):
        """The network in a folder, such as "out", or at a Hub id, such as "you/butterflies", in
        evaluation mode, on the CPU.

        strict: False accepts a file without some of the weights, such as those of layers that you
        have added since; they stay as they are initialised, and network.lacking lists them.
        options: arguments of the network, which override config.json, as cfg_scale=2.0 does, and of
        huggingface_hub.snapshot_download, such as revision or token. Raises NetworkError if there
        is no network, or if its files are damaged or of a different one.
        """
        parameters = inspect.signature(cls.__init__).parameters
        overrides = {name: options.pop(name) for name in parameters if name in options}
        inspect.signature(snapshot_download).bind(checkpoint, **options)  # or a TypeError

        folder = Path(checkpoint).expanduser()
        if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(checkpoint)):
            with refusing(f"no folder {checkpoint}, and cannot download {checkpoint} from the Hub"):
                files = ["config.json", "model.safetensors"]
                folder = Path(snapshot_download(checkpoint, allow_patterns=files, **options))
        with refusing(f"no network in {checkpoint}: config.json is missing, or of another kind"):
            config = {**json.loads((folder / "config.json").read_text("utf-8")), **overrides}
            inspect.signature(cls.__init__).bind(None, **config)  # a TypeError if the names differ
        network = cls(**config)

        def note(network, names):
            network.lacking = names.missing_keys
            if names.unexpected_keys:
                raise ValueError(f"there is no layer for {names.unexpected_keys[0]}")

        hook = network.register_load_state_dict_post_hook(note)
        with refusing(f"no network in {checkpoint}: model.safetensors is missing, or does not fit"):
            # The mixin's own, as it knows of weights that layers share.
            cls._load_as_safetensor(network, folder / "model.safetensors", "cpu", strict=strict)
        hook.remove()
        return network.eval()


@contextlib.contextmanager
def refusing(problem):
    """Turn whatever a foreign file, or a library that fetches it, raises into a NetworkError that
    begins with the problem."""
    try:
        yield
    except Exception as error:
        raise NetworkError(f"{problem}: {str(error)[:200]}") from error
