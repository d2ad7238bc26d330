"""The network of nanoDiT: a class-conditional diffusion transformer (DiT) on pixels, without a VAE.

- Blocks and adaLN-zero as in DiT (Peebles & Xie 2022, arXiv 2212.09748), without dropout.
- Large patches; the network predicts the clean picture x (Li & He 2025, arXiv 2511.13720).
- Learned positions; queries and keys are normed (Henry et al. 2020, arXiv 2010.04245).
- B pictures of S x S pixels; patches of P x P; T = (S/P)^2 tokens; H heads of D numbers each.
"""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin

MIN_T = 0.05  # smaller t count as this: training draws few, and (z_t - x) / t blows errors of x up


class UserError(ValueError):
    """What the user can mend: the command lines print it as one line and exit with status 2."""


def norm(x):
    """Layer norm over the last dimension, without parameters: what follows does the scaling."""
    return F.layer_norm(x, x.shape[-1:])


def modulate(x, shift, scale):
    """adaLN: shift and scale (B, dim) every token of x (B, T, dim) alike."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))  # of normed queries, which stay bounded
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, dim = x.shape
        qkv = self.qkv(x).view(B, T, 3, len(self.scale), -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        x = F.scaled_dot_product_attention(self.scale * norm(q), norm(k), v)  # (B, H, T, D)
        return self.out(x.transpose(1, 2).reshape(B, T, dim))


class Block(nn.Module):
    """One transformer block; the condition c (B, dim) steers it through adaLN-zero."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attention(modulate(norm(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(norm(x), shift2, scale2))


def waves(t):
    """t (B,), from MIN_T to 1 -> (B, 256): cos and sin of 1000 t at 128 frequencies, 1 to 1e-4."""
    frequencies = 1e-4 ** (torch.arange(128, device=t.device) / 128)
    angles = 1000 * t.float().clamp_min(MIN_T)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiT(nn.Module, PyTorchModelHubMixin):
    """A diffusion transformer that returns the velocity v = eps - x of a rectified flow.
    Arguments are config.json. image_size: pixels a side, a multiple of patch_size; dim: width, a
    multiple of heads, or UserError; class_names: in the order of ids; dataset: its name."""

    def __init__(self, image_size, patch_size, dim, depth, heads, class_names, dataset=""):
        super().__init__()
        self.class_names, self.dataset = [str(name) for name in class_names], dataset
        self.num_classes = len(self.class_names)  # also the id of the null class, "no class given"
        sizes = (image_size, patch_size, dim, depth, heads)
        tokens, weights = (image_size // max(1, patch_size)) ** 2, 18 * depth * dim**2
        if min(sizes) < 1 or depth > 1e3 or tokens > 1e5 or weights > 1e9:  # before they are there
            raise UserError(f"IMAGE_SIZE, PATCH_SIZE, DIM, DEPTH, HEADS cannot be {sizes}")
        if image_size % patch_size:
            raise UserError(f"IMAGE_SIZE {image_size} is not a multiple of PATCH_SIZE {patch_size}")
        if dim % heads:
            raise UserError(f"DIM {dim} is not a multiple of HEADS {heads}")
        self.image_size, self.patch_size = image_size, patch_size
        self.patch_embedding = nn.Linear(3 * patch_size**2, dim)
        self.positions = nn.Parameter(torch.randn(tokens, dim))
        self.timestep_embedding = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_embedding = nn.Embedding(self.num_classes + 1, dim)  # scale 1: 0.02 is too slow
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.final_layer = nn.Linear(dim, 3 * patch_size**2)
        self.initialize()

    def initialize(self):
        """adaLN-zero: blocks start as the identity, the output at 0; all else as PyTorch has it."""
        modulations = [block.modulation for block in self.blocks]
        for layer in (*modulations, self.final_modulation, self.final_layer):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, t, y):
        """Velocity (B,3,S,S) float32 at z_t = (1-t) x + t eps. z: (B,3,S,S) float; t: (B,) from 0,
        data, to 1, noise; y: (B,) int64 class ids, where num_classes is the null class."""
        P, side = self.patch_size, self.image_size // self.patch_size
        c = F.silu(self.timestep_embedding(waves(t)) + self.class_embedding(y))  # (B, dim)
        x = F.pixel_unshuffle(z, P).flatten(2).transpose(1, 2)  # (B, T, 3*P*P)
        x = self.patch_embedding(x) + self.positions  # (B, T, dim)
        for block in self.blocks:
            x = block(x, c)
        x = modulate(norm(x), *self.final_modulation(c).chunk(2, dim=-1))
        x = self.final_layer(x).float()  # (B, T, 3*P*P)
        x = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), P)  # (B, 3, S, S)
        return (z.float() - x) / t.float().clamp_min(MIN_T)[:, None, None, None]

    @classmethod
    def _from_pretrained(cls, *, model_id, strict=True, **kwargs):
        """As the mixin's, but missing weights are refused, and standard output stays clean."""
        if "class_names" not in kwargs:
            raise UserError(f"no config.json of a nanoDiT model in {model_id}")
        with contextlib.redirect_stdout(None):
            return super()._from_pretrained(model_id=model_id, strict=strict, **kwargs)

    def generate_model_card(self, **kwargs):
        """The README.md that save_pretrained and push_to_hub write."""
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        return ModelCard(MODEL_CARD.format(m=self, millions=millions))


MODEL_CARD = """---
{{library_name: nanodit, license: mit, tags: [rectified-flow, dit]}}
---
A class-conditional diffusion transformer on pixels, {millions:.2f} M parameters, trained by nanoDiT
on {m.dataset}: {m.num_classes} classes, {m.image_size}x{m.image_size} pixels. To sample from it:
`python sample.py --checkpoint <this repository's id> --class-id 0`
"""
