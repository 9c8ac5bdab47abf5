"""What a masked diffusion language model is and how a checkpoint becomes one."""

from .loading import load, save_pretrained
from .model import BackboneSpec, Encoded, MaskedDiffusionLM, Site, capture

__all__ = ["BackboneSpec", "Encoded", "MaskedDiffusionLM", "Site", "capture", "load", "save_pretrained"]
