"""Objectives of unlearning by training: one small pure function a method, one registry."""

from .base import Loss, Method, Need, Options, Quantities
from .registry import METHODS
from .retain import RETAIN, Retain

__all__ = ["METHODS", "RETAIN", "Loss", "Method", "Need", "Options", "Quantities", "Retain"]
