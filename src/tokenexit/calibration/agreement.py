"""Say where agreement with the dense model falls off."""

from __future__ import annotations

FALL_OFF = 0.05
"""Share of pixels unlike dense from which on exits are no longer free: beyond it mIoU falls fast, most of all after a
short training."""


def fall_off_note(unlike: float, images: int) -> str:
    """Say so, behind a space, if more than `FALL_OFF` of the pixels of so many images are unlike dense; else ""."""
    if not unlike > FALL_OFF:
        return ""
    return (
        f" Agreement with dense has fallen off: {unlike:.1%} of the pixels of these {images} images are unlike the "
        f"dense model's, more than {FALL_OFF:.0%}; ask for more compute, or train longer with exits on."
    )
