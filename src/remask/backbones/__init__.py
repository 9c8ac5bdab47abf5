"""What a masked diffusion language model is and how a checkpoint becomes one."""

from .family import Family
from .loading import load, save_pretrained
from .model import BackboneSpec, Encoded, MaskedDiffusionLM, Site, capture
from .registry import families, register

__all__ = [
    "BackboneSpec",
    "Encoded",
    "Family",
    "MaskedDiffusionLM",
    "Site",
    "capture",
    "families",
    "load",
    "register",
    "save_pretrained",
]
