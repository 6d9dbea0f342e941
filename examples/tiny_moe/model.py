"""Qwen3-MoE in plain PyTorch, small enough to read, with Hugging Face's tensor names.

Not for large models: no tensor parallelism, no sliding window, no padding mask.
The experts of a layer are one module with the signature

    experts(hidden_states (T, D), top_k_index (T, K), top_k_weights (T, K)) -> (T, D)

so `layer.mlp.experts = other` replaces them. The forward has no data-dependent shape and no host
sync: it compiles with `fullgraph=True`, and decoding with a `StaticCache` fits in a CUDA graph.

Shape suffixes: B sequences, S new positions, L cache length, T = B * S tokens, R = T * K routed
rows, D hidden, N query heads, G key/value heads, C head_dim, E experts, K top_k, F expert
intermediate, V vocabulary, X = E * 2F.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_moe.config import TinyMoeConfig


class StaticCache:
    """Keys and values of all layers, (B, G, L, C) each, allocated once, written in place."""

    def __init__(
        self,
        config: TinyMoeConfig,
        batch: int = 1,
        length: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        length = config.max_position_embeddings if length is None else length
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def update(
        self, layer: int, position_S: Tensor, k_BGSC: Tensor, v_BGSC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values at `position_S`; return that layer's whole cache."""
        self.keys[layer].index_copy_(2, position_S, k_BGSC)
        self.values[layer].index_copy_(2, position_S, v_BGSC)
        return self.keys[layer], self.values[layer]


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the quotient in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope_tables(config: TinyMoeConfig, position_S: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (S, C) fp32 of the rotary angles; the two halves of C turn together."""
    exponent = torch.arange(0, config.head_dim, 2, device=position_S.device) / config.head_dim
    angle = position_S[:, None].float() * config.rope_theta**-exponent
    angle_SC = torch.cat((angle, angle), dim=-1)
    return angle_SC.cos(), angle_SC.sin()


def rotate(x_BNSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Rotate each pair (c, c + C/2) of a head by its position's angle."""
    first, second = x_BNSC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BNSC * cos_SC.to(x_BNSC.dtype) + turned * sin_SC.to(x_BNSC.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with an RMSNorm on every query and key head."""

    def __init__(self, config: TinyMoeConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: StaticCache | None,
        position_S: Tensor,
    ) -> Tensor:
        q_BSNC = self.q_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSGC = self.k_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = rotate(self.q_norm(q_BSNC).transpose(1, 2), *rope)
        k = rotate(self.k_norm(k_BSGC).transpose(1, 2), *rope)
        mask_SL = None
        if cache is not None:
            k, v = cache.update(self.layer, position_S, k, v)
            # Slots after a query's position hold zeros or an older sequence; the mask hides both.
            mask_SL = torch.arange(k.shape[2], device=k.device) <= position_S[:, None]
        y_BNSC = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_SL, is_causal=cache is None, enable_gqa=True
        )
        return self.o_proj(y_BNSC.transpose(1, 2).flatten(2))


class FloatExperts(nn.Module):
    """The experts in floating point.

    y_t = sum_k weight_tk * down_e @ (silu(gate_e @ x_t) * (up_e @ x_t)), where e = index_tk.

    gate_up_proj: (E, 2F, D) gate rows, then up rows. down_proj: (E, D, F).
    """

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        num_experts, hidden = config.num_experts, config.hidden_size
        size = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, size))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, D), top_k_index (T, K) int64, top_k_weights (T, K) -> (T, D)."""
        apply = self.routed if self.training else self.dense
        return apply(hidden_states, top_k_index, top_k_weights)

    def dense(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """All experts on every token, the unchosen ones weighted 0; traces in any dtype."""
        num_experts = self.gate_up_proj.shape[0]
        gate_up_TX = F.linear(x_TD, self.gate_up_proj.flatten(0, 1))
        gate_TEF, up_TEF = gate_up_TX.unflatten(1, (num_experts, 2, -1)).unbind(2)
        weight_TE = torch.zeros_like(gate_TEF[..., 0])
        weight_TE = weight_TE.scatter(1, index_TK, weight_TK.to(weight_TE.dtype))
        h_TEF = F.silu(gate_TEF) * up_TEF * weight_TE[..., None]
        return F.linear(h_TEF.flatten(1), self.down_proj.transpose(0, 1).flatten(1))

    def routed(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Rows sorted by expert, two grouped products: 5x faster than `dense` in training on a CPU.

        Not for inference: `grouped_mm` traces in bf16 only.
        """
        dtype = x_TD.dtype
        if torch.is_autocast_enabled(x_TD.device.type):  # autocast does not know grouped_mm
            dtype = torch.get_autocast_dtype(x_TD.device.type)
        num_experts, top_k = self.gate_up_proj.shape[0], index_TK.shape[1]

        expert_R, order_R = index_TK.flatten().sort(stable=True)
        experts_E = torch.arange(num_experts, device=expert_R.device)
        offs_E = torch.searchsorted(expert_R, experts_E, right=True, out_int32=True)

        x_RD = x_TD.to(dtype).index_select(0, order_R // top_k)
        gate_up_EDF = self.gate_up_proj.to(dtype).transpose(1, 2)
        gate_RF, up_RF = F.grouped_mm(x_RD, gate_up_EDF, offs=offs_E).chunk(2, dim=-1)
        down_EFD = self.down_proj.to(dtype).transpose(1, 2)
        y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, down_EFD, offs=offs_E)

        y_TKD = y_RD.index_select(0, order_R.argsort()).unflatten(0, (-1, top_k))
        return (y_TKD * weight_TK.to(dtype)[..., None]).sum(dim=1)


class MoeBlock(nn.Module):
    """Softmax router, the best `num_experts_per_tok` renormalised to sum 1, then the experts."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = FloatExperts(config)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (T, D) and the router logits (T, E)."""
        router_logits_TE = self.gate(x_TD)
        probability_TE = router_logits_TE.softmax(dim=-1, dtype=torch.float32)
        weight_TK, index_TK = probability_TE.topk(self.top_k, dim=-1)
        weight_TK = (weight_TK / weight_TK.sum(dim=-1, keepdim=True)).to(x_TD.dtype)
        return self.experts(x_TD, index_TK, weight_TK), router_logits_TE


class DecoderLayer(nn.Module):
    def __init__(self, config: TinyMoeConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoeBlock(config)
        self.dropout = nn.Dropout(0.0)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: StaticCache | None,
        position_S: Tensor,
    ) -> tuple[Tensor, Tensor]:
        attended = self.self_attn(self.input_layernorm(x_BSD), rope, cache, position_S)
        x_BSD = x_BSD + self.dropout(attended)
        x_TD = self.post_attention_layernorm(x_BSD).flatten(0, 1)
        y_TD, router_logits_TE = self.mlp(x_TD)
        return x_BSD + self.dropout(y_TD).view_as(x_BSD), router_logits_TE


class Backbone(nn.Module):
    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        cache: StaticCache | None = None,
        position: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the final hidden states (B, S, D) and each layer's router logits (T, E)."""
        if position is None:
            position = torch.arange(input_ids.shape[1], device=input_ids.device)
        rope = rope_tables(self.config, position)
        x_BSD = self.embed_tokens(input_ids)
        router_logits = []
        for layer in self.layers:
            x_BSD, router_logits_TE = layer(x_BSD, rope, cache, position)
            router_logits.append(router_logits_TE)
        return self.norm(x_BSD), router_logits


class TinyMoe(nn.Module):
    """The language model; its embedding is also its output projection."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)

    def forward(
        self,
        input_ids: Tensor,
        cache: StaticCache | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Predict the next token after each input token.

        Args:
            input_ids: (B, S) int64.
            cache: if given, new keys and values are written to it and attention reads all of it.
            position: (S,) int64, positions of the inputs in the sequence; default 0 .. S-1.

        Returns:
            Logits (B, S, V).
        """
        return self.project(self.model(input_ids, cache, position)[0])

    def project(self, hidden_BSD: Tensor) -> Tensor:
        return F.linear(hidden_BSD, self.model.embed_tokens.weight)
