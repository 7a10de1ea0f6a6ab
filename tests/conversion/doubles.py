"""Small stand-ins for modules of timm and transformers, with their names, attributes and computations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, DEPTH, PATCH, SIDE = 32, 4, 3, 4, 5
"""Four heads, where the width would suggest one."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# --------------------------------------------------------------------------------------------------------------- timm


class TimmAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=2)))


class TimmMlp(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, 48), act, nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(DIM) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self, eps: float, scaled: bool, act: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(DIM, eps), TimmAttention()
        self.ls1: nn.Module = Scale() if scaled else nn.Identity()
        self.ls2: nn.Module = Scale() if scaled else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(DIM, eps), TimmMlp(act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TimmPatchEmbed(nn.Module):
    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid_size = grid
        self.proj = nn.Conv2d(3, DIM, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class VisionTransformer(nn.Module):
    """timm's: class token, registers, position rows for them or not, any size or one."""

    def __init__(
        self,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        scaled: bool = False,
        class_token: bool = True,
        final_norm: bool = True,
        dynamic_img_size: bool = True,
        eps: float = 1e-5,
        grid: tuple[int, int] = (SIDE, SIDE),
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dynamic_img_size, self.no_embed_class = dynamic_img_size, no_embed_class
        self.patch_embed = TimmPatchEmbed(grid)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM)) if class_token else None
        self.reg_token = nn.Parameter(torch.randn(1, reg_tokens, DIM)) if reg_tokens else None
        self.rows = 0 if no_embed_class else int(class_token) + reg_tokens
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1] + self.rows, DIM))
        self.blocks = nn.Sequential(*(TimmBlock(eps, scaled, act or nn.GELU()) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(DIM, eps) if final_norm else nn.Identity()
        self.fc_norm = nn.Identity() if final_norm else nn.LayerNorm(DIM, eps)
        self.head = nn.Linear(DIM, 7)
        self.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}

    def forward_features(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        grid = x.shape[2:]
        assert self.dynamic_img_size or tuple(grid) == self.patch_embed.grid_size
        front, table = self.pos_embed[:, : self.rows], self.pos_embed[:, self.rows :]
        maps = table.unflatten(1, self.patch_embed.grid_size).permute(0, 3, 1, 2)
        if tuple(grid) != self.patch_embed.grid_size:
            maps = F.interpolate(maps, tuple(grid), mode="bicubic", antialias=True)
        x = x.flatten(2).mT + maps.flatten(2).mT
        prefix = [p.expand(len(x), -1, -1) for p in (self.cls_token, self.reg_token) if p is not None]
        if prefix:
            x = torch.cat([torch.cat(prefix, 1) + (front if self.rows else 0), x], 1)
        return self.norm(self.blocks(x))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images)[:, 0])


# ------------------------------------------------------------------------------------------------------ DINOv2's own


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(DIM, 64), nn.Linear(32, DIM)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DinoVisionTransformer(nn.Module):
    """That of DINOv2's release: a class row in every table, an offset or antialiasing, blocks in chunks or not."""

    def __init__(
        self,
        num_register_tokens: int = 0,
        offset: float = 0.1,
        antialias: bool = False,
        chunks: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.interpolate_offset, self.interpolate_antialias = offset, antialias
        self.patch_embed = TimmPatchEmbed((SIDE, SIDE))
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, DIM)), nn.Parameter(torch.zeros(1, DIM))
        count = num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, count, DIM)) if count else None
        self.pos_embed = nn.Parameter(torch.zeros(1, SIDE**2 + 1, DIM))
        blocks = [TimmBlock(1e-6, True, nn.GELU()) for _ in range(DEPTH)]
        for block in blocks if gated else []:
            block.mlp = SwiGLU()  # type: ignore[assignment]
        holders = [nn.ModuleList(blocks[:2]), nn.ModuleList([nn.Identity(), nn.Identity(), *blocks[2:]])]
        self.blocks = nn.ModuleList(holders if chunks else blocks)
        self.norm = nn.LayerNorm(DIM, 1e-6)

    def table(self, grid: tuple[int, int]) -> Tensor:
        if grid == (SIDE, SIDE):
            return self.pos_embed
        maps = self.pos_embed[:, 1:].unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
        how: dict[str, Any] = {"size": grid}
        if self.interpolate_offset:
            how = {"scale_factor": tuple((n + self.interpolate_offset) / SIDE for n in grid)}
        maps = F.interpolate(maps, mode="bicubic", antialias=self.interpolate_antialias, **how)
        return torch.cat([self.pos_embed[:, :1], maps.flatten(2).mT], 1)

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(images)
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + self.table(grid)
        count = 0
        if self.register_tokens is not None:
            count = self.register_tokens.shape[1]
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for chunk in self.blocks:
            for block in chunk if isinstance(chunk, nn.ModuleList) else [chunk]:
                x = block(x)
        y = self.norm(x)
        parts = {"x_norm_clstoken": y[:, 0], "x_norm_regtokens": y[:, 1 : count + 1]}
        return parts | {"x_norm_patchtokens": y[:, count + 1 :], "x_prenorm": x}


# ------------------------------------------------------------------------------------------------------- transformers


class HFAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class HFMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class HFLayer(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.attention, self.mlp = HFAttention(), HFMlp()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(DIM, eps), nn.LayerNorm(DIM, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.mlp(self.layernorm_after(x))


class HFPatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, DIM, PATCH, PATCH)


class HFEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.position_embeddings = nn.Parameter(torch.randn(1, SIDE**2 + 1, DIM))
        self.patch_embeddings = HFPatches()

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> Tensor:
        table = self.position_embeddings[:, 1:].unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
        if grid != (SIDE, SIDE):
            table = F.interpolate(table, grid, mode="bicubic")
        return torch.cat([self.position_embeddings[:, :1], table.flatten(2).mT], 1)

    def forward(self, images: Tensor, resized: bool) -> Tensor:
        x = self.patch_embeddings.projection(images)
        grid = (x.shape[2], x.shape[3])
        assert resized or grid == (SIDE, SIDE)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1)
        return x + self.interpolate_pos_encoding(grid)


class ViTModel(nn.Module):
    """That of transformers: separate queries, keys and values, settings in `config`."""

    base_model_prefix = "vit"

    def __init__(self, eps: float = 1e-3, **changes: Any) -> None:
        super().__init__()
        known = {"num_attention_heads": HEADS, "layer_norm_eps": eps, "hidden_act": "gelu"}
        known |= {"image_size": SIDE * PATCH, "patch_size": PATCH}
        self.config = SimpleNamespace(**(known | changes))
        self.embeddings = HFEmbeddings()
        self.layers = nn.ModuleList(HFLayer(eps) for _ in range(DEPTH))
        self.layernorm = nn.LayerNorm(DIM, eps)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Any:
        x = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=self.layernorm(x))


class ViTForImageClassification(nn.Module):
    """A classifier around it."""

    base_model_prefix = "vit"

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.classifier = ViTModel(), nn.Linear(DIM, 7)
        self.config = self.vit.config


def lively(model: Any) -> Any:
    """Weights of ordinary size, in training mode, as users hold their modules."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            fan_in = value[0].numel() if value.ndim in (2, 4) else 1
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else noise * fan_in**-0.5)
    return model
