"""What several tests share: a tokenizer over bytes, random segments, command lines, checkpoints and answers to train on."""
import json
import math
import random
import sys
from dataclasses import asdict

import pytest
import torch

from aspd import Branch, tokenize
from data import PATTERN, Tokenizer, cli
from model import GPT, GPTConfig, save_checkpoint

TOKENIZER = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, eos=256).add_tags()
ALPHABET = ["a", "b ", "7", "\n", " \n\n", "é", "漢字", "\U0001f600", "e\u0301", "\x00", "{prompt}", "<|branch|>",
            "<|/title|>", "<|im_end|>", "<|endoftext|>"]


def random_text(rng, pieces=8, alphabet=ALPHABET):
    return "".join(rng.choices(alphabet, k=pieces))


def random_segments(rng, blocks=2, branches=8, long=60):
    """Text segments with serial text around the blocks; the second branch of each block is far longer than the others."""
    segments = [random_text(rng)]
    for _ in range(blocks):
        titles = [f"{i}." + random_text(rng, rng.randint(0, 3)) for i in range(branches)]
        lengths = [long if i == 1 else rng.randint(0, 6) for i in range(branches)]
        segments += [[Branch(t, t + random_text(rng, n)) for t, n in zip(titles, lengths)]]
        segments += [random_text(rng)] * rng.randint(0, 1)
    return segments


def random_ids(seed, **shape):
    return tokenize(random_segments(random.Random(seed), **shape), TOKENIZER.encode)


def fails(module, argv, monkeypatch, capsys):
    """Runs a script's command line, which must fail with exit code 2 and one clear last line. Returns that line."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli(module.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert "error: " in lines[-1], "the error is one line, the last"
    return lines[-1]


# -----------------------------------------------------------------------------
# a tiny published checkpoint, with weights that are the same on every machine

def published_config(model_type, tied):
    bias = {} if model_type == "qwen2" else {"attention_bias": False}
    return dict(model_type=model_type, hidden_act="silu", vocab_size=40, hidden_size=16, num_hidden_layers=2, rms_norm_eps=1e-5,
                num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64,
                rope_theta=500.0, tie_word_embeddings=tied, **bias)


def published_weights(config):
    """{name: tensor} of a Llama or Qwen2 model, filled with numbers in +-0.5 that look random."""
    C, I, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = C // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (V, C)}
    for i in range(config["num_hidden_layers"]):
        parts = {"self_attn.q_proj.weight": (C, C), "self_attn.k_proj.weight": (kv, C), "self_attn.v_proj.weight": (kv, C),
                 "self_attn.o_proj.weight": (C, C), "mlp.gate_proj.weight": (I, C), "mlp.up_proj.weight": (I, C),
                 "mlp.down_proj.weight": (C, I), "input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,)}
        if config["model_type"] == "qwen2":
            parts |= {f"self_attn.{p}_proj.bias": (n,) for p, n in zip("qkv", (C, kv, kv))}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    noise = lambda k, n: (torch.sin(torch.arange(n, dtype=torch.float64) * 12.9898 + k) * 43758.5453 % 1 - 0.5).float()
    return {name: noise(k, math.prod(shape)).view(shape) + ("norm" in name) for k, (name, shape) in enumerate(shapes.items())}


def write_safetensors(path, weights):
    """float32 tensors as a .safetensors file: 8 bytes header length, a JSON header, raw tensors."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in weights.items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def publish(folder, config, shards=1):
    """A folder with config.json and the weights, spread over a number of files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, weights = list(published_weights(config)), published_weights(config)
    for s in range(shards):
        write_safetensors(folder / f"model-{s + 1:05}-of-{shards:05}.safetensors", {n: weights[n] for n in names[s::shards]})
    return folder


# -----------------------------------------------------------------------------
# our own checkpoints, and answers to train on

def tiny_model(**config):
    """An untrained model over TOKENIZER's ids, always with the same weights."""
    torch.manual_seed(0)
    settings = dict(block_size=256, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_inner=24,
                    head_size=8)
    return GPT(GPTConfig(**settings | config))


def save_tiny(out_dir, model=None, **changes):
    """A checkpoint of tiny_model(), as train.py would write it, with changes to its dict."""
    model = model or tiny_model()
    state = dict(step=3, args={}, config=asdict(model.config), model=model.state_dict(), optimizer={},
                 tokenizer=TOKENIZER.settings)
    save_checkpoint(out_dir, **state | changes)
    return out_dir


def write_answers(path, n=160):
    """Short answers, most with a list of long items that do not need each other."""
    records = []
    for i in range(n):
        items = [f"{k + 1}. **Part {w}**: " + f"{w} number {i % 7} is a thing with {w} sides and {w} ends in it. " * (1 + k % 2)
                 for k, w in enumerate(("alpha", "beta", "gamma"))]
        text = f"Parts of set {i}:\n\n" + "\n".join(items) + "\n\nThat is all."
        text = text if i % 4 else f"Set {i} is empty, so there is nothing to say."
        records.append(json.dumps({"prompt": f"What is in set {i}?", "response": text}) + "\n")
    path.write_text("".join(records))
    return path
