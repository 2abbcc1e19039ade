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
import re
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


def check_device(device):
    """ValueError unless a device such as "cpu" or "cuda:1" is there."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: CUDA is not available")


class KVCache:
    """
    Keys and values of one answer, written at explicit slots. k, v: (n_layer, 1, nkv, slots + 1, hs). owner[slot]: the live
    branch that a slot belongs to, or 0 where it is shared. The last slot takes what padding queries write.
    """

    def __init__(self, config, slots, dtype, device):
        shape = (2, config.n_layer, 1, config.n_kv_head, slots + 1, config.head_size)
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.owner, self.slots = torch.zeros(slots + 1, dtype=torch.int64, device=device), slots

    def mask(self, slot, branch, seen):
        """(T, seen) bool: a query at slot t sees slot k iff k <= t and owner[k] is 0 or the query's own branch."""
        owner = self.owner[:seen]
        past = torch.arange(seen, device=owner.device) <= slot[:, None]
        return past & ((owner == 0) | (owner == branch[:, None]))


def rope(position, config, dtype):
    """cos and sin of the rotary angles, position (B, T) -> two (B, 1, T, hs), where both halves of a head are alike."""
    exponent = torch.arange(0, config.head_size, 2, device=position.device).float() / config.head_size
    angle = position[:, None, :, None].float() * config.rope_theta ** -exponent  # (B, 1, T, hs/2)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


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
        qk, v = qkv.split([self.sizes[0] + self.sizes[1], self.sizes[2]], dim=1)
        x1, x2 = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat((-x2, x1), dim=-1) * sin  # rotary positions
        q, k = qk.split(self.sizes[:2], dim=1)
        if kv is not None:
            k_cache, v_cache = kv
            k_cache[:, :, slot] = k
            v_cache[:, :, slot] = v
            seen = mask.size(-1)
            k, v = k_cache[:, :, :seen], v_cache[:, :, :seen]  # (1, nkv, S, hs)
            q = q.reshape(B, k.size(1), -1, self.head_size)    # (1, nkv, nh/nkv T, hs): each key is read once for its group
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=q.size(1) != k.size(1))
        return self.c_proj(y.reshape(B, -1, T, self.head_size).transpose(1, 2).reshape(B, T, -1))


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
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():  # GPT-2's initialisation, residual projections scaled down
            if name.endswith("weight") and p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def num_params(self):
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, position, mask=None, cache=None, slot=None, pick=None):
        """
        idx, position: (B, T). mask: bool, True = sees, broadcastable to (B, nh, T, S); None = plain causal.
        cache, slot (T,): write keys and values there (B = 1); the mask's last size says how many slots are read.
        pick: indices of the B * T tokens whose logits are wanted. Returns logits (len(pick), V); without pick (B, T, V).
        """
        x = self.wte(idx)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        cos, sin = rope(position, self.config, dtype)
        if mask is not None:  # additive, once for all layers
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
        if cache is not None:  # decoding folds the heads of a key group into the queries
            mask = mask.repeat(self.config.n_head // self.config.n_kv_head, 1)  # (nh/nkv T, S)
        for i, block in enumerate(self.h):
            x = block(x, cos, sin, mask, cache and (cache.k[i], cache.v[i]), slot)
        x = x if pick is None else x.flatten(0, 1)[pick]
        return F.linear(self.ln_f(x), (self.lm_head or self.wte).weight)

    @torch.no_grad()
    def grow(self, vocab_size, new):
        """Gives the model at least vocab_size embedding rows and starts the rows `new` at the mean of the others."""
        rows, self.config.vocab_size = self.config.vocab_size, max(vocab_size, self.config.vocab_size)
        for module in filter(None, (self.wte, self.lm_head)):
            old = module.weight[[i for i in range(rows) if i not in new]]
            module.weight = nn.Parameter(F.pad(module.weight, (0, 0, 0, self.config.vocab_size - rows)))
            module.weight[new] = old.float().mean(0).to(old.dtype)


def build(config, weights, where, parts_of=lambda name: [name]):
    """
    A GPT with a dict of tensors for weights. parts_of: our name of a tensor -> the names of those that, joined, make it.
    ValueError naming the first that is missing, has another shape or is not part of the model.
    """
    with torch.device("meta"):
        model = GPT(config)
    state, left = {}, set(weights)
    for name, empty in model.state_dict().items():
        parts = parts_of(name)
        for part in parts:
            if not isinstance(weights.get(part), torch.Tensor):
                raise ValueError(f"{where}: the tensor {part} is missing")
        state[name] = torch.cat([weights[part] for part in parts]) if len(parts) > 1 else weights[parts[0]]
        if state[name].shape != empty.shape:
            raise ValueError(f"{where}: {' + '.join(parts)} should be {list(empty.shape)}, is {list(state[name].shape)}")
        left -= set(parts)
    if left:
        raise ValueError(f"{where}: the tensor {min(left)} is not part of such a model")
    model.load_state_dict(state, assign=True)
    return model


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
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as e:
        raise ValueError(f"{path} is cut off or not a checkpoint: {(str(e) or repr(e)).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version, {FORMAT}")
    return state


def from_checkpoint(state, where="checkpoint"):
    """The model of a checkpoint's dict."""
    try:
        return build(GPTConfig(**state["config"]), state["model"], where)
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{where} is not a checkpoint of this version: {e!r}") from None


# -----------------------------------------------------------------------------
# published checkpoints: a folder with config.json and .safetensors files of a Llama or Qwen2 model

PUBLISHED_NAMES = {
    "wte": ["model.embed_tokens"], "ln_f": ["model.norm"], "lm_head": ["lm_head"],
    "ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"],
}


