"""A GPT in the shape of Llama and Qwen2, with modules named as in their published folders.

RMSNorm, rotary positions, SwiGLU, grouped-query attention, optional biases, tied or untied head.
Two things are unusual. Positions and mask are given explicitly, because sibling branches share
their positions and do not see each other. And the KV cache is written at slots that the caller
names: one forward pass serves prefill, prefixes and parallel steps; no counter hides in here.

Shapes: B batch, T tokens fed, S slots seen, C n_embd, nh n_head, nkv n_kv_head, hs head_size,
V vocab_size.
"""
import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

from aspd import MAX_BRANCHES, check, naming

ONEDNN = torch.backends.mkldnn.is_available()
FORMAT = "aspd-2"  # of our checkpoints: OUT_DIR/ckpt.pt, a dict of tensors and plain values


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
    norm_eps: float = 1e-5
    qkv_bias: bool = False        # True in Qwen2
    tied: bool = True             # the head shares the embedding's weights
    positions: str = "aspd"       # not used here: the numbering of rows, one of aspd.POSITIONS


def rope(position, head_size, theta):
    """Rotary positions: (B, T) -> cosines and sines, (B, 1, T, hs) each, float32."""
    channel = torch.arange(0, head_size, 2, device=position.device)
    frequency = theta ** -(channel / head_size)          # (hs/2,)
    angle = position[:, None, :, None] * frequency       # (B, 1, T, hs/2)
    angle = torch.cat((angle, angle), dim=-1)            # both halves of a head turn alike
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns queries or keys, (B, heads, T, hs), by their positions, in their own type."""
    x1, x2 = x.chunk(2, dim=-1)
    turned = torch.cat((-x2, x1), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def attend(q, k, v, mask):
    """Attention: q (B, nh, T, hs), k and v (B, nkv, S, hs), an additive mask ((nh/nkv) * T, S) or
    (B, 1, (nh/nkv) * T, S), made in GPT.forward -> (B, nh, T, hs)."""
    # The nh/nkv heads that share keys become one head with more queries, for two reasons: every key
    # is read once, and torch's masked kernels for CUDA know no groups.
    folded = q.reshape(*k.shape[:2], -1, q.size(-1))  # (B, nkv, (nh/nkv) * T, hs)
    is_step = q.size(2) <= MAX_BRANCHES  # of decoding: a token of each branch
    trains_in_bfloat16 = q.requires_grad and q.is_cpu and q.dtype == torch.bfloat16
    if is_step or trains_in_bfloat16:
        # Plain products are faster than torch's kernel for few tokens on a GPU, and no slower on a
        # CPU. They are also faster for training in bfloat16 on a CPU. For a long prompt they take
        # more time and more memory.
        scale = q.size(-1) ** -0.5
        scores = folded @ k.transpose(-1, -2)                      # (B, nkv, (nh/nkv) * T, S)
        scores = torch.add(mask.to(q.dtype), scores, alpha=scale)  # mask + scale * scores
        y = scores.softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(folded, k, v, mask)
    return y.reshape(q.shape)


def linear(x, weight, bias=None):
    """F.linear; but float32 decoding on a CPU calls oneDNN's product itself, as F.linear does in
    bfloat16 only: it is a third faster on few tokens."""
    decoding = not weight.requires_grad and not torch.compiler.is_compiling()  # decode.LM freezes
    if decoding and weight.is_cpu and x.dtype == weight.dtype == torch.float32 and ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # no activation
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by way of linear(): (..., in) -> (..., out)."""
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention: x (B, T, C) -> (B, T, C). cos, sin: of rope(); mask: of attend();
    slot: of GPT.forward."""
    def __init__(self, config):
        super().__init__()
        C, hs, bias = config.n_embd, config.head_size, config.qkv_bias
        self.head_size = hs
        self.q_proj = Linear(C, config.n_head * hs, bias=bias)
        self.k_proj = Linear(C, config.n_kv_head * hs, bias=bias)
        self.v_proj = Linear(C, config.n_kv_head * hs, bias=bias)
        self.o_proj = Linear(config.n_head * hs, C, bias=False)
        # Keys and values of one answer, (1, nkv, slots, hs); a compiled step writes in place.
        self.register_buffer("k_cache", None, persistent=False)
        self.register_buffer("v_cache", None, persistent=False)

    def forward(self, x, cos, sin, mask, slot):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nh, T, hs)
        k = self.k_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        v = self.v_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
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
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = p.size(1) ** -0.5  # keeps the variance of the input
                if "embed_tokens" in name:
                    std = 0.1  # five times GPT-2's: the small model of train.py learns faster
                elif "o_proj" in name or "down_proj" in name:
                    std *= (2 * config.n_layer) ** -0.5  # what adds to the stream starts small
                nn.init.normal_(p, std=std)

    def setup_cache(self, slots):
        """A cache of at least so many slots, all shared, for one answer at a time. A larger one
        stays: nobody sees the slots behind the last token."""
        weight = self.model.embed_tokens.weight
        if self.owner is None or len(self.owner) < slots:
            shape = (1, self.config.n_kv_head, slots, self.config.head_size)
            for layer in self.model.layers:
                layer.self_attn.k_cache = weight.new_zeros(shape)
                layer.self_attn.v_cache = weight.new_zeros(shape)
            self.owner = torch.zeros(slots, dtype=torch.int64, device=weight.device)
        self.owner.zero_()

    def forward(self, idx, position, mask=None, slot=None, pick=None):
        """idx, position: (B, T). mask: bool, True = sees, (B, 1, T, T); None = causal. With a cache
        B = 1; slot (T,): where keys and values are written; mask (T, S): over its first S slots.
        -> logits (B, T, V) or, of the tokens with the flat indices pick, (N, V)."""
        x = self.model.embed_tokens(idx)  # (B, T, C)
        cos, sin = rope(position, self.config.head_size, self.config.rope_theta)
        if mask is None:
            mask = torch.ones(idx.size(1), idx.size(1), dtype=torch.bool, device=x.device).tril()
        # As attend() wants it, once for all layers.
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
        groups = self.config.n_head // self.config.n_kv_head
        mask = torch.cat([mask] * groups, dim=-2)  # row g * T + t: token t, head g of a group
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask, slot)
        x = self.model.norm(x)
        if pick is not None:
            x = x.flatten(0, 1)[pick]     # (N, C)
        head = self.model.embed_tokens if self.config.tied else self.lm_head
        return linear(x, head.weight)

    @torch.no_grad()
    def grow(self, vocab_size, means):
        """Gives embedding and head at least vocab_size rows. means: {new id: the ids whose mean its
        rows start as}."""
        rows = self.config.vocab_size
        if vocab_size > rows:
            self.config.vocab_size = -(-vocab_size // 64) * 64  # a round number is faster
        embedding = self.model.embed_tokens
        for table in [embedding] if self.config.tied else [embedding, self.lm_head]:
            weight = F.pad(table.weight, (0, 0, 0, self.config.vocab_size - rows))
            for new, old in means.items():
                weight[new] = weight[old].mean(0)
            table.weight = nn.Parameter(weight)


# ---- devices and checkpoints ------------------------------------------------

def check_device(device):
    """ValueError unless a device such as "cpu" or "cuda:1" is there."""
    with naming(f"device {device!r}"):
        torch.empty(0, device=device)


def fast_dtype(device):
    """The type to train in: "bfloat16" on a GPU and on CPUs with AVX-512, else "float32", since
    other CPUs are a hundred times slower in bfloat16."""
    if torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "float32"
    return "bfloat16"


def save_checkpoint(out_dir, **state):
    """Writes out_dir/ckpt.pt whole or not at all: a new file, which then replaces the old one."""
    path = Path(out_dir, "ckpt.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"format": FORMAT, **state}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def read_checkpoint(out_dir):
    """The dict that save_checkpoint wrote; runs no code from it. ValueError when it is missing, cut
    off or of another format."""
    path = Path(out_dir, "ckpt.pt")
    check(path.exists(), f"no {path}: first run `python train.py --out-dir {out_dir}`")
    with naming(f"{path} is cut off or not of format {FORMAT}"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check(state["format"] == FORMAT, f"its format is {state['format']}")
    return state


def from_checkpoint(state, where="checkpoint"):
    """The model of a checkpoint's dict. ValueError naming a setting or tensor that does not fit."""
    with naming(where), torch.device("meta"):
        model = GPT(GPTConfig(**state["config"]))
        model.load_state_dict(state["model"], assign=True)
    return model


