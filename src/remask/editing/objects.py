"""Rewriting: keys and deltas that make a model answer with a new object of any number of tokens, in closed form.

A key is read where the new object is to be predicted: at its masked positions, in partial states of the canvas that generation
will pass through (the prompt, the new object partly masked, then either nothing or the free slots that generation begins with)
and at the end token behind it. What a key's token is, is known; the delta is the shift after which the model says it:

- `head`: the least-norm shift after which the output head, read at the site itself as if no block followed, puts the token
  `margin` nats above every other one;
- `donor`: what is missing to the nearest residual at which the model says that token of its own accord, among states of other
  facts; `head` for tokens that no donor says.

Donors are read wherever a token is predicted, so no fact need share the whole object. Where the model says the token already
(most tokens of a sentence that differs from the old one in a word), the delta is zero and the key protects that position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.model import Encoded, MaskedDiffusionLM, Site, capture
from ..diffusion.canvas import canvas_batches
from ..diffusion.masks import MaskBank
from ..errors import RemaskError
from ..facts import Fact
from .capture import Captured, require_bare

PASSES = 5  # each closes the gap to the then best rival; new rivals are rare after the first
CHUNK = 256  # residuals that go through the head together: bounds the [n, V] logits


@dataclass(frozen=True)
class Predictions:
    """Positions whose token is known, over states of several rows.

    Attributes:
        keys: residuals that emit them, [n, d], fp32 on the CPU.
        tokens, said: the token that belongs there, and the one that the model says, [n].
        owner: index of the row, [n], ascending.
    """

    keys: Tensor
    tokens: Tensor
    said: Tensor
    owner: Tensor


def capture_object(
    lm: MaskedDiffusionLM,
    site: Site,
    facts: Sequence[Fact],
    states: MaskBank,
    *,
    margin: float,
    donors: Sequence[Fact] = (),
) -> Captured:
    """Keys at the masked positions of each fact's target, and deltas after which the model says it.

    Args:
        facts: with targets.
        states: bank of the partial states, keyed by fact id.
        margin: nats between the new token and the next one, as the head reads the site; positive.
        donors: facts whose answers the donors are read from; without any, every delta is the head's.

    Raises:
        RemaskError: a fact without target, a site outside the residual stream, an intervention attached, nothing to change, or
            a head that is more than a norm and a table.
    """
    if site.module != "resid":
        raise RemaskError(f"a rewrite is written into the residual stream; use a site with module 'resid', not {site.module!r}")
    found = predictions(lm, site, [_rewritten(lm, fact) for fact in facts], states)
    open_ = found.said != found.tokens
    if not open_.any():
        raise RemaskError("the model says every target already; there is nothing to rewrite")
    deltas = torch.zeros_like(found.keys)
    deltas[open_] = head_shift(lm, found.keys[open_], found.tokens[open_], margin)
    if donors:
        given = predictions(lm, site, [lm.encode(fact) for fact in donors], states)
        for index in torch.nonzero(open_).flatten().tolist():
            alike = given.keys[(given.tokens == found.tokens[index]) & (given.said == given.tokens)]
            if len(alike):
                shifts = alike - found.keys[index]
                deltas[index] = shifts[shifts.square().sum(dim=1).argmin()]
    return Captured(found.keys, deltas, found.owner)


def capture_answers(lm: MaskedDiffusionLM, site: Site, facts: Sequence[Fact], states: MaskBank) -> Tensor:
    """Residuals [m, d] in the same kinds of states under the facts' own answers: what a rewrite must leave alone.

    Raises:
        RemaskError: an intervention is attached.
    """
    return predictions(lm, site, [lm.encode(fact) for fact in facts], states).keys


@torch.inference_mode()
def predictions(lm: MaskedDiffusionLM, site: Site, rows: Sequence[Encoded], states: MaskBank) -> Predictions:
    """Residuals and predictions at the masked answer positions of partial states.

    Every state stands on two canvases: with the answer's own length, and with free slots behind it, up to the generation
    length; there the first slot behind the answer counts too, where the end token belongs.

    Raises:
        RemaskError: an intervention is attached.
    """
    require_bare(lm)
    lm.site_module(site)
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in rows]
    for free in (False, True):
        placed = [_with_slots(lm, row) if free else row for row in rows]
        masks = [_masks(states, row, len(wide.answer_ids)) for row, wide in zip(rows, placed, strict=True)]
        for batch in canvas_batches(lm, placed, masks):
            with capture(lm, [site]) as store:
                logits = lm.logits(batch.clean.masked_fill(batch.masked, lm.spec.mask_id))
            for line, index in enumerate(batch.rows):
                wanted = batch.masked[line].clone()
                wanted[len(rows[index].ids) + 1 :] = False
                emitting = lm.emitting(wanted[None])[0]
                parts = store[site][line][emitting].float(), batch.clean[line][wanted], logits[line][wanted].argmax(dim=-1)
                found[index].append((parts[0].cpu(), parts[1].cpu(), parts[2].cpu()))
    keys, tokens, said = (torch.cat([part[i] for parts in found for part in parts]) for i in range(3))
    sizes = torch.tensor([sum(len(part[1]) for part in parts) for parts in found])
    return Predictions(keys, tokens, said, torch.arange(len(rows)).repeat_interleave(sizes))


@torch.inference_mode()
def head_shift(lm: MaskedDiffusionLM, residuals: Tensor, tokens: Tensor, margin: float) -> Tensor:
    """Shifts [n, d] of the residuals [n, d] after which the output head puts `tokens` [n] first by `margin` nats; fp32.

    With u = (h - mean) / |h - mean| and c = gain * (w_token - w_rival), the difference of two logits has the gradient
    a = (c - u (u.c)) / rms through the final norm (no means under RMSNorm), and  a (margin - difference) / |a|^2  is the
    shortest shift that closes the gap to first order. Further passes follow the norm, and rivals that come up.

    Raises:
        RemaskError: the head is more than a norm and a table.
    """
    norm, table = _final_norm(lm), lm.model.get_output_embeddings().weight
    parts = zip(residuals.split(CHUNK), tokens.split(CHUNK), strict=True)
    shifts = [_head_shift(lm, norm, table, part.to(lm.device).float(), wanted.to(lm.device), margin) for part, wanted in parts]
    return torch.cat(shifts).cpu()


def _head_shift(lm: MaskedDiffusionLM, norm: nn.Module, table: Tensor, start: Tensor, wanted: Tensor, margin: float) -> Tensor:
    mean = (lambda x: x.mean(dim=1, keepdim=True)) if isinstance(norm, nn.LayerNorm) else (lambda x: 0.0)
    gain: Tensor = norm.weight.float()  # type: ignore[assignment]
    hidden, rows = start.clone(), torch.arange(len(start), device=start.device)
    for _ in range(PASSES):
        logits = lm.stack.head(hidden.to(table.dtype)).float()
        mine = logits[rows, wanted]
        logits[rows, wanted] = -torch.inf
        best, rival = logits.max(dim=1)
        slope = (table[wanted].float() - table[rival].float()) * gain
        centred = hidden - mean(hidden)
        slope = slope - mean(slope)
        unit = nn.functional.normalize(centred, dim=1)
        slope = (slope - unit * (unit * slope).sum(dim=1, keepdim=True)) / centred.square().mean(dim=1, keepdim=True).sqrt()
        missing = (margin - mine + best).clamp(min=0)
        hidden = hidden + slope * (missing / slope.square().sum(dim=1))[:, None]
    return hidden - start


def _rewritten(lm: MaskedDiffusionLM, fact: Fact) -> Encoded:
    if fact.target is None:
        raise RemaskError(f"fact {fact.id!r} has no target to rewrite its answer to; give it the field 'target'")
    return lm.encode(fact, answer=fact.target)


def _with_slots(lm: MaskedDiffusionLM, row: Encoded) -> Encoded:
    """The row as generation lays it out: the answer, then end tokens up to the generation length (or the context's end)."""
    free = min(len(row.prompt_ids) + lm.spec.gen_length, lm.spec.max_length) - len(row.ids)
    return replace(row, answer_ids=row.answer_ids + (lm.spec.eos_id,) * max(0, free))


def _masks(states: MaskBank, row: Encoded, length: int) -> np.ndarray:
    """The bank's masks over the answer, with every slot behind it masked: bool [draws, length]."""
    masks = states.masks(row.id, len(row.answer_ids))
    return np.pad(masks, ((0, 0), (0, length - masks.shape[1])), constant_values=True)


def _final_norm(lm: MaskedDiffusionLM) -> nn.Module:
    for name in ("model.norm", "transformer.ln_f"):
        try:
            return lm.model.get_submodule(name)
        except AttributeError:
            continue
    raise RemaskError(f"the output head of {lm.name} is more than a norm and a table, so no shift is known in closed form")