def published_names(name):
    """h.3.mlp.c_fc.weight -> model.layers.3.mlp.gate_proj.weight, model.layers.3.mlp.up_proj.weight"""
    layer, module, kind = re.fullmatch(r"(h\.\d+\.)?(.*)\.(\w+)", name).groups(default="")
    return [f"{layer.replace('h.', 'model.layers.')}{part}.{kind}" for part in PUBLISHED_NAMES[module]]


def from_published(path):
    """The model in a published folder, its weights memory-mapped where they can be. ValueError for what is not built."""
    config, weights = published_config(path), {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights.update(read_safetensors(file))
    if config.tied:
        weights.pop("lm_head.weight", None)
    weights = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}  # in old files
    return build(config, weights, path, published_names)


SUPPORTED = {  # config.json settings that change the result, and the values that are implemented (None: not set)
    "model_type": ("llama", "qwen2"), "hidden_act": ("silu",), "rope_type": (None, "default"), "attention_bias": (None, False),
    "mlp_bias": (None, False), "use_sliding_window": (None, False), "layer_types": (None, ["full_attention"]),
    "partial_rotary_factor": (None, 1.0), "quantization_config": (None,), "num_local_experts": (None,),
}


def published_config(path):
    """config.json -> GPTConfig. Everything that would change the result and is not implemented is refused by name."""
    try:
        c = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        return to_config(c, path)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}/config.json: not understood: {e!r}") from None


def to_config(c, path):
    """The dict in config.json -> GPTConfig."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}  # older and newer configs differ
    found = {**c, "rope_type": rope.get("type"), **rope, "layer_types": sorted(set(c.get("layer_types") or [])) or None}
    for key, values in SUPPORTED.items():
        if found.get(key) not in values:
            raise ValueError(f"{path}/config.json: {key} = {found.get(key)!r} is not supported")
    n_head = c["num_attention_heads"]
    return GPTConfig(
        block_size=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"],
        n_head=n_head, n_kv_head=c.get("num_key_value_heads") or n_head, n_embd=c["hidden_size"],
        n_inner=c["intermediate_size"], head_size=c.get("head_dim") or c["hidden_size"] // n_head,
        rope_theta=float(found.get("rope_theta") or 10000), norm_eps=c["rms_norm_eps"],
        qkv_bias=c["model_type"] == "qwen2", tied=bool(c.get("tie_word_embeddings")))


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped: 8 bytes header length, a JSON header, raw tensors."""
    with open(path, "rb") as f:
        size, start = os.fstat(f.fileno()).st_size, f.read(8)
        n = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= n <= size - 8:
            raise ValueError(f"{path}: a header of {n} bytes does not fit a file of {size}")
        header = f.read(n)
        data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY))[8 + n:]
    tensors, name = {}, "(header)"
    try:
        for name, t in json.loads(header).items():
            if name == "__metadata__":
                continue
            dtype, (begin, end), shape = DTYPES[t["dtype"]], t["data_offsets"], t["shape"]
            count = math.prod(shape)
            if min(shape, default=0) < 0 or not 0 <= begin <= end <= len(data) or end - begin != count * dtype.itemsize:
                raise ValueError(f"shape {shape} cannot lie at {begin}..{end} of {len(data)} bytes")
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=begin).view(shape) if count \
                else torch.empty(shape, dtype=dtype)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: tensor {name}: {e!r}") from None
    return tensors