# ---- published folders ------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SUPPORTED = {  # settings that change the result: the values that are implemented (None: not set)
    "model_type": ("llama", "qwen2"), "auto_map": (None,), "hidden_act": ("silu",),
    "attention_bias": (None, False), "mlp_bias": (None, False), "num_local_experts": (None,),
    "use_sliding_window": (None, False), "quantization_config": (None,),
    # Of rotary positions: their scaling, by its older and newer name; settings by kind of layer.
    "type": (None, "default"), "rope_type": (None, "default"), "full_attention": (None,),
    "partial_rotary_factor": (None, 1.0),
}


def from_published(path):
    """The model of a published Llama or Qwen2 folder. ValueError, by name, for what would change
    the result and is not implemented, and for tensors that are missing, unknown or misshapen."""
    where = Path(path, "config.json")
    with naming(where), torch.device("meta"):
        model = GPT(published_config(read_json(where)))
    with naming(path):
        weights = read_weights(path)
        if model.config.tied:
            weights.pop("lm_head.weight", None)  # a copy of the embedding
        model.load_state_dict(weights, assign=True)
    return model


def published_config(settings):
    """What a config.json holds -> GPTConfig. By the age of the file, the settings of rotary
    positions stand at the top, in rope_scaling or in rope_parameters."""
    c = {}
    for part in (settings, settings.get("rope_scaling"), settings.get("rope_parameters")):
        c |= {name: value for name, value in (part or {}).items() if value is not None}
        for name, values in SUPPORTED.items():
            # checked after each part, for the next may hide a value
            check(c.get(name) in values, f"{name} = {c.get(name)!r} is not supported")
    layers = set(c.get("layer_types", []))
    check(layers <= {"full_attention"}, f"layer_types = {layers} is not supported")
    n_head = c["num_attention_heads"]
    return GPTConfig(
        block_size=int(c["max_position_embeddings"]), vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"], n_embd=c["hidden_size"], n_inner=c["intermediate_size"],
        n_head=n_head, n_kv_head=c.get("num_key_value_heads", n_head),
        head_size=c.get("head_dim", c["hidden_size"] // n_head),
        rope_theta=float(c.get("rope_theta", 10000)), norm_eps=float(c["rms_norm_eps"]),
        qkv_bias=c["model_type"] == "qwen2", tied=c.get("tie_word_embeddings", False))


def read_weights(path):
    """{name: tensor} of a folder: of the files in its index or, without one, of *.safetensors."""
    index = Path(path, "model.safetensors.index.json")
    files = sorted(Path(path).glob("*.safetensors"))
    if index.exists():
        files = [Path(path, name) for name in {*read_json(index)["weight_map"].values()}]
    check(files, f"{path}: no *.safetensors in it")
    weights = {}
    for file in files:
        for name, tensor in read_safetensors(file).items():
            check(name not in weights, f"{file}: the tensor {name} is in another file, too")
            if not name.endswith("rotary_emb.inv_freq"):  # in old files, and not needed
                weights[name] = tensor
    return weights


def read_safetensors(path):
    """{name: tensor} of a file: 8 bytes header length, a JSON header, raw tensors. It is mapped,
    copy on write. ValueError naming the tensor whose entry does not fit."""
    data = map_file(path)
    with naming(f"{path}: header"):
        start = 8 + int.from_bytes(data[:8], "little")
        check(start <= len(data), f"ends at byte {start} of {len(data)}")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        with naming(f"{path}: tensor {name} = {entry}"):
            begin, end = entry["data_offsets"]
            raw = memoryview(data)[start:][begin:end]
            tensors[name] = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def read_json(path):
    """A JSON file -> object. ValueError naming it where it is missing or not JSON."""
    with naming(path):
        return json.loads(map_file(path)[:])


def map_file(path):
    """A file's bytes, mapped. ValueError where it is missing, empty, or a mere Git LFS pointer."""
    with naming(path), open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    check(data[:8] != b"version ", f"{path} is a Git LFS pointer: run `git lfs pull` there")
    return data
