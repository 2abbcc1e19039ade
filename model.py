"""A GPT in the shape of Llama and Qwen2: RMSNorm, rotary positions, SwiGLU, grouped-query attention, optional qkv bias,
tied or untied head. Positions and mask are given explicitly, because sibling branches share their positions and do not
see each other. With a KVCache the same forward pass serves prefill, prefixes and decoding: keys and values are written
at explicit slots, and the mask says which slots a query sees. Nothing advances in secret.
Shapes: B batch, T tokens fed, S slots seen, C n_embd, nh n_head, nkv n_kv_head, hs head_size, V vocab_size."""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from aspd import IGNORE, check

FORMAT = "aspd-1"  # of our checkpoints: OUT_DIR/ckpt.pt, a dict of tensors and plain values

@dataclass
class GPTConfig:
    """The shape of a model; the defaults have about the size of GPT-2."""
    block_size: int = 1024      # context: positions and row tokens at most
    vocab_size: int = 50304     # rows of the embedding, tags and padding included
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12         # = n_head: multi-head attention; fewer: grouped-query attention
    n_embd: int = 768
    n_inner: int = 2048         # width of the SwiGLU layer
    head_size: int = 64
    rope_theta: float = 500000.0  # large, as in Llama 3: what a token is counts more than how far away it is
    norm_eps: float = 1e-5
    qkv_bias: bool = False      # True in Qwen2
    tied: bool = True           # the head shares the embedding's weights
    positions: str = "aspd"     # position scheme of the branches: aspd, longest or stride (aspd.branch_positions)
    stride: int = 256           # under "stride": distance of the branches' starts, and their longest length

def check_device(device):
    """ValueError unless a device such as "cpu" or "cuda:1" is there."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as e:  # the first where torch was built without CUDA
        raise ValueError(f"device {device!r}: {e}") from None

def fast_dtype(device):
    """"bfloat16" on a GPU and on CPUs with AVX-512, else "float32": others are a hundred times slower in bfloat16."""
    slow = torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return "float32" if slow else "bfloat16"

class KVCache:
    """Keys and values of one answer. One slot more than asked for takes what padding queries write."""
    def __init__(self, config, slots, dtype, device):
        # a tensor a layer: torch.compile writes into that in place, but would copy all of a tensor that layers share
        shape, self.slots = (1, config.n_kv_head, slots + 1, config.head_size), slots
        self.k, self.v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)] for _ in "kv")
        self.owner = torch.zeros(slots + 1, dtype=torch.int64, device=device)  # a slot's live branch; 0: shared

    def mask(self, slot, branch, seen):
        """(T, seen) bool: a query at slot t sees slot k iff k <= t and owner[k] is 0 or the query's own branch."""
        owner = self.owner[:seen]
        return (torch.arange(seen, device=owner.device) <= slot[:, None]) & ((owner == 0) | (owner == branch[:, None]))

def linear(x, layer):
    """x (..., C) through a Linear or a tied Embedding; for few tokens on a CPU so that weights are read only once."""
    weight, bias, n = layer.weight, getattr(layer, "bias", None), x.numel() // x.size(-1)
    few = n <= 16 and x.device.type == "cpu" and not (weight.requires_grad or torch.compiler.is_compiling())
    if few and weight.dtype == torch.bfloat16:  # packs the right operand anew: let it be the tokens, two at least
        y = (weight @ x.reshape(n, -1).expand(max(n, 2), -1).t())[:, :n].t()
    elif few and n > 3 and len(weight) % 64 == 0 and weight.numel() > 2**19:
        parts = weight.view(-1, 64, weight.size(1)).transpose(1, 2)  # 64 rows stay in a core's cache
        y = (x.reshape(n, -1).expand(len(parts), -1, -1) @ parts).transpose(0, 1)
    else:
        return F.linear(x, weight, bias)
    return y.reshape(*x.shape[:-1], -1) + (0 if bias is None else bias)

def grouped_attention(q, k, v, mask):
    """q (B, nh, T, hs); mask: additive, (..., nh/nkv T, S), since the heads of a key group are folded into the queries,
    so that the group reads each of the first S keys once."""
    S, grouped = mask.size(-1), q.reshape(*k.shape[:2], -1, k.size(-1))
    y = F.scaled_dot_product_attention(grouped, k[:, :, :S], v[:, :, :S], mask)
    return y.reshape(q.shape)

