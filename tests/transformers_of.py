"""Small transformers that tests make: a ViT whose maps are its tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Self-attention and two layers, behind normalisation each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).view(samples, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(samples, tokens, width))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Patches of 4×4, `prefix` tokens before them, blocks, and the class by the first token or by the mean."""

    def __init__(self, prefix: int = 1, pool: str = "class", side: int = 40, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, prefix + (side // 4) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(depth))
        self.head = nn.Linear(width, 4)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x[:, 0] if self.pool == "class" else x.mean(1))
        return out
