"""From a trace to the site that an edit should use (TimeROME-DLM, equation 5)."""

from __future__ import annotations

import numpy as np

from ..backbones.model import Module, Site
from ..errors import RemaskError
from .reference import Trace, mean_absolute


def choose_site(trace: Trace, module: Module | None = None, gamma: float = 0.9) -> Site:
    """The (layer, module) with the largest mean absolute effect over facts, at its strongest step.

    The returned site acts at every step, as the paper's edit does: the trace chooses where, not when.

    Args:
        module: restrict the choice to one module.
        gamma: decay of equation (4).

    Raises:
        RemaskError: the module was not traced.
    """
    if module is not None and module not in trace.config.modules:
        raise RemaskError(f"module {module!r} was not traced; traced: {', '.join(trace.config.modules)}")
    effect = np.nan_to_num(mean_absolute(trace, gamma), nan=-np.inf)
    if module is not None:
        drop = [i for i, name in enumerate(trace.config.modules) if name != module]
        effect[:, drop] = -np.inf
    layer, index, _ = np.unravel_index(int(effect.argmax()), effect.shape)
    return Site(int(layer), trace.config.modules[int(index)])
