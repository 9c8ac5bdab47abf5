"""Where unlearning by an anchor gets its signal, and what it did: three diagnostics as plain data.

The *anchor* is a frozen model's prediction for the same response state with every prompt token masked: what the model would say
without knowing the question. MDU (arXiv 2605.18253) trains the policy towards it; these diagnostics measure the distance of any
model, however it was edited.

- `trajectory`: KL from the anchor at every step and position while one answer is denoised.
- `convergence`: KL from the anchor on a fixed bank, by row and by noise level. The same pass gives the signal map E[KL | t]
  and, before training, the leakage: how much of the answer the anchor itself still says.

Two more belong to generations and to the comparison with a never-trained model and are part of every audit: the junk rate
(`remask.evaluation.metrics.text.junk_rate`), and the distance to the reference (`forget_quality`, a Kolmogorov-Smirnov test,
`distance` and `prediction_divergence` of `remask.evaluation.metrics.reference`).
"""

from .anchors import Anchor
from .convergence import ByNoise, Convergence, Spread, convergence
from .trajectory import Trajectory, trajectory

__all__ = ["Anchor", "ByNoise", "Convergence", "Spread", "Trajectory", "convergence", "trajectory"]
