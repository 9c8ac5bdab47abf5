"""MMaDA-8B, text side: LLaDA's layout with 8192 image codes behind the text vocabulary.

The original's own code turns causal as soon as a padding mask is given; here padding is masked and attention stays full.
"""

from __future__ import annotations

from dataclasses import replace

from . import llada

FAMILY = replace(
    llada.FAMILY,
    name="mmada",
    title="MMaDA-8B Base and MixCoT, text side",
    architectures=("MMadaModelLM",),
    matches=lambda config: True,
    chat_template=llada.CHAT.replace("<|end_header_id|>\n\n", "<|end_header_id|>\n"),
    sampler="mmada",
    note="image codes follow the text ids in the vocabulary",
)
