"""The model: published Llama and Qwen2 checkpoints, what is refused in them, growing, and the cache."""
import json

import pytest
import torch
from torch.nn import functional as F

from helpers import publish, published_config, published_weights, write_safetensors
from model import GPT, GPTConfig, KVCache, from_published, linear, read_safetensors

PROMPT = [3, 17, 5, 29, 11]
# Of the last prompt token, by transformers 5.23 in float32: the first six logits, then six greedy tokens.
EXPECTED = {
    ("llama", True): ([-0.23463, -0.20602, -0.92981, -0.7933, -0.50422, -1.95875], [11, 1, 39, 16, 34, 29]),
    ("llama", False): ([1.82358, -1.92273, 1.44658, -1.54639, -0.88443, 1.02799], [26, 15, 26, 15, 26, 18]),
    ("qwen2", True): ([0.53268, 0.91771, -0.47241, 0.59898, 0.82144, 0.64327], [27, 0, 0, 0, 0, 0]),
    ("qwen2", False): ([0.72453, -2.56029, 0.16156, 0.58173, -1.25076, 1.02928], [19, 11, 14, 15, 29, 12]),
}


def forward(model, ids):
    return model(torch.tensor([ids]), torch.arange(len(ids))[None])[0]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("model_type,tied", EXPECTED)
def test_published_checkpoint_gives_the_logits_of_transformers(tmp_path, model_type, tied, shards):
    """Llama and Qwen2 (qkv bias), tied and untied, grouped-query attention, one file or several; then greedy text."""
    logits, tokens = EXPECTED[model_type, tied]
    model = from_published(publish(tmp_path / "m", published_config(model_type, tied), shards)).requires_grad_(False)
    assert torch.allclose(forward(model, PROMPT)[-1, :6], torch.tensor(logits), rtol=1e-3)
    ids = list(PROMPT)
    for _ in tokens:
        ids.append(int(forward(model, ids)[-1].argmax()))
    assert ids[len(PROMPT):] == tokens


def test_rope_theta_is_found_in_either_place(tmp_path):
    """At the top level, where older files have it, or in rope_parameters; it changes the logits, so it is not ignored."""
    config = published_config("llama", True)
    theta = config.pop("rope_theta")
    models = [from_published(publish(tmp_path / str(i), {**config, **where})).requires_grad_(False) for i, where in enumerate([
        {"rope_theta": theta}, {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}, {"rope_theta": 9 * theta}])]
    a, b, c = (forward(m, PROMPT) for m in models)
    assert torch.equal(a, b) and not torch.allclose(a, c, rtol=1e-3)


REFUSED = {
    "rope_type": dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    "type": dict(rope_scaling={"type": "linear", "factor": 2.0}),
    "rope_parameters": dict(rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}),
    "use_sliding_window": dict(use_sliding_window=True, sliding_window=32),
    "layer_types": dict(layer_types=["full_attention", "sliding_attention"]),
    "num_local_experts": dict(num_local_experts=8),
    "hidden_act": dict(hidden_act="gelu"),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "partial_rotary_factor": dict(partial_rotary_factor=0.5),
    "quantization_config": dict(quantization_config={"bits": 4}),
    "model_type": dict(model_type="mistral"),
    "hidden_size": dict(hidden_size=None),
    "num_attention_heads": dict(num_attention_heads=None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, name):
    """None here: the setting is missing. Nothing that changes the result is ignored."""
    config = published_config("llama", True) | REFUSED[name]
    folder = publish(tmp_path / "m", published_config("llama", True))
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ValueError, match=f"config.json.*{'rope' if 'type' == name or 'rope' in name else name}"):
        from_published(folder)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    harmless = dict(rope_scaling=None, use_sliding_window=False, sliding_window=4096, layer_types=["full_attention"] * 2,
                    attention_dropout=0.0, torch_dtype="float32", architectures=["Qwen2ForCausalLM"])
    from_published(publish(tmp_path / "m", published_config("qwen2", True) | harmless))


