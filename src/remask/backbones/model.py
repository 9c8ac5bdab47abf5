"""What a masked diffusion language model is, for everything above this package.

A `MaskedDiffusionLM` owns a transformer of one of transformers' own decoder stacks run bidirectionally, its tokenizer, and
the few facts that make it a diffusion model (mask id, logit shift, template). Everything above sees *position-aligned*
logits: row i is the prediction for position i, whatever position emits it.

Shapes: B sequences, L positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RemaskError, TooLongError
from ..facts import Fact, token_span
from .stacks import Stack, block_causal_mask, stack_of

if TYPE_CHECKING:
    from .intervention import Intervention

Module = Literal["resid", "attn", "mlp"]
MODULES: tuple[Module, ...] = ("resid", "attn", "mlp")


@dataclass(frozen=True)
class Site:
    """Where an edit acts: a layer, a module of it, and the denoising steps (None = every step).

    `resid` is the block's output, `attn` the attention output projection, `mlp` the MLP's output.
    """

    layer: int
    module: Module = "resid"
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.module not in MODULES:
            raise RemaskError(f"site module {self.module!r} is unknown; choose one of {', '.join(MODULES)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "layer": self.layer,
            "module": self.module,
            "steps": None if self.steps is None else list(self.steps),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """Inverse of `to_dict`."""
        steps = data.get("steps")
        return cls(int(data["layer"]), data["module"], None if steps is None else tuple(steps))


@dataclass(frozen=True)
class BackboneSpec:
    """What distinguishes one family of masked diffusion models from another.

    Attributes:
        family: name of the loader that made it.
        mask_id, eos_id, pad_id: token ids; pad may equal eos, so padding is never inferred from ids.
        shift: logits of position i are emitted at i-1 (Dream, DiffuLLaMA).
        attention_block: block-causal attention over blocks of that many positions; 0 = full attention.
        unpadded_positions: positions count real tokens only (Dream, GPT-2); otherwise they are indices of the padded row.
        template: prompt template with `{prompt}`; special tokens are written in it as text.
        chat_template: Jinja template of `chat`, empty where the family has none.
        sampler: name of the sampler preset that reproduces the original.
        answer_prefix: text put before the answer when the template does not end in a separator.
        max_length: context length in tokens.
        gen_length: response slots that generation uses unless told otherwise.
        block_length: semi-autoregressive block that generation uses unless told otherwise.
    """

    family: str
    mask_id: int
    eos_id: int
    pad_id: int
    shift: bool = False
    attention_block: int = 0
    unpadded_positions: bool = False
    template: str = "{prompt}"
    chat_template: str = ""
    sampler: str = "llada"
    answer_prefix: str = ""
    max_length: int = 4096
    gen_length: int = 128
    block_length: int = 128


@dataclass(frozen=True)
class Encoded:
    """A fact as token ids: prompt (templated), answer (no end token), subject span in the prompt (half-open)."""

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    subject: tuple[int, int]

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole canvas, nothing masked."""
        return self.prompt_ids + self.answer_ids

    @property
    def answer(self) -> tuple[int, int]:
        """Span of the answer on the canvas (half-open)."""
        return len(self.prompt_ids), len(self.ids)


@dataclass
class Counters:
    """Work done so far; tests and benchmarks assert on these instead of on seconds.

    Attributes:
        forwards: embeddings of a batch.
        blocks: calls of a block on a batch.
        tokens: tokens embedded.
        sequence_blocks: executions of a block on one sequence; does not depend on how sequences are batched.
    """

    forwards: int = 0
    blocks: int = 0
    tokens: int = 0
    sequence_blocks: int = 0


@dataclass
class Clock:
    """Index of the denoising step that is running; None outside of sampling. Step-limited edits read it."""

    step: int | None = None


