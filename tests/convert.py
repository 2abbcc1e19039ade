"""Makes an ordinary checkpoint, OUT/ckpt.pt, of a published model: dense Llama, Qwen2 or Qwen3.

    python tests/convert.py FOLDER OUT                        # then: decode.py --ckpt OUT
    python tests/convert.py FOLDER OUT --system "Be brief."   # or:   train.py --init-from OUT

FOLDER holds config.json, *.safetensors, tokenizer.json, tokenizer_config.json and, unless the last
one has it, chat_template.jinja. One rule holds everywhere: what would change the result is either
computed, or refused with its name and value. So logits are those of transformers, and prompts are
those of its apply_chat_template.

Two things differ on purpose. Text is not normalised and never becomes a special token, so that it
comes back to the letter: text that is in the tokenizer's normal form, and says no added token, has
the published ids. And the system text, the date and the form without thinking are chosen here.
"""
import argparse
import json
import math
import mmap
import os
import re
import shlex
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aspd import BadInput, check, naming
from data import Tokenizer, cli, printable
from model import GPT, GPTConfig, save_checkpoint


# ---- files ------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def map_file(path, size=0, offset=0):
    """A file's bytes, all or a part, mapped; changes stay in memory. BadInput where it is empty or
    a mere Git LFS pointer."""
    with naming(path), open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=offset)
        check(offset or data[:8] != b"version ", "is a Git LFS pointer: run `git lfs pull` there")
    return data


def read_json(path):
    """A JSON file with an object -> dict. BadInput naming it where it holds none."""
    data = map_file(path)
    with naming(path):
        settings = json.loads(data[:])
        check(isinstance(settings, dict), f"holds {settings!r:.40}, not an object")
    return settings


def read_safetensors(path, dtype=None):
    """{name: tensor} of a file: 8 bytes header length, a JSON header, raw tensors. dtype: what to
    turn them into; None: they stay mapped, each by itself, so that its pages leave the memory with
    it. BadInput naming the tensor whose entry does not fit."""
    data = map_file(path)
    with naming(f"{path}: header"):
        start = 8 + int.from_bytes(data[:8], "little")
        check(start <= len(data), f"ends at byte {start} of {len(data)}")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        with naming(f"{path}: tensor {name} = {entry}"):
            span = range(start, len(data))[slice(*entry["data_offsets"])]
            before = span.start % mmap.ALLOCATIONGRANULARITY  # a mapping starts with a page
            mapped = map_file(path, before + len(span), span.start - before)
            raw = memoryview(mapped)[before:before + len(span)]
            tensor = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
            tensors[name] = tensor.to(dtype or tensor.dtype)
    return tensors


# ---- the model --------------------------------------------------------------

ROPES = (None, "default", "linear", "llama3")
SUPPORTED = {  # settings that change the result: the values that are computed (None: not set)
    "model_type": ("llama", "qwen2", "qwen3"), "auto_map": (None,), "hidden_act": ("silu",),
    "attention_bias": (None, False), "mlp_bias": (None, False), "num_local_experts": (None,),
    "use_sliding_window": (None, False), "quantization_config": (None,),
    # Of rotary positions: their scaling, by its older and newer name; settings by kind of layer.
    "type": ROPES, "rope_type": ROPES, "full_attention": (None,),
    "partial_rotary_factor": (None, 1.0),
}


