"""Masks, the sampler, and likelihoods."""

from .likelihood import Likelihood, elbo, elbo_exact
from .masks import MaskBank
from .sampler import Generation, SamplerConfig, generate

__all__ = ["Generation", "Likelihood", "MaskBank", "SamplerConfig", "elbo", "elbo_exact", "generate"]
