"""The trainer of every method of unlearning by training."""

from .config import UnlearnConfig

__all__ = ["UnlearnConfig"]
