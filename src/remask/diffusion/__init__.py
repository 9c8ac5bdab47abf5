"""Masks, the sampler, and likelihoods."""

from .likelihood import Likelihood, bernoulli, chain, elbo, elbo_exact, pll
from .masks import MaskBank
from .sampler import PRESETS, Generation, SamplerConfig, generate, infill

__all__ = [
    "PRESETS",
    "Generation",
    "Likelihood",
    "MaskBank",
    "SamplerConfig",
    "bernoulli",
    "chain",
    "elbo",
    "elbo_exact",
    "generate",
    "infill",
    "pll",
]