@dataclass
class MaskedDiffusionLM:
    """A masked diffusion language model on a native transformers decoder stack.

    Build one with `remask.load`. Attention is full over the sequence, or block-causal where the family says so; padding is
    masked only through `attention_mask` (bool or 0/1, [B, L], 1 = real token).

    Attributes:
        source: the config.json that it was loaded from, in the checkpoint's own layout; empty for a new model.
        fp32_rope: rotary positions are applied in fp32 whatever the weights' dtype.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    spec: BackboneSpec
    name: str = "model"
    counters: Counters = field(default_factory=Counters)
    clock: Clock = field(default_factory=Clock)
    attached: list[Intervention] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    fp32_rope: bool = False

    def __post_init__(self) -> None:
        # Two switches, both needed: the config flag reaches attention only through the base model's forward, and a lone
        # layer falls back to `module.is_causal`, which is True by default.
        self.stack: Stack = stack_of(self.model)
        self.model.config.is_causal = False
        for module in self.model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
        self.model.eval()
        self.model.requires_grad_(False)

    # ---------------------------------------------------------------- shape of the model
    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks in order."""
        return self.stack.blocks

    @property
    def embedding(self) -> nn.Embedding:
        """The token table, [V, d]."""
        return self.stack.embedding

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Device of the embedding table."""
        return self.embedding.weight.device

    @property
    def num_parameters(self) -> int:
        """Parameter count, tied weights once."""
        return sum(p.numel() for p in self.model.parameters())

    def site_module(self, site: Site) -> nn.Module:
        """The module whose *output* is the site.

        Raises:
            RemaskError: layer or module outside the model.
        """
        if not 0 <= site.layer < self.num_layers:
            raise RemaskError(f"site layer {site.layer} is outside the model: {self.name} has layers 0..{self.num_layers - 1}")
        block: Any = self.blocks[site.layer]
        return block if site.module == "resid" else getattr(self.stack, site.module)(block)

    def mlp_key_module(self, layer: int) -> nn.Module:
        """The module whose *input* [B, L, mlp size] is the MLP's key at `layer` (ROME's key): the down projection.

        Raises:
            RemaskError: layer outside the model, or a mixture of experts, which has no single key.
        """
        return self.stack.mlp_key(self.site_module(Site(layer)))

    def fingerprint(self) -> str:
        """16 hex digits over architecture and weights, see `fingerprint`."""
        return fingerprint(self.model)

    # ---------------------------------------------------------------- forward passes
    def logits(self, ids: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Position-aligned logits.

        Args:
            ids: [B, L] token ids.
            attention_mask: [B, L], 1 = real token, or additive [B, 1, L, L]; None = no padding.
            positions: [B, L] bool; when given only these positions go through the head.

        Returns:
            [B, L, V], or [n, V] in row-major order of `positions`.
        """
        hidden = self.run_to(self.num_layers - 1, ids, attention_mask)
        return self.head(hidden, positions)

    def run_to(self, layer: int, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Output of block `layer` [B, L, d]; later blocks do not run (early exit)."""
        self.site_module(Site(layer))
        return self.run_blocks(range(layer + 1), self.embed(ids, attention_mask), attention_mask)

    def embed(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Input of the first block [B, L, d]."""
        self.counters.forwards += 1
        self.counters.tokens += ids.numel()
        return self.stack.embed(ids, self._position_ids(ids, attention_mask))

    def run_from(
        self, layer: int, hidden: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits when block `layer` put out `hidden` [B, L, d]: only the blocks above it run (resume)."""
        self.site_module(Site(layer))
        hidden = self.run_blocks(range(layer + 1, self.num_layers), hidden, attention_mask)
        return self.head(hidden, positions)

    def head(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Final norm and output head over the last block's output; the logit shift is undone here."""
        if self.spec.shift:
            hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        if positions is not None:
            hidden = hidden[positions]
        return self.stack.head(hidden)

    def emitting(self, positions: Tensor) -> Tensor:
        """Map predicted positions [B, L] bool to the positions whose hidden state emits them."""
        if not self.spec.shift:
            return positions
        emitting = torch.zeros_like(positions)
        emitting[:, :-1] = positions[:, 1:]
        emitting[:, 0] |= positions[:, 0]
        return emitting

    def _position_ids(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[1, L], or [B, L] where padding shifts the positions; `tokens` is anything of shape [B, L, ...]."""
        length = tokens.shape[1]
        if length > self.spec.max_length:
            raise RemaskError(f"a sequence of {length} tokens exceeds the context of {self.name}: {self.spec.max_length}")
        if self.spec.unpadded_positions and attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return torch.arange(length, device=tokens.device).unsqueeze(0)

    def run_blocks(self, layers: range, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The walk of the native base model over `layers`: their first one's input to their last one's output, [B, L, d]."""
        position_ids = self._position_ids(hidden, attention_mask)
        mask = attention_mask
        if self.spec.attention_block:
            mask = block_causal_mask(position_ids, self.spec.attention_block, attention_mask, hidden.dtype)
        context = self.stack.context(hidden.float() if self.fp32_rope else hidden, mask, position_ids)
        for layer in layers:
            hidden = self.blocks[layer](hidden, **context[layer])
        self.counters.blocks += len(layers)
        self.counters.sequence_blocks += len(layers) * len(hidden)
        return hidden

    # ---------------------------------------------------------------- text
    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """Templated prompt as token ids.

        Raises:
            RemaskError: the text contains the mask token.
        """
        ids = tuple(self._tokenizer()(self._templated(prompt), add_special_tokens=False)["input_ids"])
        if self.spec.mask_id in ids:
            raise RemaskError(f"the prompt {prompt!r} contains the mask token of {self.name}; remove it")
        return ids

    def encode(self, fact: Fact, prompt: str | None = None, answer: str | None = None) -> Encoded:
        """Token ids of a fact, or of the fact with another wording or answer.

        The subject span of another wording is the subject where it occurs in it, else the whole wording.

        Raises:
            RemaskError: mask token inside the text, or longer than the model's context; names the fact.
        """
        wording = fact.prompt if prompt is None else prompt
        text = self._templated(wording)
        tokens = self._tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)
        answer_text = self.spec.answer_prefix + (fact.answer if answer is None else answer)
        prompt_ids = tuple(tokens["input_ids"])
        answer_ids = tuple(self._tokenizer()(answer_text, add_special_tokens=False)["input_ids"])
        if self.spec.mask_id in prompt_ids + answer_ids:
            raise RemaskError(f"fact {fact.id!r} contains the mask token of {self.name}; remove it from the text")
        if not answer_ids:
            raise RemaskError(f"fact {fact.id!r}: the answer has no tokens; give it a text")
        if len(prompt_ids) + len(answer_ids) > self.spec.max_length:
            raise TooLongError(
                f"fact {fact.id!r} has {len(prompt_ids) + len(answer_ids)} tokens, more than the context of "
                f"{self.name} ({self.spec.max_length}); shorten it"
            )
        subject = fact.subject if fact.subject in wording else wording
        start = self.spec.template.index("{prompt}") + wording.index(subject)
        span = token_span(tokens["offset_mapping"], start, start + len(subject))
        return Encoded(fact.id, prompt_ids, answer_ids, span)

    def encode_text(self, name: str, text: str) -> Encoded:
        """A passage that is scored as a whole: no prompt, or the end token where position 0 is never predicted.

        Raises:
            RemaskError: no tokens, the mask token inside the text, or longer than the context; names the text.
        """
        ids = tuple(self._tokenizer()(text, add_special_tokens=False)["input_ids"])
        start = (self.spec.eos_id,) if self.spec.shift else ()
        if not ids or self.spec.mask_id in ids:
            raise RemaskError(f"text {name!r} is empty or contains the mask token of {self.name}; remove it")
        if len(start) + len(ids) > self.spec.max_length:
            raise TooLongError(f"text {name!r} has {len(ids)} tokens, more than the context of {self.name}; shorten it")
        return Encoded(name, start, ids, (0, 0))

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation under the family's chat template, ready for `generate`.

        Args:
            messages: `{"role": "user" | "assistant" | "system", "content": text}` each, the last one the user's.

        Raises:
            RemaskError: the family has no chat template, or a text contains the mask token.
        """
        if not self.spec.chat_template:
            raise RemaskError(f"{self.name} has no chat template; give a plain prompt instead")
        text = self._tokenizer().apply_chat_template(
            list(messages), chat_template=self.spec.chat_template, add_generation_prompt=True, tokenize=False
        )
        ids = tuple(self._tokenizer()(text, add_special_tokens=False)["input_ids"])
        if self.spec.mask_id in ids:
            raise RemaskError(f"the conversation contains the mask token of {self.name}; remove it")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of response ids up to the first end token; masks left on the canvas are shown as such."""
        ids = list(ids)
        if self.spec.eos_id in ids:
            ids = ids[: ids.index(self.spec.eos_id)]
        return str(self._tokenizer().decode(ids, skip_special_tokens=False)).strip()

    def _templated(self, prompt: str) -> str:
        return self.spec.template.replace("{prompt}", prompt)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RemaskError(f"{self.name} was loaded without a tokenizer; add tokenizer.json to its folder")
        return self.tokenizer


def fingerprint(model: nn.Module) -> str:
    """16 hex digits over architecture and weights.

    For every parameter and stored buffer (router biases), the integer sums of its fp32 bit patterns, plain and weighted by
    position. Equal for the same checkpoint on any device, since integer sums do not depend on order; changes when any weight
    does.
    """
    digest = hashlib.blake2b(digest_size=8)
    stored = model.state_dict(keep_vars=True)
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in stored}
    for name, parameter in sorted(tensors.items()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        rows = parameter.detach().reshape(len(parameter), -1)
        for start in range(0, len(rows), 4096):  # bounds the fp32 copy of a large table
            bits = rows[start : start + 4096].float().contiguous().view(torch.int32).long().reshape(-1)
            weight = torch.arange(1, bits.numel() + 1, device=bits.device)
            digest.update(f"{int(bits.sum())},{int((bits * weight).sum())}".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def capture(lm: MaskedDiffusionLM, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record the outputs [B, L, d] of `sites` during the forwards inside the block (the last forward wins)."""
    store: dict[Site, Tensor] = {}

    def keep(site: Site) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            store[site] = output[0] if isinstance(output, tuple) else output

        return hook

    with contextlib.ExitStack() as stack:
        for site in sites:
            handle = lm.site_module(site).register_forward_hook(keep(site))
            stack.callback(handle.remove)
        yield store


def length_batches(lengths: Sequence[int], token_budget: int) -> Iterator[np.ndarray]:
    """Group row indices by exact length (no padding, the fastest attention path), at most `token_budget` tokens a batch."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        length = lengths[order[start]]
        stop = start + 1
        limit = max(1, token_budget // max(1, length))
        while stop < len(order) and lengths[order[stop]] == length and stop - start < limit:
            stop += 1
        yield order[start:stop]
        start = stop
