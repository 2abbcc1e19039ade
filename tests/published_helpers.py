"""What the tests of published folders share: a tiny model folder whose weights are the same on every machine, a tiny
tokenizer.json in the style of GPT-2, SmolLM2 and Qwen2, and the chat templates that those models ship."""
import json
import math

import torch

# -----------------------------------------------------------------------------
# the model


def published_config(model_type="llama", tied=True, **changes):
    """config.json of a Llama or a Qwen2 model, as a dict."""
    config = dict(
        model_type=model_type, hidden_act="silu", vocab_size=40, hidden_size=16, num_hidden_layers=2,
        rms_norm_eps=1e-5, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        max_position_embeddings=64, rope_theta=500.0, tie_word_embeddings=tied)
    if model_type == "llama":
        config["attention_bias"] = False
    return config | changes


def published_weights(config):
    """{name: tensor} of a Llama or Qwen2 model, filled with numbers in +-0.5 that look random."""
    C, I, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = C // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, C)
    layer = {
        "self_attn.q_proj.weight": (C, C), "self_attn.k_proj.weight": (kv, C), "self_attn.v_proj.weight": (kv, C),
        "self_attn.o_proj.weight": (C, C), "mlp.gate_proj.weight": (I, C), "mlp.up_proj.weight": (I, C),
        "mlp.down_proj.weight": (C, I), "input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,)}
    if config["model_type"] == "qwen2":
        layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in zip("qkv", (C, kv, kv))}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}

    def noise(k, n):
        return (torch.sin(torch.arange(n, dtype=torch.float64) * 12.9898 + k) * 43758.5453 % 1 - 0.5).float()

    return {name: noise(k, math.prod(shape)).view(shape) + ("norm" in name)
            for k, (name, shape) in enumerate(shapes.items())}


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
    weights = published_weights(config)
    names = list(weights)
    for s in range(shards):
        file = folder / f"model-{s + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(file, {name: weights[name] for name in names[s::shards]})
    return folder


# -----------------------------------------------------------------------------
# the tokenizer

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "smollm2": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    "qwen2": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
        {**BYTE_LEVEL, "use_regex": False}]},
}
MERGES = ["Ġ t", "h e", "Ġt he", "t he", "Ġ Ġ", "Ċ Ċ", "Ġ 1", "1 2", "Ġ1 2", "' s", "' S", "Ã ©", "Ġ Ã©", ". Ċ",
          "ĠĠ ĠĠ", "< |", "| >", "i m", "_ e"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)


def write_tokenizer(folder, name="smollm2", template=None, change=None, added=(), **config):
    """tokenizer.json and tokenizer_config.json. change(tokenizer) may alter the first before it is written; added:
    texts of further tokens, which are not special; config: further settings for the second."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    tokens = [chr(b) for b in visible] + [chr(256 + n) for n in range(len(hidden))]
    tokens += [m.replace(" ", "") for m in MERGES]
    everything = tokens + SPECIALS if name == "qwen2" else SPECIALS + tokens
    vocab = {token: i for i, token in enumerate(everything) if name != "qwen2" or token not in SPECIALS}
    special = [{"id": everything.index(s), "content": s, **FLAGS, "special": True} for s in SPECIALS]
    ordinary = [{"id": len(everything) + k, "content": s, **FLAGS, "special": False} for k, s in enumerate(added)]
    t = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": BYTE_LEVEL,
         "added_tokens": special + ordinary, "normalizer": {"type": "NFC"} if name == "qwen2" else None,
         "pre_tokenizer": PRE_TOKENIZERS[name],
         "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                   "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                   "merges": MERGES}}
    t = json.loads(json.dumps(t))  # a copy, free to change
    if change:
        change(t)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(t), encoding="utf-8")
    config = {"eos_token": "<|im_end|>", "chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# -----------------------------------------------------------------------------
# chat templates

LOOP = "{% for message in messages %}"
TURN = ("{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def with_default(system):
    """The template that SmolLM2 and Qwen2 ship, with the system text that it defaults to."""
    return (LOOP + "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + system
            + "<|im_end|>\n' }}{% endif %}" + TURN)


SMOLLM2 = with_default("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QWEN2 = with_default("You are a helpful assistant.")
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
TEMPLATES = {  # as the models ship it, and the system text that it defaults to
    "smollm2": (SMOLLM2, "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "qwen2": (QWEN2, "You are a helpful assistant."),
    "qwen2.5": (QWEN25, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen2.5 base": (QWEN25.replace("You are Qwen, created by Alibaba Cloud. ", ""), "You are a helpful assistant."),
    "no default": (LOOP + TURN, ""),
}