def test_folder_is_refused_with_the_place(tmp_path):
    """Not JSON, no weights, a tensor that is missing, of another shape, or that Llama and Qwen2 do not have."""
    config = published_config("llama", False)
    folder = publish(tmp_path / "m", config)
    file, weights = next(folder.glob("*.safetensors")), published_weights(config)
    norm, extra = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"
    for change, named in [({norm: None}, norm), ({norm: torch.ones(3)}, r"\[16\].*\[3\]"), ({extra: torch.ones(4)}, extra),
                          ({"lm_head.weight": None}, "lm_head.weight"),
                          ({f"model.layers.2.{p}": torch.ones(16) for p in ("input_layernorm.weight",)}, "layers.2")]:
        write_safetensors(file, {k: v for k, v in (weights | change).items() if v is not None})
        with pytest.raises(ValueError, match=named):
            from_published(folder)
    file.unlink()
    with pytest.raises(ValueError, match=str(folder)):
        from_published(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json"):
        from_published(folder)


def test_safetensors_are_read_as_written(tmp_path):
    """Scalars, empty tensors and every supported type; the file stays as it is when a tensor is changed."""
    path = tmp_path / "x.safetensors"
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0), "c": torch.ones(1)}
    write_safetensors(path, weights)
    before, tensors = path.read_bytes(), read_safetensors(path)
    assert tensors.keys() == weights.keys() and all(torch.equal(tensors[k], weights[k]) for k in weights)
    tensors["a"] += 1
    assert path.read_bytes() == before
    for name, dtype in [("F64", torch.float64), ("F16", torch.float16), ("BF16", torch.bfloat16)]:
        raw = torch.tensor([1.5, -2.0], dtype=dtype)
        head = json.dumps({"t": {"dtype": name, "shape": [2], "data_offsets": [0, 2 * dtype.itemsize]}}).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + raw.view(torch.uint8).numpy().tobytes())
        assert torch.equal(read_safetensors(path)["t"], raw)


LIES = {  # a header for 24 bytes of data, and what the message must name
    "longer than the file": ({"t": {"dtype": "F32", "shape": [7], "data_offsets": [0, 28]}}, "tensor t.*28"),
    "offsets outside": ({"t": {"dtype": "F32", "shape": [6], "data_offsets": [8, 32]}}, "tensor t.*32"),
    "negative offset": ({"t": {"dtype": "F32", "shape": [6], "data_offsets": [-8, 16]}}, "tensor t"),
    "end before begin": ({"t": {"dtype": "F32", "shape": [-2], "data_offsets": [16, 8]}}, "tensor t"),
    "fewer bytes than the shape": ({"t": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}, "tensor t"),
    "more bytes than the shape": ({"t": {"dtype": "F32", "shape": [5], "data_offsets": [0, 24]}}, "tensor t"),
    "negative shape": ({"t": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}, r"tensor t.*-2"),
    "unknown type": ({"t": {"dtype": "I4", "shape": [6], "data_offsets": [0, 24]}}, "tensor t.*I4"),
    "fractional shape": ({"t": {"dtype": "F32", "shape": [1.5, 4], "data_offsets": [0, 24]}}, "tensor t"),
    "no type": ({"t": {"shape": [6], "data_offsets": [0, 24]}}, "tensor t"),
    "no shape": ({"t": {"dtype": "F32", "data_offsets": [0, 24]}}, "tensor t"),
    "one offset": ({"t": {"dtype": "F32", "shape": [6], "data_offsets": [0]}}, "tensor t"),
    "offsets are text": ({"t": {"dtype": "F32", "shape": [6], "data_offsets": ["0", "24"]}}, "tensor t"),
    "tensor is no object": ({"t": 3}, "tensor t"),
    "header is a list": ([1, 2], "header"),
    "header is a number": (12, "header"),
}


@pytest.mark.parametrize("name", LIES)
def test_header_that_lies_is_refused_with_its_tensor(tmp_path, name):
    header, named = LIES[name]
    path = tmp_path / "lie.safetensors"
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(24))
    with pytest.raises(ValueError, match=f"lie.safetensors.*{named}"):
        read_safetensors(path)


@pytest.mark.parametrize("content", [b"", b"\x05\0\0", (2**63).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}",
                                     (9).to_bytes(8, "little") + b'{"t": {"d', (4).to_bytes(8, "little") + b"\xff\xfe{}"],
                         ids=["empty", "cut off", "huge header", "header past the end", "not JSON", "not UTF-8"])
def test_file_that_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.safetensors"):
        read_safetensors(path)


# -----------------------------------------------------------------------------

def tiny(**config):
    torch.manual_seed(0)
    settings = dict(block_size=64, vocab_size=40, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_inner=24, head_size=4)
    return GPT(GPTConfig(**settings | config)).double().requires_grad_(False)


