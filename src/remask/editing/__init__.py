"""Edits at inference time: the edit memory, steering, calibration."""

from .calibrate import anchor_level, calibrate
from .memory import PRESETS, EditMemory, MemoryConfig, preset
from .steering import SteeringVector, mean_delta

__all__ = ["PRESETS", "EditMemory", "MemoryConfig", "SteeringVector", "anchor_level", "calibrate", "mean_delta", "preset"]
