"""Every method of unlearning by training, by name."""

from __future__ import annotations

from .ascent import AscentOptions, CappedOptions, SatImpOptions, WgaOptions, capped, ga, satimp, wga
from .base import Method, Options
from .distillation import TaskVectorOptions, UndialOptions, WhpOptions, idk, task_vector, undial, whp
from .mdu import MduOptions, MeOptions, mdu, me
from .preference import DpoOptions, NpoOptions, SimNpoOptions, dpo, npo, simnpo
from .representation import AdaptiveRmuOptions, RmuOptions, measure, rmu

_METHODS = (
    Method(
        "mdu",
        mdu,
        MduOptions,
        "pull predictions to those without the prompt",
        "arXiv 2605.18253",
        needs=frozenset({"anchor"}),
    ),
    Method("me", me, MeOptions, "maximum entropy; MDU at tau = 0", "arXiv 2410.08109"),
    Method("ga", ga, AscentOptions, "gradient ascent on the mask loss", "arXiv 2401.06121 (TOFU)", retain="none"),
    Method("graddiff", ga, AscentOptions, "ascent with the mask loss on retain rows", "arXiv 2401.06121", needs_retain=True),
    Method("kl", ga, AscentOptions, "ascent with KL on retain rows", "arXiv 2401.06121", retain="kl", needs_retain=True),
    Method("capped", capped, CappedOptions, "ascent that leaves unlikely tokens alone", "open-dlu; MDU's release"),
    Method(
        "npo",
        npo,
        NpoOptions,
        "negative preference optimisation",
        "arXiv 2404.05868",
        needs=frozenset({"reference"}),
        draws=4,
    ),
    Method("simnpo", simnpo, SimNpoOptions, "NPO without a reference, per token", "arXiv 2410.07163", draws=4),
    Method(
        "dpo",
        dpo,
        DpoOptions,
        "prefer a refusal to the answer",
        "arXiv 2305.18290",
        needs=frozenset({"reference", "preferred"}),
        draws=4,
    ),
    Method("idk", idk, Options, "learn a refusal", "arXiv 2401.06121", needs=frozenset({"preferred"})),
    Method("wga", wga, WgaOptions, "ascent weighted by confidence", "arXiv 2502.19301"),
    Method("satimp", satimp, SatImpOptions, "ascent weighted by saturation and importance", "arXiv 2505.11953"),
    Method(
        "undial",
        undial,
        UndialOptions,
        "distil predictions without the answer's logit",
        "arXiv 2402.10052",
        needs=frozenset({"reference"}),
    ),
    Method(
        "rmu",
        rmu,
        RmuOptions,
        "push hidden states to a random direction",
        "arXiv 2403.03218",
        needs=frozenset({"hidden"}),
        retain="hidden",
        needs_retain=True,
    ),
    Method(
        "adaptive-rmu",
        rmu,
        AdaptiveRmuOptions,
        "RMU with a length that fits the layer",
        "arXiv 2408.06223",
        needs=frozenset({"hidden"}),
        retain="hidden",
        needs_retain=True,
        calibrate=measure,
    ),
    Method(
        "task-vector",
        task_vector,
        TaskVectorOptions,
        "learn the forget rows, subtract the change",
        "arXiv 2212.04089",
        retain="none",
    ),
    Method(
        "whp",
        whp,
        WhpOptions,
        "distil predictions lowered where reinforcing raised them",
        "arXiv 2310.02238",
        needs=frozenset({"reference", "reinforced"}),
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