@pytest.mark.parametrize("dtype,error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows,bias", [(128, False), (128, True), (130, True), (8192, True)])
def test_linear_is_the_same_product_in_every_form(dtype, error, rows, bias):
    """From one token to more than a decoding pass has, in one or two leading dimensions; while training, with grads."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, rows, bias=bias).to(dtype)
    for n in (1, 2, 3, 16, 17):
        x = torch.randn(n, 96, dtype=dtype)
        exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        for grad in (True, False):
            y = linear(x, layer.requires_grad_(grad))
            assert y.dtype == dtype and y.requires_grad == grad and y.shape == (n, rows)
            assert torch.allclose(y.double(), exact, atol=error, rtol=error)
        assert torch.equal(linear(x[None], layer), y[None])


@pytest.mark.parametrize("tied", [True, False])
def test_grow_starts_new_rows_at_the_mean_and_keeps_the_others(tied):
    """Tags in spare rows of the embedding (38, 39), then in new ones, 64 in all; other tokens keep their logits."""
    model = tiny(tied=tied)
    names = ["wte"] if tied else ["wte", "lm_head"]
    before, logits = {n: getattr(model, n).weight.clone() for n in names}, forward(model, PROMPT)
    model.grow(44, list(range(38, 44)))
    assert model.config.vocab_size == 64 and forward(model, PROMPT).shape == (5, 64)
    for n in names:
        weight = getattr(model, n).weight
        assert torch.equal(weight[:38], before[n][:38])
        assert torch.allclose(weight[38:44], before[n][:38].mean(0).expand(6, -1), atol=1e-7)
    after = forward(model, PROMPT)
    assert torch.allclose(after[:, :38], logits[:, :38], rtol=0, atol=1e-12), "up to the order of summation"
    assert torch.allclose(after[:, 38:44], logits[:, :38].mean(-1, keepdim=True), atol=1e-6), "the head has grown alike"
    model.grow(10, [3])
    assert model.config.vocab_size == 64, "a larger model is not shrunk"


def test_parameters_are_those_of_the_published_shape():
    """A tied head counts once; biases are those of queries, keys and values alone."""
    V, C, I, layer = 40, 16, 24, 2
    size = lambda **changes: sum(p.numel() for p in tiny(**changes).parameters())
    per_layer = 2 * C + C * (4 + 2 * 2) * 4 + C * C + 3 * C * I
    assert size(tied=True) == V * C + layer * per_layer + C
    assert size(tied=False) == 2 * V * C + layer * per_layer + C
    assert size(qkv_bias=True) - size() == layer * (4 + 2 * 2) * 4


@pytest.mark.parametrize("config", [dict(), dict(n_kv_head=4), dict(n_kv_head=1, qkv_bias=True, tied=False)], ids=str)
def test_cached_forward_equals_uncached(config):
    """A prompt at once, then a token at a time, gives the logits of the whole row; float64, 1e-10 relative."""
    model, ids = tiny(**config), [(7 * i + i * i) % 40 for i in range(24)]
    whole, cache = forward(model, ids), KVCache(model.config, 32, torch.float64, "cpu")
    for begin, end in [(0, 9)] + [(i, i + 1) for i in range(9, 24)]:
        slot = torch.arange(begin, end)
        mask = cache.mask(slot, torch.zeros_like(slot), 32)
        logits = model(torch.tensor([ids[begin:end]]), slot[None], mask, cache, slot)[0]
        assert (logits - whole[begin:end]).abs().max() <= 1e-10 * whole.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_loss_in_parts_has_the_value_and_the_gradients_of_cross_entropy(tied):
    """Where most tokens have no target and the parts differ in size, under a scale on the loss."""
    model, idx = tiny(tied=tied).float().requires_grad_(True), torch.randint(0, 16, (2, 7))
    position, pick = torch.arange(7).expand(2, 7), torch.tensor([1, 4, 8, 0, 13, 7, 2, 9, 5])
    target = torch.tensor([3, -100, 0, 15, -100, 7, 7, -100, -100])
    found = []
    for loss in (model(idx, position, pick=pick, target=target),
                 F.cross_entropy(model(idx, position, pick=pick), target, reduction="sum")):
        model.zero_grad()
        (loss / 3).backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert len(found[0]) == len(found[1]) and all(g.abs().sum() > 0 for g in found[0])
    for ours, expected in zip(*found):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_pick_gives_the_logits_of_those_tokens_alone():
    model, idx = tiny(), torch.tensor([PROMPT, PROMPT[::-1]])
    position = torch.arange(5).expand(2, 5)
    pick = torch.tensor([1, 4, 8])
    assert torch.allclose(model(idx, position, pick=pick), model(idx, position).flatten(0, 1)[pick], rtol=1e-12)
