"""Edits at inference time: the edit memory, steering, calibration, edits in running models."""

from .calibrate import anchor_level, calibrate
from .codebook import Codebook
from .config import PRESETS, MemoryConfig, preset
from .live import LiveEdit, attach
from .memory import EditMemory
from .steering import SteeringVector, caa, mean_delta, random_layer, repe
from .streaming import StreamingSolver

__all__ = [
    "PRESETS",
    "Codebook",
    "EditMemory",
    "LiveEdit",
    "MemoryConfig",
    "SteeringVector",
    "StreamingSolver",
    "anchor_level",
    "attach",
    "caa",
    "calibrate",
    "mean_delta",
    "preset",
    "random_layer",
    "repe",
]