def published_config(settings):
    """What a config.json holds -> GPTConfig. BadInput for a setting that is not supported. By the
    age of the file, those of rotary positions stand at the top, in rope_scaling or in
    rope_parameters."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    older = settings.get("rope_scaling") or rope
    check(rope == older, f"rope_parameters = {rope!r} differs from rope_scaling = {older!r}")
    check(isinstance(rope, dict), f"rope_scaling = {rope!r} is not an object")
    c = {}
    for part in (settings, rope):
        c |= {name: value for name, value in part.items() if value is not None}
    for name, values in SUPPORTED.items():
        check(c.get(name) in values, f"{name} = {c.get(name)!r} is not supported")
    for layer in c.get("layer_types", []):
        check(layer == "full_attention", f"layer_types = {layer!r} is not supported")
    n_head = c["num_attention_heads"]
    return GPTConfig(
        block_size=int(c["max_position_embeddings"]), vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"], n_embd=c["hidden_size"], n_inner=c["intermediate_size"],
        n_head=n_head, n_kv_head=c.get("num_key_value_heads", n_head),
        head_size=c.get("head_dim", c["hidden_size"] // n_head),
        rope_theta=float(c.get("rope_theta", 10000)), rope_scaling=rope_scaling(c),
        norm_eps=float(c["rms_norm_eps"]), qkv_bias=c["model_type"] == "qwen2",
        qk_norm=c["model_type"] == "qwen3", tied=c.get("tie_word_embeddings", False))


def rope_scaling(c):
    """Settings of rotary positions -> (factor, slow, fast) of model.rope()."""
    kind = c.get("rope_type") or c.get("type") or "default"
    if kind == "default":
        return GPTConfig.rope_scaling
    factor = float(c["factor"])
    check(factor > 0, f"factor = {factor} is not over 0")
    if kind == "linear":
        return factor, 2.0, 3.0  # all channels are slow: the fastest turn by 1
    low = float(c["low_freq_factor"])
    high = float(c["high_freq_factor"])
    check(0 < low < high, f"low_freq_factor = {low}, high_freq_factor = {high}: not in this order")
    once = 2 * math.pi / c["original_max_position_embeddings"]  # turns once in the old context
    return factor, low * once, high * once


def read_weights(folder, dtype=None):
    """{name: tensor} of a folder: of the files in its index or, without one, of *.safetensors."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.exists():
        with naming(index):
            files = [folder / name for name in sorted({*read_json(index)["weight_map"].values()})]
    check(files, f"{folder}: no *.safetensors in it")
    weights = {}
    for file in files:
        for name, tensor in read_safetensors(file, dtype).items():
            check(name not in weights, f"{file}: the tensor {name} is in another file, too")
            if not name.endswith("rotary_emb.inv_freq"):  # in old files, and not needed
                weights[name] = tensor
    return weights


def load_weights(model, folder, dtype=None):
    """Fills a model with the weights of a folder, which stay mapped where dtype is None or theirs.
    BadInput naming tensors that are missing, unknown or misshapen."""
    weights = read_weights(folder, dtype)
    with naming(folder):
        if model.config.tied:
            weights.pop("lm_head.weight", None)  # a copy of the embedding
        model.load_state_dict(weights, assign=True)


@torch.no_grad()
def grow(model, groups):
    """For new tokens: appends a row to embedding and head for every list of ids in groups, the mean
    of their rows. Then rows of zeros, up to a multiple of 64, for speed."""
    rows = model.config.vocab_size
    model.config.vocab_size = math.ceil((rows + len(groups)) / 64) * 64
    embedding = model.model.embed_tokens
    for table in [embedding] if model.config.tied else [embedding, model.lm_head]:
        weight = F.pad(table.weight, (0, 0, 0, model.config.vocab_size - rows))
        for new, ids in enumerate(groups, start=rows):
            weight[new] = weight[ids].mean(0)
        table.weight = nn.Parameter(weight)


# ---- the tokenizer ----------------------------------------------------------

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after digits have been split off, one by one, as in SmolLM2.
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")
# Vocabularies write a byte as the character of that number or, if that is not visible, as one from
# 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in VISIBLE]
TO_BYTE = {chr(b): b for b in VISIBLE} | {chr(256 + n): b for n, b in enumerate(OTHERS)}
# Tag i of TAG_NAMES starts as the mean of the tokens of TAG_WORDS[i], in the embedding and in the
# head. Answers hardly ever have these words, so a new tag starts out as improbable as they are.
TAG_WORDS = [tag + end for tag in (" headline", " parallel", " branch") for end in ("", " closed")]
SENTENCEPIECE = "is not supported: SentencePiece joins characters by scores, tiktoken bytes by rank"


