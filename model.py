"""A GPT in the shape of Llama, Qwen2 and Qwen3, with modules named as theirs.

RMSNorm, rotary positions, SwiGLU, grouped-query attention, optional biases and norms of queries and
keys, tied or untied head.
Two things are unusual. Positions and mask are given explicitly, because sibling branches share
their positions and do not see each other. And the KV cache is written at slots that the caller
names: the same forward() serves a prompt, prefixes and tokens of branches; no counter hides in it.

Shapes, here and in decode.py: B batch, T tokens fed, N of them after which a token is chosen, S
slots seen, C n_embd, nh n_head, nkv n_kv_head, hs head_size, V vocab_size.
"""
import math
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

from aspd import MAX_BRANCHES, check, naming

FORMAT = "aspd-4"  # of our checkpoints: OUT_DIR/ckpt.pt, a dict of tensors and plain values


@dataclass
class GPTConfig:
    """The shape of a model; the defaults have about the size of GPT-2."""
    block_size: int = 1024        # context, in row tokens (nothing to do with aspd.Block)
    vocab_size: int = 50304       # rows of the embedding, tags and padding included
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12           # fewer than n_head: grouped-query attention
    n_embd: int = 768
    n_inner: int = 2048           # width of the SwiGLU layer
    head_size: int = 64
    rope_theta: float = 500000.0  # large, as in Llama 3: attention fades less with distance
    rope_scaling: tuple = (1.0, 0.0, 1.0)  # factor, slow, fast of rope(); 1.0 changes nothing
    norm_eps: float = 1e-5
    qkv_bias: bool = False        # True in Qwen2
    qk_norm: bool = False         # True in Qwen3
    tied: bool = True             # the head shares the embedding's weights
    positions: str = "aspd"       # of aspd.POSITIONS, as trained; None: it never learnt to branch


