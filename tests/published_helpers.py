"""Published folders for tests: a tiny model whose weights are the same on every machine, tiny
tokenizers as GPT-2, SmolLM2, Qwen2 and Llama 3 spell them, and chat templates in the forms that
models ship."""
import json
import math

import torch


# ---- the model --------------------------------------------------------------

def published_config(model_type="llama", tied=True, **changes):
    """config.json of a Llama, Qwen2 or Qwen3 model, as a dict."""
    config = dict(
        model_type=model_type, hidden_act="silu", vocab_size=40, hidden_size=16,
        num_hidden_layers=2, rms_norm_eps=1e-5, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=64, rope_theta=500.0,
        tie_word_embeddings=tied)
    if model_type != "qwen2":
        config["attention_bias"] = False
    if model_type == "qwen3":
        config["head_dim"] = 8  # twice hidden_size / num_attention_heads
    return config | changes


def published_weights(config):
    """{name: tensor} of such a model, filled with numbers in +-0.5 that look random."""
    C, I, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    hs = config.get("head_dim", C // config["num_attention_heads"])
    q = hs * config["num_attention_heads"]
    kv = hs * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, C)
    layer = {
        "self_attn.q_proj.weight": (q, C), "self_attn.k_proj.weight": (kv, C),
        "self_attn.v_proj.weight": (kv, C), "self_attn.o_proj.weight": (C, q),
        "mlp.gate_proj.weight": (I, C), "mlp.up_proj.weight": (I, C),
        "mlp.down_proj.weight": (C, I), "input_layernorm.weight": (C,),
        "post_attention_layernorm.weight": (C,)}
    if config["model_type"] == "qwen2":
        layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in zip("qkv", (q, kv, kv))}
    if config["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm.weight": (hs,), "self_attn.k_norm.weight": (hs,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}

    def noise(k, n):
        wave = torch.sin(torch.arange(n, dtype=torch.float64) * 12.9898 + k)
        return (wave * 43758.5453 % 1 - 0.5).float()

    weights = {}
    for k, (name, shape) in enumerate(shapes.items()):
        weights[name] = noise(k, math.prod(shape)).view(shape) + ("norm" in name)
    return weights


def write_safetensors(path, weights):
    """Tensors as a .safetensors file: 8 bytes header length, a JSON header, raw tensors."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16",
             torch.bfloat16: "BF16"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in weights.items():
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_raw(path, header, data)


def write_raw(path, header, data):
    """A .safetensors file whose header may say anything."""
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def publish(folder, config, shards=1, dtype=torch.float32):
    """A folder with config.json and the weights, spread over a number of files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = published_weights(config)
    names = list(weights)
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: weights[name].to(dtype) for name in names[s::shards]}
        write_safetensors(folder / file, part)
    return folder


# ---- the tokenizer ----------------------------------------------------------

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}
DIGITS_FIRST = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]


def split(regex, **changes):
    """The pre_tokenizer of Qwen2 and Llama 3."""
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
           "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [cut, {**BYTE_LEVEL, "use_regex": False}]}


PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "smollm2": {"type": "Sequence", "pretokenizers": DIGITS_FIRST},
    "qwen2": split(QWEN),
    "llama3": split(LLAMA),
}
MERGES = ["Ġ t", "h e", "Ġt he", "t he", "Ġ Ġ", "Ċ Ċ", "Ġ 1", "1 2", "Ġ1 2", "' s", "' S", "Ã ©",
          "Ġ Ã©", ". Ċ", "ĠĠ ĠĠ", "< |", "| >", "i m", "_ e"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)


def write_tokenizer(folder, name="smollm2", template=None, change=None, added=(),
                    specials=SPECIALS, **config):
    """tokenizer.json and tokenizer_config.json. change(tokenizer) may alter the first before it is
    written. added: texts of further tokens, which are not special. config: further settings for the
    second. -> folder"""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    tokens = [chr(b) for b in visible] + [chr(256 + n) for n in range(len(hidden))]
    tokens += [m.replace(" ", "") for m in MERGES]
    specials_last = name in ("qwen2", "llama3")  # and not in the vocabulary of the BPE
    everything = tokens + [*specials] if specials_last else [*specials] + tokens
    vocab = {token: i for i, token in enumerate(everything)
             if not (specials_last and token in specials)}
    tokens = []
    for i, text in [*((everything.index(s), s) for s in specials),
                    *enumerate(added, start=len(everything))]:
        tokens.append({"id": i, "content": text, **FLAGS, "special": text in specials})
    t = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None,
         "decoder": BYTE_LEVEL, "added_tokens": tokens,
         "normalizer": {"type": "NFC"} if name == "qwen2" else None,
         "pre_tokenizer": PRE_TOKENIZERS[name],
         "model": {"type": "BPE", "dropout": None, "unk_token": None,
                   "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                   "byte_fallback": False, "ignore_merges": name == "llama3", "vocab": vocab,
                   "merges": MERGES}}
    t = json.loads(json.dumps(t))  # a copy, free to change
    if change:
        change(t)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(t), encoding="utf-8")
    config = {"eos_token": specials[-1], "chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# ---- chat templates ---------------------------------------------------------

LOOP = "{% for message in messages %}"
TURN = ("{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def with_default(system):
    """The template of SmolLM2 and Qwen2, with the system text that it defaults to."""
    return (LOOP + "{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\n" + system + "<|im_end|>\n' }}{% endif %}" + TURN)


QWEN25 = r"""{%- if tools %}
    {{- "<|im_start|>system\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "</tools>\n\n{\"name\": <function-name>, \"arguments\": <args-json-object>}<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWEN3 = r"""{%- if tools %}
    {{- raise_exception('no tools here') }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
           and not(message.content.startswith('<tool_response>')
                   and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA31 = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message, to slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA32 = LLAMA31.replace("""    {%- set date_string = "26 Jul 2024" %}
""", """    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
""")
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}")
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n"
    "{% endif %}\n{% endfor %}")
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% endfor %}")
SMOLLM2 = with_default("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
TEMPLATES = {  # name: the template, the tokenizer's spelling, its special tokens
    "smollm2": (SMOLLM2, "smollm2", SPECIALS),
    "qwen2": (with_default("You are a helpful assistant."), "qwen2", SPECIALS),
    "qwen2.5": (QWEN25, "qwen2", SPECIALS),
    "qwen3": (QWEN3, "qwen2", SPECIALS),
    "chatml": (LOOP + TURN, "gpt2", SPECIALS),
    "llama3": (LLAMA3, "llama3", HEADERS),
    "llama3.1": (LLAMA31, "llama3", HEADERS),
    "llama3.2": (LLAMA32, "llama3", HEADERS),
    "phi3": (PHI3, "gpt2", PHI_TOKENS),
    "zephyr": (ZEPHYR, "gpt2", ["<s>", "</s>"]),
    "llama2": (LLAMA2, "gpt2", ["<s>", "</s>"]),
}
THINKING = ["<think>", "</think>"]  # added tokens that are not special


def write_chat(folder, name):
    """The tokenizer of TEMPLATES[name] -> folder."""
    template, spelling, specials = TEMPLATES[name]
    return write_tokenizer(folder, spelling, template, added=THINKING, specials=specials,
                           bos_token=specials[0])