def published_tokenizer(folder, vocab_size, system=None):
    """The tokenizer of a folder -> Tokenizer; {text: id} of its added tokens; notes on its chat
    form, a list. vocab_size: rows of the embedding; behind them are the ids of the bytes that the
    vocabulary lacks, and then of the tags. system: the text that prompts shall have; None: the
    template's own."""
    path = folder / "tokenizer.json"
    check(path.exists() or not (folder / "tokenizer.model").exists(),
          f"{folder}: tokenizer.model without tokenizer.json {SENTENCEPIECE}")
    t = read_json(path)
    with naming(path):
        added = {token["content"]: token["id"] for token in t["added_tokens"]}
        special = {token["content"] for token in t["added_tokens"] if token["special"]}
        for token in t["added_tokens"]:
            odd = [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]
            check(not odd, f"{odd} of the token {token['content']!r} is not supported")
        normalizer = (t["normalizer"] or {}).get("type")
        check(normalizer in (None, "NFC"), f"normalizer = {normalizer!r} is not supported")
        pattern = word_pattern(t["pre_tokenizer"])
        ranks = read_ranks(t["model"], added)
        # Added tokens that are not special are text, which a model may write: "</think>".
        ranks = {text.encode(): i for text, i in added.items() if text not in special} | ranks
        last = max(*ranks.values(), *added.values())
        check(last < vocab_size, f"the id {last}, but config.json has vocab_size = {vocab_size}")
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        ranks |= {byte: i for i, byte in enumerate(lacking, start=vocab_size)}
        first_tag = vocab_size + len(lacking)
        tags = [*range(first_tag, first_tag + len(TAG_WORDS))]

    path = folder / "tokenizer_config.json"
    config = read_json(path)
    names = special_names(config)
    eos = names.get("eos_token")
    check(eos in special, f"{path}: eos_token = {eos!r} is no special token")
    with naming(f"{folder}: chat form"):
        source = template_source(folder, config)
        if source:
            chat, notes = chat_form(source, names, added, system)
        else:
            chat, notes = plain_form(t["post_processor"], added, system)
    ends = more_ends(folder, vocab_size)
    with naming(f"{folder}/tokenizer.json: pattern {pattern!r}"):
        tokenizer = Tokenizer(pattern, ranks, added[eos], tags, ends, chat)
        every = "".join(map(chr, [*range(0xd800), *range(0xe000, 0x110000, 97)]))
        check(tokenizer.decode(tokenizer.encode(every)) == every, "leaves text out")
    return tokenizer, added, notes


