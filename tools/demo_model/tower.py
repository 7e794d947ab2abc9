"""The forward pass of training: the same weights and the same results as transformers', in batches.

Transformers' tower attends picture by picture and convolves each patch; here all pictures of one size
go through together, several times faster on a CPU. `tests/demo_model` holds both to equal results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from .data import Batch, Pictures
from .model import MERGE


def encode(
    model: Qwen2VLForConditionalGeneration, patches: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Return `[pictures, tokens, hidden]` for `patches` `[pictures, patches, 588]` of one grid."""
    visual = model.model.visual
    # Both frames of a still picture are equal, so the kernels of the two add up.
    kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)
    hidden = functional.linear(patches, kernel)
    positions = _positions(*grid)
    cos, sin = visual.rotary_pos_emb(hidden, positions)
    pictures, count, width = hidden.shape
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden))
        q, k, v = qkv.view(pictures, count, 3, attention.num_heads, -1).unbind(2)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        mixed = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(pictures, count, width))
        hidden = hidden + block.mlp(block.norm2(hidden))
    tokens = visual.merger(hidden.view(-1, width))
    return tokens.view(pictures, count // MERGE**2, -1)


def _positions(rows: int, columns: int) -> torch.Tensor:
    """Return `[patches, 2]`: row and column of each patch, in the order of merged blocks."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(
        [
            axis.view(rows // MERGE, MERGE, columns // MERGE, MERGE).transpose(1, 2).flatten()
            for axis in (y, x)
        ],
        dim=-1,
    )


def encode_all(model: Qwen2VLForConditionalGeneration, pictures: Pictures) -> torch.Tensor:
    """Return `[image tokens, hidden]`: the tokens of all pictures, in order."""
    encoded = (encode(model, *group) for group in zip(pictures.patches, pictures.grids, strict=True))
    return torch.cat([tokens.flatten(0, 1) for tokens in encoded])


@dataclass(frozen=True)
class Read:
    """What the decoder makes of a batch.

    `logits` `[answer tokens, vocabulary]` at `Batch.predict_at`. Of the residual stream: `half_way`
    `[hints, hidden]` at `Batch.hint_at` after half of the layers, `later` the same a layer later, and `early`
    `[image tokens of pairs, hidden]` at `Batch.ordinal_at` after the first layer.
    """

    logits: torch.Tensor
    half_way: torch.Tensor
    later: torch.Tensor
    early: torch.Tensor


def read(model: Qwen2VLForConditionalGeneration, batch: Batch, image_tokens: torch.Tensor) -> Read:
    """Run the decoder over `batch` and `encode_all`'s result for its pictures."""
    language = model.model.language_model
    words = language.embed_tokens(batch.token_ids)
    seen = image_tokens[batch.image_tokens.clamp(min=0)]
    output = language(
        inputs_embeds=torch.where(batch.image_tokens[..., None] >= 0, seen, words),
        position_ids=batch.positions,
        attention_mask=batch.mask,
        use_cache=False,
        output_hidden_states=True,
    )
    half = len(language.layers) // 2
    half_way, later, early = (output.hidden_states[layer].flatten(0, 1) for layer in (half, half + 1, 1))
    last = output.last_hidden_state.flatten(0, 1)
    return Read(
        logits=model.lm_head(last[batch.predict_at]),
        half_way=half_way[batch.hint_at],
        later=later[batch.hint_at],
        early=early[batch.ordinal_at],
    )
