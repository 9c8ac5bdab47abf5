"""remask: knowledge editing and machine unlearning in masked diffusion language models."""

from .backbones import BackboneSpec, Encoded, Family, MaskedDiffusionLM, Site, load, save_pretrained
from .backbones.intervention import Handle, Intervention, NoEdit
from .backbones.weight_edit import WeightEdit
from .diffusion import (
    Generation,
    Likelihood,
    MaskBank,
    SamplerConfig,
    bernoulli,
    chain,
    elbo,
    elbo_exact,
    generate,
    infill,
    pll,
)
from .editing import PRESETS, EditMemory, MemoryConfig, SteeringVector, calibrate, mean_delta
from .errors import RemaskError
from .experiments.edits import attach, load_edit
from .facts import Fact, load_facts, save_facts
from .figures import save_figure
from .tracing import Trace, TraceConfig, choose_site, trace, trace_positions
from .unlearning.training.config import UnlearnConfig
from .unlearning.unlearn import unlearn

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BackboneSpec",
    "EditMemory",
    "Encoded",
    "Fact",
    "Family",
    "Generation",
    "Handle",
    "Intervention",
    "Likelihood",
    "MaskBank",
    "MaskedDiffusionLM",
    "MemoryConfig",
    "NoEdit",
    "RemaskError",
    "SamplerConfig",
    "Site",
    "SteeringVector",
    "Trace",
    "TraceConfig",
    "UnlearnConfig",
    "WeightEdit",
    "attach",
    "bernoulli",
    "calibrate",
    "chain",
    "choose_site",
    "elbo",
    "elbo_exact",
    "generate",
    "infill",
    "load",
    "load_edit",
    "load_facts",
    "mean_delta",
    "pll",
    "save_facts",
    "save_figure",
    "save_pretrained",
    "trace",
    "trace_positions",
    "unlearn",
]
