"""The network of nanoDiT: a class-conditional diffusion transformer (DiT) on pixels, without a VAE.

- Transformer blocks with adaLN-zero, as in DiT (Peebles & Xie 2022, arXiv 2212.09748).
- Large patches of pixels, from which the network predicts the clean picture x (Li & He 2025,
  arXiv 2511.13720). forward() turns that prediction into the velocity.
- Learned position embeddings.
- Queries and keys are normalised before attention, as in Henry et al. (2020, arXiv 2010.04245), but
  by layer norm.
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
    """adaLN: shift and scale all tokens of a picture, x (B, T, dim), by vectors (B, dim)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention over all tokens (B, T, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        # Products of normalised queries and keys are bounded, so that attention could never be
        # sharp: each head learns a factor.
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
            # Written out, as bf16 training is up to 1.5 times as fast. The factor belongs to q:
            # torch.compile would take softmax(q k^T * factor) v for the slower call below.
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

    Raises UserError if the sizes are impossible.
    """

    def __init__(
        self, image_size, patch_size, dim, depth, heads, class_names, dataset="", cfg_scale=3.0
    ):
        super().__init__()
        check_sizes(image_size, patch_size, dim, depth, heads)
        if not class_names or not all(isinstance(name, str) for name in class_names):
            raise UserError("class_names must be a list with one string per class")
        self.image_size = image_size
        self.patch_size = patch_size
        self.class_names = list(class_names)
        self.dataset = dataset
        self.cfg_scale = cfg_scale
        self.folder = None  # the one that it was loaded from
        self.num_classes = len(class_names)  # also the id of the null class: "no class given"

        self.patch_embedding = nn.Linear(3 * patch_size**2, dim)
        self.positions = nn.Parameter(torch.randn((image_size // patch_size) ** 2, dim))
        self.timestep_embedding = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        # Starts at a standard deviation of 1. At DiT's 0.02, samples ignore their class until late.
        self.class_embedding = nn.Embedding(self.num_classes + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.final_layer = nn.Linear(dim, 3 * patch_size**2)
        self.initialize()

    def initialize(self):
        """adaLN-zero: each block starts as the identity, and the prediction of x starts at 0.
        Everything else keeps PyTorch's own initialisation."""
        zero_layers = [block.modulation for block in self.blocks]
        zero_layers += [self.final_modulation, self.final_layer]
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, t, y):
        """The velocity at z_t = (1-t) x + t eps.

        z: (B,3,S,S) float, noisy pictures; t: (B,) in (0, 1], near 0 data, and at 1 noise;
        y: (B,) int64 class ids, where num_classes is the null class. Returns (B,3,S,S) float32.
        """
        P = self.patch_size
        side = self.image_size // P  # patches in a row

        # The condition is the same for all tokens: time plus class.
        c = self.timestep_embedding(timestep_features(t)) + self.class_embedding(y)
        c = F.silu(c)  # (B, dim)

        # Patchify: every P x P patch becomes a token.
        x = F.pixel_unshuffle(z, P)  # (B, 3*P*P, S/P, S/P)
        x = x.flatten(2).transpose(1, 2)  # (B, T, 3*P*P)
        x = self.patch_embedding(x) + self.positions  # (B, T, dim)

        for block in self.blocks:
            x = block(x, c)

        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        x = self.final_layer(modulate(norm(x), shift, scale)).float()  # (B, T, 3*P*P)

        # Unpatchify: x is now the predicted clean picture.
        x = x.transpose(1, 2).unflatten(2, (side, side))  # (B, 3*P*P, S/P, S/P)
        x = F.pixel_shuffle(x, P)  # (B, 3, S, S)

        # On the line from x to eps, z_t - x = t (eps - x) = t v. The division is by the true t, so
        # that the last Euler step, of length t, ends at the predicted x.
        return (z.float() - x) / t.float()[:, None, None, None]

    @classmethod
    def _from_pretrained(cls, *, model_id, strict=True, **kwargs):
        """Like the mixin's, except that missing weights are an error and nothing is printed."""
        if "class_names" not in kwargs:
            raise UserError(f"{model_id} has no config.json of a nanoDiT model")
        with contextlib.redirect_stdout(None):
            model = super()._from_pretrained(model_id=model_id, strict=strict, **kwargs)
        model.folder = model_id
        return model.eval()  # older versions of the mixin leave it in training mode

    def _save_pretrained(self, save_directory):
        """Like the mixin's, and a grid of samples if this is the model of a run."""
        super()._save_pretrained(save_directory)
        hub.copy_grid(self.folder, save_directory)

    def generate_model_card(self, **kwargs):
        """The README.md that save_pretrained and push_to_hub write beside the weights."""
        return hub.make_card(self, self.folder)


def check_sizes(image_size, patch_size, dim, depth, heads):
    """Raise UserError for sizes that cannot make a network, before any memory is allocated.
    The sizes are named as the constants of train.py are."""
    sizes = {"IMAGE_SIZE": image_size, "PATCH_SIZE": patch_size, "DIM": dim}
    sizes |= {"DEPTH": depth, "HEADS": heads}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{name} is {size!r}: it must be a whole number, at least 1")
    if image_size % patch_size:
        raise UserError(f"IMAGE_SIZE {image_size} is not a multiple of PATCH_SIZE {patch_size}")
    if dim % heads:
        raise UserError(f"DIM {dim} is not a multiple of HEADS {heads}")
    # A config.json may come from anywhere: refuse what would take gigabytes for its weights alone.
    # A block has 18 dim^2 of them: attention 4, MLP 8, modulation 6.
    tokens = (image_size // patch_size) ** 2
    weights = 18 * depth * dim**2 + 6 * patch_size**2 * dim
    if depth > 1000 or tokens > 100_000 or weights > 1e9:
        raise UserError(
            f"a network of DEPTH {depth} with {tokens:,} tokens and {weights:,} weights is too "
            "large: lower IMAGE_SIZE, DIM or DEPTH, or raise PATCH_SIZE"
        )


# What sampling and training share.


class UserError(Exception):
    """Something the user can fix: a command line prints it as one line and exits with status 2."""


def pick_device(name):
    """The torch device with the given name; "auto" is cuda, else mps, else cpu. Raises UserError if
    this machine does not have it."""
    counts = {"cuda": torch.cuda.device_count(), "mps": torch.mps.device_count(), "cpu": 1}
    if name == "auto":
        if counts["cuda"] > 0:
            name = "cuda"
        elif counts["mps"] > 0:
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'DEVICE "{name}" is unknown: choose auto, cuda, mps or cpu') from error
    if (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(f'DEVICE "{name}" is not available here: choose another, or auto')
    return device


def computes_in_bf16(device):
    """Whether the device has instructions for bfloat16, which is slow where it is imitated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        features = torch.cpu.get_capabilities()
        return features.get("avx512_bf16", False) or features.get("amx_bf16", False)
    older_torch = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return older_torch()


def uses_bf16(device, precision):
    """Whether "bf16", "fp32" or "auto" means bfloat16 on this device."""
    return precision == "bf16" or (precision == "auto" and computes_in_bf16(device))


def autocast(device, precision="auto"):
    """A context in which matrix products and attention run in bfloat16, if that is the precision,
    while the weights stay float32. "auto" is bf16 where the device computes in it, else fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))
