"""The network of nanoDiT: a class-conditional diffusion transformer (DiT) on pixels, without a VAE.

- Transformer blocks with adaLN-zero, as in DiT (Peebles & Xie 2022, arXiv 2212.09748).
- x-prediction on large patches of pixels (Li & He 2025, arXiv 2511.13720): the network predicts
  the clean picture x, which forward() turns into the velocity.
- Optional convolutions before and after the transformer, which draw detail and hide the seams
  between patches (after Chen et al. 2025, arXiv 2511.18822).
- Learned position embeddings.
- QK-norm (Henry et al. 2020, arXiv 2010.04245), by layer norm.
- No dropout, and no parameters in the norms: adaLN scales the tokens instead.

Shapes in the comments: B pictures of S x S pixels, cut into T = (S/P)^2 patches of P x P pixels;
each of the H attention heads is D numbers wide, and H * D = dim.
"""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin

import hub

# v = (z_t - x) / t magnifies an error in x by 1/t, so training draws no t below this. Sampling may
# go lower: to the network, every smaller t looks like this one.
MIN_T = 0.05


def norm(x):
    """Layer norm over the last dimension, without learned parameters."""
    return F.layer_norm(x, x.shape[-1:])


def modulate(x, shift, scale):
    """adaLN: shift and scale all tokens of a picture, x (B, T, dim), by `shift` and `scale`, both
    (B, dim)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class ConvNet(nn.Module):
    """A stack of 3x3 convolutions with channels[0] channels going in, then channels[1], and so on.
    All but the last are scaled and shifted by the condition c (B, dim), and pass a GELU."""

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


class Attention(nn.Module):
    """Multi-head self-attention over all tokens (B, T, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        # QK-norm bounds the products of queries and keys, and with them how sharp attention can be:
        # each head learns by how much to scale them.
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, dim = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        q = self.scale * norm(q)
        k = norm(k)
        v = v.contiguous()  # on MPS a permuted v gave wrong values (pytorch#181133)
        if q.is_cpu and T <= 256:
            # Written out: bf16 training is then up to 1.5 times as fast. 1/sqrt(D) multiplies q, as
            # torch.compile would replace softmax(q k^T / sqrt(D)) v by the slower call below.
            q = q * (dim // self.heads) ** -0.5
            x = (q @ k.mT).softmax(dim=-1) @ v  # (B, H, T, D)
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(B, T, dim)
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


class DiT(nn.Module, PyTorchModelHubMixin):
    """A diffusion transformer that returns the velocity v = eps - x of a rectified flow.

    The arguments are JSON-serialisable, and are what config.json holds:
    image_size: side length of the pictures in pixels; a multiple of patch_size.
    patch_size: side length in pixels of the patches that become tokens.
    dim: width of the tokens; a multiple of heads.
    depth: number of blocks.
    heads: attention heads in each block.
    class_names: one string per class, in the order of the class ids.
    dataset: where the pictures came from; only the model card shows it.
    cfg_scale: the guidance that suits this network; sample.py uses it unless told otherwise.
    conv_dim: channels of the convolutions before and after the blocks; 0 for a plain DiT.

    Raises UserError if the sizes or the class names are impossible.
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
        if not class_names or not all(isinstance(name, str) for name in class_names):
            raise UserError("class_names must be a list with one string per class")
        self.image_size = image_size
        self.patch_size = patch_size
        self.class_names = list(class_names)
        self.dataset = dataset
        self.cfg_scale = cfg_scale
        self.folder = None  # the one that it was loaded from, for the model card
        self.num_classes = len(class_names)  # also the id of the null class: "no class given"

        # A plain DiT cuts the pixels themselves into patches, and its final layer draws each patch
        # from its token alone: outlines break at the seams, and fine detail is lost. With conv_dim,
        # a stem extracts features from the noisy picture, the transformer works on patches of
        # these, and a head draws the clean picture from what the transformer adds and, as in a
        # U-Net, from the features. If the patch size is even, stem and head convolve cells of 2 x 2
        # pixels, which is faster; a patch of 8 x 8 pixels is then 4 x 4 cells.
        self.stem = self.head = None
        self.cell_size, features_dim = 1, 3  # of a plain DiT: a cell is a pixel, its features RGB
        if conv_dim > 0:
            self.cell_size = 2 if patch_size % 2 == 0 else 1
            features_dim, cell_dim = conv_dim, 3 * self.cell_size**2
            self.stem = ConvNet(dim, [cell_dim, conv_dim, conv_dim])
            self.head = ConvNet(dim, [2 * conv_dim, conv_dim, conv_dim, cell_dim])
        self.cells_per_side = patch_size // self.cell_size  # of a patch
        patch_dim = features_dim * self.cells_per_side**2

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
        side = self.image_size // self.patch_size  # patches in a row

        # The condition is the same for all tokens: time plus class.
        c = self.timestep_embedding(timestep_features(t)) + self.class_embedding(y)
        c = F.silu(c)  # (B, dim)

        # A plain DiT's features are the pixels; the stem's are (B, conv_dim, S/2, S/2) for even P.
        features = self.stem(F.pixel_unshuffle(z, self.cell_size), c) if self.stem else z

        # Patchify: every P x P patch becomes a token, of N = patch_dim features at first.
        x = F.pixel_unshuffle(features, self.cells_per_side)  # (B, N, S/P, S/P)
        x = x.flatten(2).transpose(1, 2)  # (B, T, N)
        x = self.patch_embedding(x) + self.positions  # (B, T, dim)

        for block in self.blocks:
            x = block(x, c)

        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        x = self.final_layer(modulate(norm(x), shift, scale))  # (B, T, N)

        # Unpatchify, to the shape of the features.
        x = x.transpose(1, 2).unflatten(2, (side, side))  # (B, N, S/P, S/P)
        x = F.pixel_shuffle(x, self.cells_per_side)
        if self.head:
            x = self.head(torch.cat([x, features], dim=1), c)
            x = F.pixel_shuffle(x, self.cell_size)

        # x (B, 3, S, S) is now the predicted clean picture. On the line from x to eps, z_t - x =
        # t (eps - x) = t v. The division is by the true t, so that the last Euler step, of length
        # t, ends at the predicted x.
        return (z.float() - x.float()) / t.float()[:, None, None, None]

    @classmethod
    def _from_pretrained(cls, *, model_id, strict=True, config=None, **kwargs):
        """Like the mixin's, except that nothing is printed, and that missing weights and unknown
        entries of config.json are errors."""
        if "class_names" not in kwargs:
            reasons = "is the name right, and are you logged in (`hf auth login`) if it is private?"
            raise UserError(f"no config.json of a nanoDiT model at {model_id}: {reasons}")
        unknown = set(config or {}) - set(kwargs)
        if unknown:
            raise UserError(f"{model_id} was made by another model.py, whose DiT takes {unknown}")
        with contextlib.redirect_stdout(None):
            model = super()._from_pretrained(model_id=model_id, strict=strict, **kwargs)
        model.folder = hub.local_folder(model_id)
        return model.eval()  # older versions of the mixin leave it in training mode

    def _save_pretrained(self, save_directory):
        """Like the mixin's, plus what hub.complete adds; changes since loading are saved."""
        for name in {"class_names", "dataset", "cfg_scale"} & self._hub_mixin_config.keys():
            self._hub_mixin_config[name] = getattr(self, name)
        super()._save_pretrained(save_directory)
        hub.complete(save_directory, self.folder)

    def generate_model_card(self, **kwargs):
        """The README.md that save_pretrained and push_to_hub write beside the weights."""
        return hub.make_card(self, self.folder, kwargs)


def check_sizes(image_size, patch_size, dim, depth, heads, conv_dim):
    """Raise UserError for sizes that cannot make a network, before any memory is allocated.
    The sizes are named as the constants of train.py are."""
    sizes = {"IMAGE_SIZE": image_size, "PATCH_SIZE": patch_size, "DIM": dim}
    sizes |= {"DEPTH": depth, "HEADS": heads, "CONV_DIM": conv_dim}
    for name, size in sizes.items():
        lowest = 0 if name == "CONV_DIM" else 1
        if not isinstance(size, int) or size < lowest:
            raise UserError(f"{name} is {size!r}: it must be a whole number, at least {lowest}")
    if image_size % patch_size:
        raise UserError(f"IMAGE_SIZE {image_size} is not a multiple of PATCH_SIZE {patch_size}")
    if dim % heads:
        raise UserError(f"DIM {dim} is not a multiple of HEADS {heads}")
    # A config.json may come from anywhere: refuse what would take gigabytes for its weights alone.
    # A block has 18 dim^2 of them: attention 4, MLP 8, modulation 6. The convolutions have about
    # 36 conv_dim^2, and their modulations 6 dim conv_dim.
    tokens = (image_size // patch_size) ** 2
    weights = dim * (18 * depth * dim + 2 * max(3, conv_dim) * patch_size**2 + tokens)
    weights += conv_dim * (36 * conv_dim + 6 * dim)
    if depth > 1000 or tokens > 100_000 or weights > 1e9:
        raise UserError(
            f"a network of DEPTH {depth} with {tokens:,} tokens and {weights:,} weights is too "
            "large: lower IMAGE_SIZE, DIM or DEPTH, or raise PATCH_SIZE"
        )


class UserError(Exception):
    """An error that the user can fix: the scripts print it as one line and exit with status 2."""
