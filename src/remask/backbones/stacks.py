"""How transformers' native architectures are walked block by block: embedding, blocks, final norm and head, and their sites.

A `Stack` wraps the native model of one architecture. Everything that differs between Llama-like decoders, GPT-2, BERT and
ModernBERT is here; `MaskedDiffusionLM` drives all of them alike.

Shapes: B sequences, L positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

from ..errors import RemaskError


class Stack:
    """Llama-like decoders: Llama, Qwen2, Qwen3, Qwen3Moe, Glm4Moe."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks in order."""
        return self.model.model.layers

    @property
    def embedding(self) -> nn.Embedding:
        """The token table."""
        return self.model.model.embed_tokens

    def attn(self, block: Any) -> nn.Module:
        """Module whose output is what attention adds to the residual stream."""
        return block.self_attn.o_proj

    def mlp(self, block: Any) -> nn.Module:
        """Module whose output is what the MLP (or the mixture of experts) adds to the residual stream."""
        return block.mlp

    def mlp_key(self, block: Any) -> nn.Module:
        """Module whose *input* is the MLP's key: the down projection.

        Raises:
            RemaskError: a mixture of experts has one down projection an expert and so no single key.
        """
        if not hasattr(block.mlp, "down_proj"):
            raise RemaskError("a mixture-of-experts layer has no single MLP key; use its mlp output, or a dense layer")
        return block.mlp.down_proj

    # A block in three parts, for patches inside it: `inputs` of the block and what its attention and its MLP put out, all
    # [..., d]; a position's result depends on that position alone.
    def after_attn(self, block: Any, inputs: Tensor, attn: Tensor) -> Tensor:
        """Residual stream between attention and MLP."""
        return inputs + attn

    def run_mlp(self, block: Any, middle: Tensor) -> Tensor:
        """What the MLP puts out on `middle` [B, L, d]."""
        return block.mlp(block.post_attention_layernorm(middle))

    def after_mlp(self, block: Any, middle: Tensor, mlp: Tensor) -> Tensor:
        """Output of the block."""
        return middle + mlp

    def embed(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        """Input of the first block, [B, L, d]."""
        return self.embedding(ids)

    def context(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> list[dict[str, Any]]:
        """What each block is called with besides its input; `attention_mask` is None, [B, L], or additive [B, 1, L, L]."""
        mask = create_bidirectional_mask(config=self.model.config, inputs_embeds=hidden, attention_mask=attention_mask)
        rotary = self.model.model.rotary_emb(hidden, position_ids=position_ids)
        return [{"attention_mask": mask, "position_ids": position_ids, "position_embeddings": rotary}] * len(self.blocks)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: [..., d] -> [..., V]."""
        return self.model.lm_head(self.model.model.norm(hidden))


class GPT2Stack(Stack):
    """GPT-2: learned positions, fused QKV."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks in order."""
        return self.model.transformer.h

    @property
    def embedding(self) -> nn.Embedding:
        """The token table."""
        return self.model.transformer.wte

    def attn(self, block: Any) -> nn.Module:
        """Attention's output projection."""
        return block.attn.c_proj

    def mlp_key(self, block: Any) -> nn.Module:
        """The MLP's second projection."""
        return block.mlp.c_proj

    def run_mlp(self, block: Any, middle: Tensor) -> Tensor:
        """What the MLP puts out on `middle`."""
        return block.mlp(block.ln_2(middle))

    def embed(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token plus position embedding."""
        return self.embedding(ids) + self.model.transformer.wpe(position_ids)

    def context(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> list[dict[str, Any]]:
        """One mask for all blocks; positions are in the embedding."""
        mask = create_bidirectional_mask(config=self.model.config, inputs_embeds=hidden, attention_mask=attention_mask)
        return [{"attention_mask": mask}] * len(self.blocks)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and output head."""
        return self.model.lm_head(self.model.transformer.ln_f(hidden))


class BertStack(Stack):
    """BERT: an encoder with post-norm blocks; the residual sites are the projections before each sum."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks in order."""
        return self.model.bert.encoder.layer

    @property
    def embedding(self) -> nn.Embedding:
        """The token table."""
        return self.model.bert.embeddings.word_embeddings

    def attn(self, block: Any) -> nn.Module:
        """Attention's output projection, before the residual sum and its norm."""
        return block.attention.output.dense

    def mlp(self, block: Any) -> nn.Module:
        """The MLP's second projection, before the residual sum and its norm."""
        return block.output.dense

    mlp_key = mlp

    def after_attn(self, block: Any, inputs: Tensor, attn: Tensor) -> Tensor:
        """Normed sum of input and attention."""
        return block.attention.output.LayerNorm(attn + inputs)

    def run_mlp(self, block: Any, middle: Tensor) -> Tensor:
        """What the MLP's second projection puts out on `middle`."""
        return block.output.dense(block.intermediate(middle))

    def after_mlp(self, block: Any, middle: Tensor, mlp: Tensor) -> Tensor:
        """Normed sum of the middle and the MLP."""
        return block.output.LayerNorm(mlp + middle)

    def embed(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token, position and segment embedding, normed."""
        return self.model.bert.embeddings(input_ids=ids, position_ids=position_ids)

    def context(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> list[dict[str, Any]]:
        """One mask for all blocks."""
        mask = create_bidirectional_mask(config=self.model.config, inputs_embeds=hidden, attention_mask=attention_mask)
        return [{"attention_mask": mask}] * len(self.blocks)

    def head(self, hidden: Tensor) -> Tensor:
        """BERT's prediction head (transform, norm, decoder)."""
        return self.model.cls(hidden)


class ModernBertStack(Stack):
    """ModernBERT: most layers attend to a sliding window only, in both directions."""

    @property
    def embedding(self) -> nn.Embedding:
        """The token table."""
        return self.model.model.embeddings.tok_embeddings

    def attn(self, block: Any) -> nn.Module:
        """Attention's output projection."""
        return block.attn.Wo

    def mlp_key(self, block: Any) -> nn.Module:
        """The MLP's output projection."""
        return block.mlp.Wo

    def run_mlp(self, block: Any, middle: Tensor) -> Tensor:
        """What the MLP puts out on `middle`."""
        return block.mlp(block.mlp_norm(middle))

    def embed(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token embedding, normed."""
        return self.model.model.embeddings(input_ids=ids)

    def context(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> list[dict[str, Any]]:
        """Mask and rotary table of each block's attention type."""
        arguments = {"config": self.model.config, "inputs_embeds": hidden, "attention_mask": attention_mask}
        masks = {
            "full_attention": create_bidirectional_mask(**arguments),
            "sliding_attention": create_bidirectional_sliding_window_mask(**arguments),
        }
        kinds = [str(block.attention_type) for block in self.blocks]
        rotary = {kind: self.model.model.rotary_emb(hidden, position_ids, kind) for kind in set(kinds)}
        return [{"attention_mask": masks[kind], "position_embeddings": rotary[kind]} for kind in kinds]

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm, prediction head, decoder."""
        return self.model.decoder(self.model.head(self.model.model.final_norm(hidden)))


STACKS: dict[str, type[Stack]] = {
    "LlamaForCausalLM": Stack,
    "Qwen2ForCausalLM": Stack,
    "Qwen3ForCausalLM": Stack,
    "Qwen3MoeForCausalLM": Stack,
    "Glm4MoeForCausalLM": Stack,
    "GPT2LMHeadModel": GPT2Stack,
    "BertForMaskedLM": BertStack,
    "ModernBertForMaskedLM": ModernBertStack,
}


def stack_of(model: PreTrainedModel) -> Stack:
    """The stack of a native model.

    Raises:
        RemaskError: an architecture that is not covered.
    """
    name = type(model).__name__
    if name not in STACKS:
        raise RemaskError(f"{name} is not a supported architecture; choose one of {', '.join(STACKS)}")
    return STACKS[name](model)


def block_causal_mask(position_ids: Tensor, block: int, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Additive [B, 1, L, L]: a query sees the keys of its own block of positions and of earlier ones, padding keys never.

    Args:
        position_ids: [B or 1, L]; block b holds positions b * block .. (b + 1) * block - 1.
        attention_mask: [B, L], 1 = real token; None = no padding.
    """
    index = position_ids // block
    allowed = index[:, :, None] >= index[:, None, :]
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, :]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)