def read_ranks(model, added):
    """The BPE model of a tokenizer.json -> ranks, without the added tokens.

    tiktoken looks a whole word up, then joins the neighbours that make a token, the one with the
    lowest id first. That is what the merges say if they make tokens in the order of their ids, and
    if every token comes out of the merges of its own letters. Where merges are ignored for a whole
    word (ignore_merges), one that cannot be made, as no two tokens make it, does no harm."""
    check(model["type"] == "BPE", f"model type = {model['type']!r} {SENTENCEPIECE}")
    check(not model.get("byte_fallback"), f"byte_fallback = True {SENTENCEPIECE}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        check(not model.get(name), f"{name} = {model.get(name)!r} is not supported")
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    for i, n in Counter([*vocab.values(), *added.values()]).items():
        check(n == 1, f"the id {i} has {n} tokens")
    for token in vocab:
        check(TO_BYTE.keys() >= set(token), f"the token {token!r} is not written as bytes")

    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    for merge in merges:
        known = len(merge) == 2 and {*merge, "".join(merge)} <= vocab.keys()
        check(known, f"the merge {merge} does not make a token of two tokens")
    made = [vocab["".join(merge)] for merge in merges]
    for i, after in zip(made, made[1:]):
        check(i <= after, f"merges make the id {i} before {after}: not supported")
    order = {merge: n for n, merge in enumerate(merges)}
    for token in vocab:
        parts = list(token)
        while len(parts) > 1:  # byte pair encoding by the book
            pairs = list(zip(parts, parts[1:]))
            first = min(pairs, key=lambda pair: order.get(pair, len(order)))
            if first not in order:
                whole = model.get("ignore_merges") and len(parts) > 2
                check(whole, f"the token {token!r} does not come out of its merges: {parts}")
                break
            i = pairs.index(first)
            parts[i:i + 2] = ["".join(first)]
    return {bytes(TO_BYTE[c] for c in token): i for token, i in vocab.items()}


def word_pattern(pre):
    """The pre_tokenizer of a tokenizer.json, which cuts text into words -> a pattern that does."""
    match pre:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return GPT2
        case {"pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]}:
            return DIGITS
        case {"pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]}:
            return words
    raise BadInput(f"pre_tokenizer = {pre} is not supported")


def special_names(config):
    """{"eos_token": "<|im_end|>", ...} of a tokenizer_config.json, which the template may use."""
    names = {}
    for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        token = config.get(f"{kind}_token")
        if token:
            names[f"{kind}_token"] = token.get("content") if isinstance(token, dict) else token
    return names


def more_ends(folder, vocab_size):
    """The ids that end an answer, besides the one that ends it in training."""
    ends = set()
    for path in (folder / "config.json", folder / "generation_config.json"):
        ids = read_json(path).get("eos_token_id") if path.exists() else None
        for i in ids if isinstance(ids, list) else [ids]:
            ok = i is None or (type(i) is int and 0 <= i < vocab_size)
            check(ok, f"{path}: eos_token_id = {i!r} is no id under {vocab_size}")
            ends.add(i)
    return sorted(ends - {None})


# ---- the chat form ----------------------------------------------------------
# A chat template is a program that writes the conversation. It is run on two marks. What it writes
# around them is the chat form, which is then tried on other texts.

SYSTEM = "\ue000the system text\ue000"
PROMPT = "\ue000the prompt\ue000"
DATE = datetime(2024, 7, 26)  # "today"; the one of Llama 3's template where there is no clock


def template_source(folder, config):
    """The chat template of a folder, a str, or None."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return map_file(file)[:].decode()
    source = config.get("chat_template")
    if isinstance(source, list):  # several, each with its name
        named = {template["name"]: template["template"] for template in source}
        check("default" in named, f"{folder}: chat_template = {[*named]} has no default")
        source = named["default"]
    return source


def compile_template(source):
    """A chat template, with what transformers gives to it; it cannot reach out of its sandbox."""
    def raise_exception(message):
        raise BadInput(message)

    def tojson(value, indent=None):  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    return environment.from_string(source)


def chat_form(source, names, added, system):
    """A template -> the chat form of Tokenizer, and notes on what was chosen. names: {"eos_token":
    its text, ...}. added: {text: id}. BadInput where it is no form: where the template does more
    with a text than to write it somewhere."""
    template = compile_template(source)

    def render(system, prompt):
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return template.render(messages=messages, add_generation_prompt=True, tools=None,
                               documents=None, enable_thinking=False, **names)

    # 1) write the marks
    has_system = bool(system and system.strip())  # an empty one needs no mark
    marked = render(SYSTEM if has_system else system, PROMPT)
    check(PROMPT in marked, f"the template leaves the prompt out: {marked!r}")
    if has_system:
        check(SYSTEM in marked, f"the template leaves the system text out: {marked!r}")
        if f" {SYSTEM} " not in render(f" {SYSTEM} ", PROMPT):
            system = system.strip()  # as the template does

    # 2) try other texts: braces, line breaks, quotes, and what the template itself writes
    texts = ["{prompt} {{x}} }\n\n{", "'a'\t\"b\" \\n é <b>&", "".join(added) + marked.strip()]
    for prompt, other in zip(texts, reversed(texts)):
        other = other if has_system else system
        found = render(other, prompt)
        wanted = write(cut(marked, added, other), added, prompt)
        same = len(os.path.commonprefix([found, wanted]))
        check(found == wanted, f"template writes {found[same:]!r:.90}, not {wanted[same:]!r:.90}")

    # 3) say what was chosen
    notes = []
    if f" {PROMPT} " not in render(system, f" {PROMPT} "):
        notes.append("The template takes blanks around a prompt away; here a prompt keeps its own.")
    if "strftime_now" in source:
        notes.append(f"The template says today's date; here it is always {DATE:%d %b %Y}.")
    if "enable_thinking" in source:
        notes.append("The form without thinking was taken (enable_thinking=False).")
    return cut(marked, added, system), notes


def plain_form(post, added, system):
    """The chat form without a template, and a note: a prompt is a line, behind the system text and
    what the tokenizer puts before all text. post: the post_processor of a tokenizer.json."""
    form = []
    for part in post.get("processors", [post]) if post else []:
        match part:
            case {"type": "ByteLevel"}:
                pass
            case {"type": "TemplateProcessing", "single": [*before, {"Sequence": _}]}:
                form += [added[token["SpecialToken"]["id"]] for token in before]
            case _:
                raise BadInput(f"post_processor = {part} is not supported")
    text = "{prompt}\n" if system is None else escape(system) + "\n{prompt}\n"
    return [*form, text], ["There is no chat template: a prompt is a line of text."]


def cut(marked, added, system):
    """Text with the marks -> a chat form: texts for str.format, and ids where it says an added
    token. None is looked for in the system text."""
    longest_first = sorted(added, key=len, reverse=True)
    form = []
    for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", marked):
        if part in added:
            form.append(added[part])
        elif part:
            text = escape(part).replace(PROMPT, "{prompt}")
            form.append(text.replace(SYSTEM, escape(system or "")))
    return form


def escape(text):
    """Text for str.format."""
    return text.replace("{", "{{").replace("}", "}}")


def write(form, added, prompt):
    """A chat form with a prompt -> str, the added tokens written out."""
    texts = {i: text for text, i in added.items()}
    return "".join(texts[p] if isinstance(p, int) else p.format(prompt=prompt) for p in form)


# ---- command line -----------------------------------------------------------

def convert(folder, out, system=None, dtype=None):
    """Writes out/ckpt.pt -> lines that say what it is. dtype: of the weights; None: as they are."""
    path = Path(folder, "config.json")
    with naming(path), torch.device("meta"):
        model = GPT(published_config(read_json(path)))
    c = model.config
    c.positions = None  # it has not learnt to branch
    size = c.vocab_size
    tokenizer, added, notes = published_tokenizer(path.parent, size, system)
    load_weights(model, path.parent, dtype)
    known = [i for i, token in tokenizer.bytes.items() if len(token) == 1 and i < size]
    lacking = 256 - len(known)
    n_weights = sum(map(torch.numel, model.parameters()))
    types = ", ".join(sorted({str(weight.dtype) for weight in model.parameters()}))
    # A lacking byte starts as the mean of the other bytes.
    grow(model, [known] * lacking + [tokenizer.encode(words) for words in TAG_WORDS])
    Path(out).mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, config=vars(c), tokenizer=tokenizer.settings, model=model.state_dict())

    texts = {i: text for text, i in added.items()}
    ends = [f"{i} {texts.get(i)}" for i in sorted(tokenizer.stop)]
    return [
        f"{c.n_layer} layers of {c.n_embd} channels, {c.n_head} heads of {c.head_size} "
        f"({c.n_kv_head} for keys), context {c.block_size}",
        f"{n_weights:,} weights in {types}",
        f"{size} tokens, {lacking} for bytes that the vocabulary lacks, {len(TAG_WORDS)} tags",
        f"chat form: {write(tokenizer.chat, added, '{prompt}')!r}",
        f"an answer ends with: {', '.join(ends)}", *notes]


def main():
    """The command line."""
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("folder", type=Path, help="a published Llama, Qwen2 or Qwen3 model")
    add("out", type=Path, help="the folder for its ckpt.pt; must not exist")
    add("--system", metavar="TEXT", help="of all prompts; none: what the template has, if anything")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="none: as the weights are")
    add("--force", action="store_true", help="write into a folder that exists")
    args = p.parse_args()
    check(args.folder.is_dir(), f"{args.folder} is no folder")
    check(args.force or not args.out.exists(), f"{args.out} exists: --force replaces its ckpt.pt")
    dtype = args.dtype and getattr(torch, args.dtype)
    for line in convert(args.folder, args.out, args.system, dtype):
        print(printable(line))
    print(f"Next: python decode.py --ckpt {shlex.quote(str(args.out))} --prompt TEXT")


if __name__ == "__main__":
    cli(main)
