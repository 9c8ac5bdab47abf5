"""Bundled checkpoints, teaching recipes and the closed-world corpus generator."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
RECIPES = Path(__file__).parent / "recipes"


def bundled_models() -> list[str]:
    """Names that `remask.load` accepts without a path, sorted."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))