class Block(nn.Module):
    """A layer: attention, then a SwiGLU layer, each behind its norm."""
    def __init__(self, config):
        super().__init__()
        C, I, hs = config.n_embd, config.n_inner, config.head_size
        self.sizes, self.head_size = [config.n_head, config.n_kv_head, config.n_kv_head], hs
        self.ln_1 = nn.RMSNorm(C, eps=config.norm_eps)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, sum(self.sizes) * hs, bias=config.qkv_bias),
                                   "c_proj": nn.Linear(config.n_head * hs, C, bias=False)})
        self.ln_2 = nn.RMSNorm(C, eps=config.norm_eps)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 2 * I, bias=False), "c_proj": nn.Linear(I, C, bias=False)})

    def forward(self, x, cos, sin, masks, kv=None, slot=None):
        B, T, hs = *x.shape[:2], self.head_size
        qkv = linear(self.ln_1(x), self.attn.c_attn).view(B, T, -1, hs).transpose(1, 2)  # (B, nh + 2 nkv, T, hs)
        qk, v = qkv.split([self.sizes[0] + self.sizes[1], self.sizes[2]], dim=1)
        x1, x2 = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat((-x2, x1), dim=-1) * sin  # rotary positions
        q, k = qk.split(self.sizes[:2], dim=1)
        if kv is not None:
            kv[0][:, :, slot], kv[1][:, :, slot] = k, v
            k, v = kv
        if masks is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = torch.cat([grouped_attention(q[:, :, rows], k, v, mask) for rows, mask in masks], dim=2)
        x = x + linear(y.transpose(1, 2).reshape(B, T, -1), self.attn.c_proj)
        gate, up = linear(self.ln_2(x), self.mlp.c_fc).chunk(2, dim=-1)  # both from one product
        return x + linear(F.silu(gate) * up, self.mlp.c_proj)

class HeadLoss(torch.autograd.Function):
    """Head and summed cross-entropy in one: x (N, C), weight (V, C), target (N,) ids or IGNORE. Finds the gradients on
    the way, a quarter of the tokens at a time and in place: the logits of all would take most of the memory."""
    @staticmethod
    def forward(ctx, x, weight, target):
        w, dx, dw, loss = weight.to(x.dtype), [], torch.zeros_like(weight), 0
        for part, t in zip(x.chunk(4), target.chunk(4)):
            logp = (part @ w.t()).float().log_softmax(-1)
            loss = loss + F.nll_loss(logp, t, ignore_index=IGNORE, reduction="sum")
            logp.exp_()[torch.arange(len(t), device=t.device), t.clamp(min=0)] -= 1  # is the gradient now
            dlogits = logp.mul_((t != IGNORE)[:, None]).to(w.dtype)
            dx.append(dlogits @ w)
            dw += dlogits.t() @ part
        ctx.save_for_backward(torch.cat(dx), dw)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *(grad * d for d in ctx.saved_tensors), None