def rope(position, head_size, theta, factor=1.0, slow=0.0, fast=1.0):
    """Rotary positions: (B, T) -> cosines and sines, (B, 1, T, hs) each, float32.

    For a longer context, as in Llama 3 (tests/convert.py computes the three numbers): pairs of
    channels that turn by at most `slow` (radians a position) are slowed down by `factor`; those of
    at least `fast` stay; between them is a ramp."""
    channel = torch.arange(0, head_size, 2, dtype=torch.float32, device=position.device)
    frequency = theta ** -(channel / head_size)          # (hs/2,)
    ramp = ((frequency - slow) / (fast - slow)).clamp(0, 1)
    frequency = torch.lerp(frequency / factor, frequency, ramp)
    angle = position[:, None, :, None] * frequency       # (B, 1, T, hs/2)
    angle = torch.cat((angle, angle), dim=-1)            # both halves of a head turn alike
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns queries or keys, (B, heads, T, hs), by their positions, in their own type."""
    x1, x2 = x.chunk(2, dim=-1)
    turned = torch.cat((-x2, x1), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def attend(q, k, v, mask):
    """Grouped-query attention: q (B, nh, T, hs), k and v (B, nkv, S, hs) -> (B, nh, T, hs).

    The nh/nkv neighbouring heads that share keys become rows of one matrix, T of the first, then T
    of the next, so that every key is read once. mask: 0 where seen, else -inf, repeated for these
    heads by GPT.forward: (nh/nkv * T, S) or (B, 1, nh/nkv * T, S)."""
    rows = q.reshape(*k.shape[:2], -1, k.size(-1))  # (B, nkv, nh/nkv * T, hs)
    if q.size(2) > MAX_BRANCHES:
        # More than a token of each branch: a batch to train on, a prompt, prefixes. torch's kernel
        # does not hold all scores in memory.
        y = F.scaled_dot_product_attention(rows, k, v, mask)
    else:
        # For so few queries plain products are three times as fast on a GPU, and about as fast on a
        # CPU. The mask first: of `scores + mask` torch.compile would make torch's kernel again.
        scores = rows @ k.transpose(-1, -2) / math.sqrt(k.size(-1))
        y = (mask + scores).softmax(-1) @ v
    return y.reshape(q.shape)


def linear(x, weight, bias=None):
    """F.linear, or oneDNN's product with a weight that pack() has prepared. Its last arguments say
    that no activation follows."""
    is_frozen = not weight.requires_grad  # else training may have changed it since pack()
    if hasattr(weight, "packed") and is_frozen and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(x, weight.packed, bias, "none", [], "")
    return F.linear(x, weight, bias)


def pack(model):
    """For decoding on a CPU: lays out the matrices of a frozen model as oneDNN wants them, once, if
    the CPU is fast in their type. F.linear does so at every call, which makes it up to 1.8 times as
    slow for a few tokens. The weights then take twice the memory."""
    fast = (torch.float32, getattr(torch, fast_dtype("cpu")))
    for weight in model.parameters():
        is_matrix = weight.dim() == 2 and weight.dtype in fast and weight.is_cpu
        if is_matrix and torch.backends.mkldnn.is_available():
            weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight)


class Linear(nn.Linear):
    """nn.Linear, computed by linear(): (..., in) -> (..., out)."""
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """x (B, T, C) -> (B, T, C). cos, sin: of rope(); mask: of attend(); slot: of GPT.forward."""
    def __init__(self, config):
        super().__init__()
        C, hs, bias = config.n_embd, config.head_size, config.qkv_bias
        self.head_size = hs
        self.q_proj = Linear(C, config.n_head * hs, bias=bias)
        self.k_proj = Linear(C, config.n_kv_head * hs, bias=bias)
        self.v_proj = Linear(C, config.n_kv_head * hs, bias=bias)
        self.o_proj = Linear(config.n_head * hs, C, bias=False)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity  # which ignores its arguments
        self.q_norm = norm(hs, eps=config.norm_eps)
        self.k_norm = norm(hs, eps=config.norm_eps)
        # Keys and values of one answer, (1, nkv, slots, hs): buffers that are written in place, as
        # a compiled step needs them.
        self.register_buffer("k_cache", None, persistent=False)
        self.register_buffer("v_cache", None, persistent=False)

    def forward(self, x, cos, sin, mask, slot):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nh, T, hs)
        k = self.k_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        v = self.v_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if slot is not None:
            self.k_cache[:, :, slot] = k
            self.v_cache[:, :, slot] = v
            k = self.k_cache[:, :, :mask.size(-1)]                         # (1, nkv, S, hs)
            v = self.v_cache[:, :, :mask.size(-1)]
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each after a norm and added to the stream: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, slot):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, slot)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """Embedding, layers, norm and head; see forward for the shapes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.model.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        # (slots,): see cache_mask. Written by decode.forward_pass; all 0 again when a block ends.
        self.register_buffer("owner", None, persistent=False)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:  # a product then keeps the variance of its input
                nn.init.normal_(p, std=p.size(1) ** -0.5)

    @torch.inference_mode(False)  # a cache made in that mode could not be written outside of it
    def setup_cache(self, slots):
        """A cache of at least so many slots, all shared, for one answer at a time. That of the
        last answer is used again if large enough: nobody sees a slot before it is written."""
        weight = self.model.embed_tokens.weight
        if self.owner is None or len(self.owner) < slots:
            shape = (1, self.config.n_kv_head, slots, self.config.head_size)
            for layer in self.model.layers:
                layer.self_attn.k_cache = weight.new_zeros(shape)
                layer.self_attn.v_cache = weight.new_zeros(shape)
            self.owner = torch.zeros(slots, dtype=torch.int64, device=weight.device)
        self.owner.zero_()

    def forward(self, idx, position, mask, slot=None, pick=None):
        """-> logits (B, T, V). With pick (N,), indices into the B * T tokens: only theirs, (N, V).

        Without a cache: idx, position (B, T); mask (B, 1, T, T) bool, True = sees.
        With setup_cache(): B = 1; slot (T,), where keys and values are written; mask (T, S) over
        the first S slots."""
        x = self.model.embed_tokens(idx)  # (B, T, C)
        c = self.config
        cos, sin = rope(position, c.head_size, c.rope_theta, *c.rope_scaling)
        mask = torch.where(mask, 0.0, -torch.inf).to(x.dtype)
        mask = torch.cat([mask] * (c.n_head // c.n_kv_head), dim=-2)  # as attend() wants it
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask, slot)
        x = self.model.norm(x)
        if pick is not None:
            x = x.flatten(0, 1)[pick]     # (N, C)
        head = self.model.embed_tokens if self.config.tied else self.lm_head
        return linear(x, head.weight)


# ---- devices and checkpoints ------------------------------------------------

def check_device(device):
    """BadInput unless a device such as "cpu" or "cuda:1" is there."""
    with naming(f"device {device!r}"):
        torch.empty(0, device=device)


def fast_dtype(device):
    """The type that a device is fast in: "bfloat16" on a GPU and on CPUs that compute in it
    (AVX512-BF16), else "float32", since other CPUs are 2 to 100 times slower in bfloat16."""
    is_gpu = torch.device(device).type != "cpu"
    return "bfloat16" if is_gpu or torch.cpu._is_avx512_bf16_supported() else "float32"


def save_checkpoint(out_dir, **state):
    """Writes out_dir/ckpt.pt whole or not at all: a new file, which then replaces the old one. The
    folder must exist."""
    path = Path(out_dir, "ckpt.pt")
    new = path.with_name(f"ckpt-{uuid.uuid4()}.tmp")  # not another process's
    try:
        with naming(f"cannot write {new}"):
            torch.save({"format": FORMAT, **state}, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def read_checkpoint(out_dir):
    """The dict that save_checkpoint wrote; runs no code from it. BadInput when it is missing, cut
    off or of another format."""
    path = Path(out_dir, "ckpt.pt")
    check(path.exists(), f"no {path}: first run `python train.py --out-dir {out_dir}`")
    with naming(f"cannot read {path} as a checkpoint of format {FORMAT}"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        check(state["format"] == FORMAT, f"its format is {state['format']}")
    return state


def from_checkpoint(state):
    """The model of a checkpoint's dict. BadInput naming a setting or tensor that does not fit."""
    with naming("checkpoint"), torch.device("meta"):
        model = GPT(GPTConfig(**state["config"]))
        model.load_state_dict(state["model"], assign=True)
    return model
