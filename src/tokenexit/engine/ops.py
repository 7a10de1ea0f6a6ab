"""Multiply-adds are counted from numbers of tokens.

Every layer states its work as an `Ops` value computed from token counts; the ledger adds them up. A MAC is one
multiply-add of a matrix product, a convolution or an attention product. Bias, softmax, activation, normalisation,
indexing and interpolation are not MACs. What the literature prints as "GFLOPs" is GMACs.

The `dtop` convention reproduces the published DToP baselines: one head, no class token, LayerNorm at 5 and bilinear
upsampling at 4 per output element, as fvcore's FLOP counter has them.
"""

from __future__ import annotations

from dataclasses import dataclass

GIGA = 1_000_000_000


@dataclass(frozen=True)
class Ops:
    """The work of a layer on one image.

    macs: multiply-adds executed.
    norm_elements: elements passed through a LayerNorm (only the `dtop` convention charges them).
    repeated: the part of `macs` that our kernels compute twice where the papers' code computes it once.
    """

    macs: int = 0
    norm_elements: int = 0
    repeated: int = 0

    def __add__(self, other: Ops) -> Ops:
        return Ops(
            self.macs + other.macs,
            self.norm_elements + other.norm_elements,
            self.repeated + other.repeated,
        )

    def __mul__(self, times: int) -> Ops:
        return Ops(self.macs * times, self.norm_elements * times, self.repeated * times)

    __rmul__ = __mul__

    def in_dtop_convention(self, upsampled_elements: int = 0) -> int:
        """Count as the DToP paper does: LayerNorm 5 per element, bilinear upsampling 4 per output element."""
        return self.macs - self.repeated + 5 * self.norm_elements + 4 * upsampled_elements


def linear(tokens: int, inputs: int, outputs: int) -> Ops:
    """Count a linear layer or 1x1 convolution on `tokens` positions."""
    return Ops(macs=tokens * inputs * outputs)


def attention(queries: int, keys: int, width: int) -> Ops:
    """Count the two attention products q k^T and a v over all heads, `width` channels in total."""
    return Ops(macs=2 * queries * keys * width)


def layer_norm(tokens: int, channels: int) -> Ops:
    """Count a LayerNorm on `tokens` positions."""
    return Ops(norm_elements=tokens * channels)


def conv2d(height: int, width: int, inputs: int, outputs: int, kernel: int) -> Ops:
    """Count a dense convolution with `height x width` outputs."""
    return Ops(macs=height * width * inputs * outputs * kernel * kernel)
