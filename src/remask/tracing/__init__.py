"""Where and when along denoising a fact is carried."""

from .plots import heatmap, save_heatmap
from .reference import Trace, TraceConfig, aggregate, trace
from .sites import choose_site

__all__ = ["Trace", "TraceConfig", "aggregate", "choose_site", "heatmap", "save_heatmap", "trace"]
