"""Meta's checkpoints and mask collator; documented here, at home in checkpoints/ and swapping/."""

from vjepa_fast.checkpoints.meta_format import load_checkpoint, save_checkpoint
from vjepa_fast.swapping.mask_collator import MaskCollator

__all__ = ["MaskCollator", "load_checkpoint", "save_checkpoint"]
