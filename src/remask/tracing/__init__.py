"""Where and when along denoising a fact is carried."""

from .effects import PRESETS, Trace, Weights, aggregate, join, largest_difference, preset
from .positions import PositionTrace, trace_positions
from .protocol import TraceConfig
from .sites import Choice, SiteRule, choose_site, cluster_sites, fact_sites, site_scores, stability
from .tie import trace

__all__ = [
    "PRESETS",
    "Choice",
    "PositionTrace",
    "SiteRule",
    "Trace",
    "TraceConfig",
    "Weights",
    "aggregate",
    "choose_site",
    "cluster_sites",
    "fact_sites",
    "join",
    "largest_difference",
    "preset",
    "site_scores",
    "stability",
    "trace",
    "trace_positions",
]
