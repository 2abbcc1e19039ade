"""
A GPT in the shape of Llama and Qwen2: RMSNorm, rotary positions, SwiGLU, grouped-query attention, optional qkv bias,
tied or untied head. Two things are unusual, and both are what ASPD needs:

  - rotary positions are given explicitly, because sibling branches share theirs;
  - the attention mask is given explicitly, because sibling branches do not see each other.

With a KVCache the same forward pass serves prefill, prefixes and decoding: keys and values are written at explicit
slots, and the mask says which slots a query sees. Nothing advances in secret.

Shapes: B batch, T tokens fed, S slots seen, C n_embd, nh n_head, nkv n_kv_head, hs head_size, V vocab_size.
"""
import json
import math
import mmap
import os
import pickle
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024      # context: positions and row tokens at most
    vocab_size: int = 50304     # rows of the embedding, tags and padding included
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12         # = n_head: multi-head attention; fewer: grouped-query attention
    n_embd: int = 768
    n_inner: int = 2048         # width of the SwiGLU layer
    head_size: int = 64
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False      # True in Qwen2
    tied: bool = True           # the head shares the embedding's weights
    positions: str = "aspd"     # position scheme of the branches: aspd, longest or stride (aspd.position_ids)
    stride: int = 256           # under "stride": distance of the branches' starts, and their longest length


class KVCache:
    """
    Keys and values of one answer, written at explicit slots. k, v: (n_layer, 1, nkv, slots, hs).
    owner[slot] is the live branch a slot belongs to, or 0 where it is shared. The last slot is for padding queries.
    """

    def __init__(self, config, slots, dtype, device):
        shape = (config.n_layer, 1, config.n_kv_head, slots + 1, config.head_size)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.owner = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.slots = slots

    def mask(self, slot, branch, seen):
        """(T, seen) bool: a query at slot t sees slot k iff k <= t and owner[k] is 0 or the query's own branch."""
        owner = self.owner[:seen]
        past = torch.arange(seen, device=owner.device) <= slot[:, None]
        return past & ((owner == 0) | (owner == branch[:, None]))


def rope(position, config, dtype):
    """cos and sin of the rotary angles. position: (B, T) -> two (B, 1, T, hs), the two halves of a head alike."""
    exponent = torch.arange(0, config.head_size, 2, device=position.device).float() / config.head_size
    angle = position[:, None, :, None].float() * config.rope_theta ** -exponent  # (B, 1, T, hs/2)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Applies rotary positions to queries or keys, (B, heads, T, hs)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.sizes = [config.n_head, config.n_kv_head, config.n_kv_head]
        self.head_size = config.head_size
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes) * config.head_size, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=False)

    def forward(self, x, cos, sin, mask, kv=None, slot=None):
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nh + 2 nkv, T, hs)
        q, k, v = qkv.split(self.sizes, dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kv is not None:
            k_cache, v_cache = kv
            k_cache[:, :, slot] = k
            v_cache[:, :, slot] = v
            seen = mask.size(-1)
            k, v = k_cache[:, :, :seen], v_cache[:, :, :seen]  # (1, nkv, S, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.sizes[0] != self.sizes[1])
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 2 * config.n_inner, bias=False)  # gate and up in one product
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *args):
        x = x + self.attn(self.ln_1(x), *args)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        for name, p in self.named_parameters():  # GPT-2's initialisation, residual projections scaled down
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def tie(self):
        """Lets the head share the embedding's weights where the config says so."""
        if self.config.tied:
            self.lm_head.weight = self.wte.weight

    def num_params(self):
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, position, mask=None, cache=None, slot=None, pick=None):
        """
        idx, position: (B, T). mask: bool, True = sees, broadcastable to (B, nh, T, S); None = plain causal.
        cache, slot (T,): write keys and values there (B = 1); the mask's last size says how many slots are read.
        pick: indices into the B * T tokens whose logits are wanted; None = all.
        Returns logits (B, T, V), or (len(pick), V).
        """
        x = self.wte(idx)
        cos, sin = rope(position, self.config, x.dtype)
        for i, block in enumerate(self.h):
            x = block(x, cos, sin, mask, cache and (cache.k[i], cache.v[i]), slot)
        if pick is not None:
            x = x.flatten(0, 1)[pick]
        return self.lm_head(self.ln_f(x))

    @torch.no_grad()
    def grow(self, vocab_size, new):
        """Gives the model at least vocab_size embedding rows and starts the rows `new` at the mean of the others."""
        rows = self.config.vocab_size
        self.config.vocab_size = max(vocab_size, rows)
        old = [i for i in range(rows) if i not in new]
        for name in ("wte",) if self.config.tied else ("wte", "lm_head"):
            module = getattr(self, name)
            mean = module.weight[old].float().mean(0).to(module.weight)
            extra = mean.expand(self.config.vocab_size - rows, -1)
            module.weight = nn.Parameter(torch.cat((module.weight, extra)))
            module.weight[new] = mean
        self.tie()


# -----------------------------------------------------------------------------
# our checkpoints: OUT_DIR/ckpt.pt, a dict of tensors and plain values

FORMAT = "aspd-1"


