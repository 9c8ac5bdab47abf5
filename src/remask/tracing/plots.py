"""The picture of a trace: layer x step heat maps, one panel a module."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..backbones.model import Site
from ..facts import write_atomically
from .reference import Trace, aggregate

matplotlib.use("Agg", force=False)
TITLES = {"resid": "residual stream", "attn": "attention output", "mlp": "MLP output"}


def heatmap(trace: Trace, site: Site | None = None, gamma: float = 0.9) -> Figure:
    """Signed mean effect over facts, [layer x step] for each module, one colour scale symmetric about zero, in nats."""
    effect = np.asarray(aggregate(trace.effects, gamma).nanmean(dim=0))
    limit = max(float(np.nanmax(np.abs(effect))), 1e-6)
    modules = trace.config.modules
    figure = Figure(figsize=(3.1 * len(modules) + 1.0, 3.6), layout="constrained")
    axes = figure.subplots(1, len(modules), sharey=True, squeeze=False)[0]
    for i, (axis, module) in enumerate(zip(axes, modules, strict=True)):
        image = axis.imshow(effect[:, i], origin="lower", aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(TITLES[module], fontsize=11)
        axis.set_xlabel("denoising step (0 = all masked)")
        axis.set_xticks(range(effect.shape[2]))
        axis.set_yticks(range(effect.shape[0]))
        if site is not None and site.module == module:
            axis.axhline(site.layer, color="black", linewidth=1.2, linestyle="--")
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
            axis.text(-0.42, site.layer + 0.12, "chosen", ha="left", va="bottom", fontsize=9, bbox=box)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="indirect effect (nats)")
    figure.suptitle(
        f"Restoring the subject, mean of {len(trace.fact_ids)} facts x {trace.config.draws} noise draws", fontsize=11
    )
    return figure


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_heatmap(trace: Trace, path: str | Path, site: Site | None = None) -> None:
    """Write the heat map as PNG, atomically."""
    write_atomically(path, png(heatmap(trace, site)))