class GPT(nn.Module):
    """Embedding, layers, norm and head; see forward for the shapes."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # unit variance stays unit variance, but what adds to the residual stream starts small;
                # wte is five times GPT-2's: a small model must tell tokens apart before its layers do anything
                scale = (2 * config.n_layer) ** -0.5 if "c_proj" in name else 1
                nn.init.normal_(p, std=0.1 if "wte" in name else p.size(1) ** -0.5 * scale)

    def forward(self, idx, position, mask=None, cache=None, slot=None, pick=None, target=None):
        """idx, position: (B, T). mask: bool, True = sees, broadcastable to (B, 1, T, S); None = plain causal; without a
        cache no token sees a later one. cache, slot (T,): write keys and values there, read as many slots as the mask
        (T, S) is wide; B = 1. pick: flat indices of the tokens whose logits are wanted. Returns logits (len(pick), V);
        without pick (B, T, V); with the picked tokens' target (len(pick),) their summed cross-entropy instead."""
        config, x = self.config, self.wte(idx)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        frequency = config.rope_theta ** -(torch.arange(0, config.head_size, 2, device=x.device) / config.head_size)
        angle = position[:, None, :, None] * frequency.repeat(2)  # (B, 1, T, hs), both halves of a head alike
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        masks, T, groups = None, idx.size(1), config.n_head // config.n_kv_head
        if mask is not None:  # additive, once for all layers; without a cache in four parts, that skip later keys
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
            cuts = [0, T] if cache else [*(i * T // 64 * 16 for i in range(4)), T]
            masks = [(slice(a, b), torch.cat([mask[..., a:b, :None if cache else b]] * groups, dim=-2))
                     for a, b in zip(cuts, cuts[1:]) if a < b]
        for i, block in enumerate(self.h):
            x = block(x, cos, sin, masks, cache and (cache.k[i], cache.v[i]), slot)
        x, head = self.ln_f(x if pick is None else x.flatten(0, 1)[pick]), self.lm_head or self.wte
        return linear(x, head) if target is None else HeadLoss.apply(x.to(dtype), head.weight, target)

    @torch.no_grad()
    def grow(self, vocab_size, new):
        """Gives the model at least vocab_size embedding rows and starts the rows `new` at the mean of the others."""
        rows = self.config.vocab_size
        self.config.vocab_size = rows if rows >= vocab_size else -(-vocab_size // 64) * 64  # round: fast
        for module in filter(None, (self.wte, self.lm_head)):
            old = module.weight[[i for i in range(rows) if i not in new]]
            module.weight = nn.Parameter(F.pad(module.weight, (0, 0, 0, self.config.vocab_size - rows)))
            module.weight[new] = old.float().mean(0).to(old.dtype)

def save_checkpoint(out_dir, **state):
    """Writes out_dir/ckpt.pt whole or not at all: a new file first, which then replaces the old one in one step."""
    path = Path(out_dir, "ckpt.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"format": FORMAT, **state}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)

def read_checkpoint(out_dir):
    """The dict that save_checkpoint wrote. ValueError when it is missing, cut off or not ours; runs no code from it."""
    path = Path(out_dir, "ckpt.pt")
    check(path.exists(), f"no checkpoint at {path}: run `python train.py --out-dir {out_dir}` first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check(state["format"] == FORMAT, f"its format is {state['format']}")
        return state
    except Exception as e:  # torch.load raises many kinds
        raise ValueError(f"{path} is cut off or not a checkpoint of this version, {FORMAT}: {e!r:.200}") from None

def from_checkpoint(state, where="checkpoint"):
    """The model of a checkpoint's dict. ValueError naming a setting or a tensor that is not ours."""
    unknown = state["config"].keys() - vars(GPTConfig())
    check(not unknown, f"{where} is not a checkpoint of this version: unknown settings {unknown}")
    return build(GPTConfig(**state["config"]), state["model"], where)

PUBLISHED_NAMES = {  # our modules, and those of published Llama and Qwen2 checkpoints that, joined, make them
    "wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head", "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm", "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.gate_proj mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
SUPPORTED = {  # config.json settings that change the result, and the values that are implemented (None: not set)
    "model_type": ("llama", "qwen2"), "hidden_act": ("silu",), "num_local_experts": (None,), "mlp_bias": (None, False),
    "rope_type": (None, "default"), "partial_rotary_factor": (None, 1.0), "layer_types": (None, ["full_attention"]),
    "attention_bias": (None, False), "use_sliding_window": (None, False), "quantization_config": (None,)}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def build(config, weights, where, published=False):
    """A GPT with a dict of tensors for weights. ValueError naming a tensor that is missing, misshapen or unknown."""
    with torch.device("meta"):
        model = GPT(config)
    state, left = {}, dict(weights)
    for name, empty in model.state_dict().items():
        names = [name]
        if published:  # h.3.mlp.c_fc.weight -> model.layers.3.mlp.gate_proj.weight, model.layers.3.mlp.up_proj.weight
            ours = next(module for module in PUBLISHED_NAMES if module in name)
            names = [name.replace(ours, part).replace("h.", "model.layers.") for part in PUBLISHED_NAMES[ours].split()]
        for part in names:
            check(isinstance(left.get(part), torch.Tensor), f"{where}: the tensor {part} is missing")
        parts = [left.pop(part) for part in names]
        state[name] = w = torch.cat(parts) if len(parts) > 1 else parts[0]
        check(w.shape == empty.shape, f"{where}: {' + '.join(names)} should be {[*empty.shape]}, is {[*w.shape]}")
    check(not left, f"{where}: the tensor {min(left, default='')} is not part of such a model")
    model.load_state_dict(state, assign=True)
    return model

def read_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped: 8 bytes header length, a JSON header, raw tensors."""
    tensors, where = {}, "header"
    try:
        data = np.memmap(path, np.uint8, mode="c")  # changes stay in memory
        n = int.from_bytes(data[:8].tobytes(), "little")
        check(n <= len(data) - 8, f"{n} bytes do not fit a file of {len(data)}")
        header, data = json.loads(data[8:8 + n].tobytes()), data[8 + n:]
        header.pop("__metadata__", None)
        for name, t in header.items():
            where = f"tensor {name} = {t}"
            dtype, (begin, end) = DTYPES[t["dtype"]], t["data_offsets"]
            raw = torch.from_numpy(data[begin:end].view(f"i{dtype.itemsize}"))
            tensors[name] = raw.view(dtype).view(t["shape"])  # fails where the size is another
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: {where}: {e!r}") from None
    return tensors

def from_published(path):
    """The model in a published folder. ValueError, by name, for all that would change the result and is not built."""
    try:
        c = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        rope = c.get("rope_scaling") or c.get("rope_parameters") or {}  # older and newer configs differ
        c = c | {"rope_type": rope.get("type"), **rope, "layer_types": sorted(set(c.get("layer_types") or [])) or None}
        for key, values in SUPPORTED.items():
            check(c.get(key) in values, f"{path}/config.json: {key} = {c.get(key)!r} is not supported")
        n_head, n_embd, tied = c["num_attention_heads"], c["hidden_size"], bool(c.get("tie_word_embeddings"))
        config = GPTConfig(
            block_size=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"],
            n_head=n_head, n_kv_head=c.get("num_key_value_heads") or n_head, n_embd=n_embd, norm_eps=c["rms_norm_eps"],
            head_size=c.get("head_dim") or n_embd // n_head, rope_theta=float(c.get("rope_theta") or 10000),
            n_inner=c["intermediate_size"], qkv_bias=c["model_type"] == "qwen2", tied=tied)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}/config.json: not understood: {e!r}") from None
    unused = ("rotary_emb.inv_freq",) + ("lm_head.weight",) * tied  # in old files; a copy of the embedding
    files = sorted(Path(path).glob("*.safetensors"))
    weights = {name: w for file in files for name, w in read_safetensors(file).items() if not name.endswith(unused)}
    return build(config, weights, path, published=True)