def save_checkpoint(out_dir, **state):
    """Writes out_dir/ckpt.pt whole or not at all: a new file first, which then replaces the old one in one step."""
    path = Path(out_dir, "ckpt.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".tmp"), "wb") as f:
        torch.save({"format": FORMAT, **state}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def read_checkpoint(out_dir):
    """The dict that save_checkpoint wrote. ValueError when it is missing, cut off or not ours; runs no code from it."""
    path = Path(out_dir, "ckpt.pt")
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}: run `python train.py --out-dir {out_dir}` first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as e:
        raise ValueError(f"{path} is cut off or not a checkpoint: {str(e).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} is not a checkpoint of this version: format {found!r}, expected {FORMAT!r}")
    return state


def from_checkpoint(state):
    """The model of a checkpoint's dict. ValueError naming the first tensor that is missing or of another shape."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**state["config"]))
    return load_weights(model, state["model"], "checkpoint")


def load_weights(model, weights, where):
    """Puts a dict of tensors in place of the model's (meta) parameters, checking names and shapes."""
    expected = {k: v.shape for k, v in model.state_dict().items() if not (model.config.tied and k == "lm_head.weight")}
    for name, shape in expected.items():
        if name not in weights or weights[name].shape != shape:
            found = list(weights[name].shape) if name in weights else "nothing"
            raise ValueError(f"{where}: tensor {name} should be {list(shape)}, found {found}")
    model.load_state_dict({k: weights[k] for k in expected}, strict=False, assign=True)
    model.tie()
    return model


# -----------------------------------------------------------------------------
# published checkpoints: a folder with config.json and .safetensors files of a Llama or Qwen2 model

def from_published(path):
    """The model in a published folder, its weights memory-mapped where they can be. ValueError for what we lack."""
    config = published_config(path)
    weights = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights.update(read_safetensors(file))
    if not weights:
        raise ValueError(f"no .safetensors file in {path}")
    with torch.device("meta"):
        model = GPT(config)
    return load_weights(model, rename(weights, config, path), path)


def published_config(path):
    """config.json -> GPTConfig. Everything that would change the result and is not implemented is refused by name."""
    try:
        c = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}/config.json is not JSON: {e}") from None
    scaling = c.get("rope_scaling") or c.get("rope_parameters") or {}
    refused = {
        "model_type": c.get("model_type") not in ("llama", "qwen2"),
        "hidden_act": c.get("hidden_act", "silu") != "silu",
        "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
        "use_sliding_window": bool(c.get("use_sliding_window")),
        "layer_types": any(t != "full_attention" for t in c.get("layer_types") or []),
        "attention_bias": bool(c.get("attention_bias")),
        "mlp_bias": bool(c.get("mlp_bias")),
        "partial_rotary_factor": scaling.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0,
        "quantization_config": "quantization_config" in c,
        "num_local_experts": "num_local_experts" in c,
    }
    for key, bad in refused.items():
        if bad:
            raise ValueError(f"{path}/config.json: {key} = {c.get(key, scaling)!r} is not supported")
    n_head = c["num_attention_heads"]
    return GPTConfig(
        block_size=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"],
        n_head=n_head, n_kv_head=c.get("num_key_value_heads") or n_head, n_embd=c["hidden_size"],
        n_inner=c["intermediate_size"], head_size=c.get("head_dim") or c["hidden_size"] // n_head,
        rope_theta=float(c.get("rope_theta") or scaling.get("rope_theta") or 10000.0), norm_eps=c["rms_norm_eps"],
        qkv_bias=c["model_type"] == "qwen2", tied=bool(c.get("tie_word_embeddings", False)))


def rename(weights, config, where):
    """Published tensor names -> ours; q, k, v and gate, up are joined into one matrix each. Unknown names raise."""
    def take(name):
        if name not in weights:
            raise ValueError(f"{where}: tensor {name} is missing")
        return weights.pop(name)

    out = {"wte.weight": take("model.embed_tokens.weight"), "ln_f.weight": take("model.norm.weight")}
    if not config.tied:
        out["lm_head.weight"] = take("lm_head.weight")
    for i in range(config.n_layer):
        theirs, ours = f"model.layers.{i}.", f"h.{i}."
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            out[f"{ours}attn.c_attn.{part}"] = torch.cat([take(f"{theirs}self_attn.{p}_proj.{part}") for p in "qkv"])
        out[f"{ours}attn.c_proj.weight"] = take(f"{theirs}self_attn.o_proj.weight")
        out[f"{ours}mlp.c_fc.weight"] = torch.cat([take(f"{theirs}mlp.{p}_proj.weight") for p in ("gate", "up")])
        out[f"{ours}mlp.c_proj.weight"] = take(f"{theirs}mlp.down_proj.weight")
        out[f"{ours}ln_1.weight"] = take(f"{theirs}input_layernorm.weight")
        out[f"{ours}ln_2.weight"] = take(f"{theirs}post_attention_layernorm.weight")
    unknown = [k for k in weights if not k.endswith("rotary_emb.inv_freq") and k != "lm_head.weight"]
    if unknown:
        raise ValueError(f"{where}: tensor {unknown[0]} is not part of a Llama or Qwen2 model")
    return out


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped: 8 bytes header length, a JSON header, raw tensors."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        start = f.read(8)
        n = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= n <= size - 8:
            raise ValueError(f"{path}: a header of {n} bytes does not fit a file of {size}")
        try:
            header = json.loads(f.read(n))
        except ValueError:
            raise ValueError(f"{path}: the header is not JSON") from None
        data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY))[8 + n:]
    tensors = {}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        if t["dtype"] not in dtypes:
            raise ValueError(f"{path}: tensor {name} has the unsupported type {t['dtype']}")
        dtype, (begin, end), count = dtypes[t["dtype"]], t["data_offsets"], math.prod(t["shape"])
        if not 0 <= begin <= end <= len(data) or end - begin != count * dtype.itemsize or min(t["shape"], default=0) < 0:
            raise ValueError(f"{path}: tensor {name} of shape {t['shape']} lies at {begin}..{end} of {len(data)} bytes")
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=begin).view(t["shape"])
    return tensors
