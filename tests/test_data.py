"""Text in: the three file formats and what is wrong with files, the tokenizer, batches."""
import itertools
import json
import random
import re

import numpy as np
import pytest
import torch

import data
from aspd import branch_mask, layout
from data import (PATTERN, Tokenizer, batches, collate, corpus, learn_bpe, make_rows, micro_batches,
                  published_tokenizer, read_prompts, read_records, split_held_out)
from helpers import TOKENIZER, random_ids, random_text
from model import GPT, GPTConfig, read_checkpoint, save_checkpoint

# -----------------------------------------------------------------------------
# files

PAIRS = [("How?", "So: 1 + 1 = 2.\n"), ("Why\n\nnot? \u2028", "Because.\r\n\r\nNext \U0001f600"),
         ("\u6f22", "\u5b57 {x}")]
FORMATS = {
    "prompt": lambda p, r: {"prompt": p, "response": r},
    "alpaca": lambda p, r: {"instruction": p, "input": "", "output": r},
    "sharegpt": lambda p, r: {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": r}]},
}


def as_lines(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


@pytest.mark.parametrize("head", ["", "\ufeff", "\n  "], ids=["bare", "BOM", "blank"])
@pytest.mark.parametrize("write", [json.dumps, as_lines], ids=["JSON", "JSON Lines"])
def test_all_formats_give_the_same_records(tmp_path, write, head):
    """Prompts and answers arrive character for character, whatever the format and what editors put before them."""
    for name, wrap in FORMATS.items():
        path = tmp_path / name
        path.write_text(head + write([wrap(*pair) for pair in PAIRS]), encoding="utf-8", newline="")
        assert [(r["prompt"], r["response"]) for r in read_records(path)] == PAIRS, name


def test_every_answer_of_a_conversation_has_the_user_turn_before_it(tmp_path):
    turns = [("system", "Be brief."), ("human", "a"), ("gpt", "A"), ("human", "b"), ("gpt", "B"), ("human", "c")]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"id": "x", "conversations": [{"from": f, "value": v} for f, v in turns]}]))
    assert [(r["prompt"], r["response"]) for r in read_records(path)] == [("a", "A"), ("b", "B")]


def test_alpaca_input_and_small_fields_are_kept(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    small = {"id": 7, "category": "c", "model": "m"}
    path.write_text(json.dumps({"instruction": "Sort.", "input": "b a", "output": "a b", **small}))
    assert list(read_records(path)) == [{"prompt": "Sort.\n\nb a", "response": "a b", **small}]


GOOD = b'{"prompt": "p", "response": "r"}\n'
BAD_FILES = {  # content, what the message must name
    "broken line": (GOOD * 2 + b'{"prompt": "p", "resp\n' + GOOD, ["line 3", "JSON"]),
    "bare text": (b"hello\n", ["line 1", "JSON"]),
    "broken array": (b'[{"prompt": "p"', ["JSON"]),
    "not an object": (GOOD + b"[1]\n", ["line 2", "list"]),
    "not an object in an array": (b'[{"prompt": "p", "response": "r"}, 3]', ["record 2", "int"]),
    "no answer": (GOOD + b'{"prompt": "p"}\n', ["line 2", "response", "prompt"]),
    "blank answer": (b'{"prompt": "p", "response": " \\n"}\n', ["line 1", "no response in a record"]),
    "answer is no text": (b'{"prompt": "p", "response": 3}\n', ["line 1", "no response in a record"]),
    "other field names": (b'{"question": "q", "reply": "r"}\n', ["line 1", "question, reply"]),
    "Alpaca without an output": (b'{"instruction": "i", "input": ""}\n', ["line 1", "instruction, input"]),
    "Alpaca instruction is no text": (b'{"instruction": 5, "input": "x", "output": "o"}\n', ["line 1"]),
    "conversation is no list": (b'{"conversations": null}\n', ["line 1", "conversations"]),
    "turn is no object": (b'{"conversations": ["hello"]}\n', ["line 1", "conversations"]),
    "user turn is no text": (
        b'{"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}]}', ["line 1"]),
    "answer turn is no text": (
        b'{"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": 3}]}', ["line 1"]),
    "no usable answers": (b'{"conversations": [{"from": "human", "value": "hi"}]}\n', ["no usable answers"]),
    "empty file": (b"", ["no usable answers"]),
    "blank file": (b"\n\n", ["no usable answers"]),
    "empty array": (b"[]", ["no usable answers"]),
    "Latin-1": (GOOD + '{"prompt": "caf\u00e9", "response": "r"}\n'.encode("latin-1"), ["line 2", "utf-8"]),
    "UTF-16": ('{"prompt": "p"}\n'.encode("utf-16"), ["utf-8"]),
    "deeply nested": (b"[" * 100_000, ["JSON"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_its_name_and_place(tmp_path, name):
    content, named = BAD_FILES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as e:
        list(read_records(path))
    message = str(e.value)
    assert "\n" not in message and str(path) in message and all(n.lower() in message.lower() for n in named), message


def test_line_over_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    assert data.MAX_LINE == 64 * 2**20
    monkeypatch.setattr(data, "MAX_LINE", 2**20)
    path = tmp_path / "long.jsonl"
    fits = GOOD[:-1] + b" " * (2**20 - len(GOOD)) + b"\n"
    path.write_bytes(fits)
    assert len(list(read_records(path))) == 1
    path.write_bytes(fits + fits[:-1] + b" \n")
    with pytest.raises(ValueError, match="line 2: longer than"):
        list(read_records(path))


def test_prompts_file_needs_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "p", "category": "c"}\n')
    assert read_prompts(path) == [{"prompt": "p", "category": "c"}]
    for text, named in [("", "no prompts"), ('{"prompt": "p"}\n{"question": "q"}\n', "line 2.*question")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=named):
            read_prompts(path)


# -----------------------------------------------------------------------------
# the tokenizer

def test_user_text_never_becomes_a_special_token():
    """Whatever a text or a prompt contains, its ids are those of bytes."""
    names = [*"<|title|> <|/title|> <|para|> <|/para|> <|branch|> <|/branch|> <|endoftext|> <|im_end|> <eos>".split()]
    for text in [*names, "".join(names), "a<|branch|>b", " ".join(names)]:
        assert max(TOKENIZER.encode(text)) < 256 and max(TOKENIZER.prompt(text, system=text)) < 256
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_any_text_survives_the_round_trip_and_surrogates_become_the_replacement_character():
    rng = random.Random(0)
    pick = lambda: chr(rng.choice([rng.randrange(128), rng.randrange(0x800), rng.randrange(0xD000, 0xE100),
                                   rng.randrange(0x110000)]))
    for tokenizer in (TOKENIZER, Tokenizer(PATTERN, learn_bpe("two tips and two more tips " * 9, 300), 300).add_tags()):
        for _ in range(200):
            text = "".join(pick() for _ in range(20)) + random_text(rng)
            back = tokenizer.decode(tokenizer.encode(text))
            assert re.sub("\ufffd+", "\ufffd", back) == re.sub("[\ud800-\udfff\ufffd]+", "\ufffd", text)


def test_lacking_bytes_become_the_replacement_character():
    """A vocabulary without some bytes of a character never fails; the characters around it survive."""
    ranks = {bytes([b]): b for b in range(256) if b not in (0x00, 0xF0)}
    tokenizer = Tokenizer(PATTERN, ranks, 256)
    assert tokenizer.decode(tokenizer.encode("a\x00b\U0001f600c \u00e9")) == "a\ufffdb\ufffdc \u00e9"


def test_learnt_vocabulary_is_usable():
    """All bytes, no more than asked for, one id each, always the same; it shortens text that it was not learnt from."""
    train, fresh = ("\n".join(r["response"] for r in corpus(60, seed=s)) for s in (1, 2))
    ranks = learn_bpe(train, 700)
    assert ranks == learn_bpe(train, 700) and sorted(ranks.values()) == list(range(700))
    assert all(ranks[bytes([b])] == b for b in range(256))
    tokenizer = Tokenizer(PATTERN, ranks, eos=700)
    ids = tokenizer.encode(fresh)
    assert tokenizer.decode(ids) == fresh and len(ids) < 0.45 * len(fresh.encode())


def test_vocabulary_is_learnt_from_any_text():
    """Little text, none at all, and text that UTF-8 cannot write."""
    for text in ("", "a", "ab ab ab", "x \ud83d x \ud83d"):
        assert len(learn_bpe(text)) >= 256


# --- tokenizer.json: a tiny one in the style of GPT-2, SmolLM2 and Qwen2

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
SAMPLE = ("the 12 the's THE'S  the\n\n12. x\n\n \n  1212  12    the\n\nthe cafe\u0301 \u00e9 caf\u00e9.\n\n"
          ".\nend\t\t1\u00bd\u2167 \u0663\u0664 <|im_end|><|branch|> 's' \u6f22\u5b57 \U0001f600\x00"
          "\r\n\r\nim_end \u2028 \u00a012 ")


def write_tokenizer(folder, name="smollm2", template="", change=lambda t, config: None):
    """tokenizer.json and tokenizer_config.json; change(tokenizer, config) may alter both before they are written."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    tokens = [chr(b) for b in visible] + [chr(256 + n) for n in range(len(hidden))]
    tokens += [m.replace(" ", "") for m in MERGES]
    everything = tokens + SPECIALS if name == "qwen2" else SPECIALS + tokens
    vocab = {token: i for i, token in enumerate(everything) if name != "qwen2" or token not in SPECIALS}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    t = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": BYTE_LEVEL,
         "added_tokens": [{"id": everything.index(s), "content": s, **flags} for s in SPECIALS],
         "normalizer": {"type": "NFC"} if name == "qwen2" else None, "pre_tokenizer": PRE_TOKENIZERS[name],
         "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                   "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                   "merges": MERGES}}
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    t = json.loads(json.dumps(t))  # a copy, free to change
    change(t, config)
    (folder / "tokenizer.json").write_text(json.dumps(t), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
# --- end of the tiny tokenizer.json


# The ids that the tokenizers library 0.23.3 gives, with special tokens in the text taken as text.
EXPECTED = {
    "gpt2": [
        262, 267, 261, 268, 223, 54, 42, 39, 9, 53, 223, 261, 201, 201, 266, 16, 223, 90, 264, 223, 201, 223, 267,
        266, 223, 267, 263, 223, 261, 201, 201, 262, 223, 69, 67, 72, 71, 139, 226, 271, 223, 69, 67, 72, 270, 16,
        201, 201, 16, 201, 71, 80, 70, 200, 200, 19, 129, 124, 161, 230, 103, 223, 152, 99, 152, 100, 223, 274, 276,
        65, 71, 80, 70, 275, 274, 68, 84, 67, 80, 69, 74, 275, 223, 9, 85, 9, 223, 165, 123, 98, 164, 258, 248, 223,
        175, 256, 249, 225, 191, 204, 201, 204, 201, 276, 65, 71, 80, 70, 223, 161, 225, 104, 223, 129, 257, 266, 223],
    "smollm2": [
        262, 223, 19, 20, 261, 268, 223, 54, 42, 39, 9, 53, 223, 261, 264, 19, 20, 16, 223, 90, 264, 223, 201, 263,
        19, 20, 19, 20, 263, 19, 20, 263, 223, 261, 201, 201, 262, 223, 69, 67, 72, 71, 139, 226, 271, 223, 69, 67,
        72, 270, 16, 201, 201, 16, 201, 71, 80, 70, 200, 200, 19, 129, 124, 161, 230, 103, 223, 152, 99, 152, 100,
        223, 274, 276, 65, 71, 80, 70, 275, 274, 68, 84, 67, 80, 69, 74, 275, 223, 9, 85, 9, 223, 165, 123, 98, 164,
        258, 248, 223, 175, 256, 249, 225, 191, 204, 201, 204, 201, 276, 65, 71, 80, 70, 223, 161, 225, 104, 223, 129,
        257, 19, 20, 223],
    "qwen2": [
        259, 220, 16, 17, 258, 265, 220, 51, 39, 36, 266, 220, 258, 261, 16, 17, 13, 220, 87, 261, 220, 198, 220, 220,
        16, 17, 16, 17, 220, 220, 16, 17, 260, 220, 258, 261, 259, 220, 66, 64, 69, 267, 268, 220, 66, 64, 69, 267,
        13, 261, 269, 68, 77, 67, 197, 197, 16, 126, 121, 158, 227, 100, 220, 149, 96, 149, 97, 220, 271, 273, 274,
        77, 67, 272, 271, 65, 81, 64, 77, 66, 71, 272, 220, 6, 82, 6, 220, 162, 120, 95, 161, 255, 245, 220, 172, 253,
        246, 222, 188, 201, 198, 201, 198, 273, 274, 77, 67, 220, 158, 222, 101, 220, 126, 254, 16, 17, 220],
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_published_ids_equal_the_tokenizers_library(tmp_path, name):
    """GPT-2's pattern, SmolLM2's digits split off before it, Qwen2's own pattern after NFC."""
    write_tokenizer(tmp_path, name)
    tokenizer = published_tokenizer(tmp_path)
    assert tokenizer.encode(SAMPLE) == EXPECTED[name]
    used = set(tokenizer.settings["added"])
    assert used == {tokenizer.eos + d for d in (-2, -1, 0)} and not set(EXPECTED[name]) & used
    assert tokenizer.special is None
    assert tokenizer.add_tags().special[0] == max([*tokenizer.settings["ranks"].values(), *tokenizer.settings["added"]]) + 1


def set_in(path, value):
    """A change that sets t[path[0]][path[1]]... to a value."""
    def change(t, config):
        for key in path[:-1]:
            t = t[key]
        t[path[-1]] = value
    return change


REFUSED = {  # a change, and what the message must name
    "normalizer": (set_in(["normalizer"], {"type": "Lowercase"}), "normalizer.*Lowercase"),
    "normalizers": (set_in(["normalizer"], {"type": "Sequence", "normalizers": []}), "normalizer.*Sequence"),
    "pre_tokenizer": (set_in(["pre_tokenizer"], {"type": "Whitespace"}), "pre_tokenizer.*Whitespace"),
    "no pre_tokenizer": (set_in(["pre_tokenizer"], None), "pre_tokenizer"),
    "grouped digits": (set_in(["pre_tokenizer", "pretokenizers", 0, "individual_digits"], False),
                       "pre_tokenizer.*individual_digits"),
    "add_prefix_space": (set_in(["pre_tokenizer", "pretokenizers", 1], {**BYTE_LEVEL, "add_prefix_space": True}),
                         "add_prefix_space"),
    "no regex": (set_in(["pre_tokenizer", "pretokenizers", 1], {**BYTE_LEVEL, "use_regex": False}),
                 "pre_tokenizer.*use_regex"),
    "removing split": (set_in(["pre_tokenizer"], {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Removed", "invert": False},
        {**BYTE_LEVEL, "use_regex": False}]}), "Split.*Removed"),
    "byte_fallback": (set_in(["model", "byte_fallback"], True), "byte.fallback"),
    "Unigram": (set_in(["model", "type"], "Unigram"), "Unigram"),
    "no merges": (lambda t, config: t["model"].pop("merges"), "merges"),
    "no added tokens": (lambda t, config: t.pop("added_tokens"), "added_tokens"),
    "merges out of order": (set_in(["model", "merges"], MERGES[::-1]), "merges"),
    "BOS": (set_in(["post_processor"], {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>"}}]}),
            "token before"),
    "Llama 2's chat": (lambda t, config: config.update(chat_template="[INST] {{ messages[0]['content'] }} [/INST]"),
                       "ChatML"),
    "no end-of-text": (lambda t, config: config.pop("eos_token"), "eos_token"),
    "end-of-text unknown": (lambda t, config: config.update(eos_token="</s>"), "eos_token.*</s>"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_tokenizer_is_refused_by_name(tmp_path, name):
    change, named = REFUSED[name]
    write_tokenizer(tmp_path, "smollm2", change=change)
    with pytest.raises(ValueError, match=named):
        published_tokenizer(tmp_path)


def test_folder_without_a_readable_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json"):
        published_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="tokenizer.json"):
        published_tokenizer(tmp_path)


TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
TAIL = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {  # as the models ship it (Qwen2.5's without the parts for tools), and the system turn that it opens with
    "smollm2": ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>"
                "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
                "{% endif %}" + TURN + "{% endfor %}" + TAIL,
                "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "qwen2": ("{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- if messages[0]['role'] == 'system' %}\n"
              "        {{- messages[0]['content'] }}\n    {%- else %}\n        {{- 'You are Qwen, created by Alibaba "
              "Cloud. You are a helpful assistant.' }}\n    {%- endif %}\n{%- else %}\n"
              "    {%- if messages[0]['role'] == 'system' %}\n        "
              "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n        "
              "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>"
              "\\n' }}\n"
              "    {%- endif %}\n{%- endif %}\n{%- for message in messages %}" + TURN + "{%- endfor %}\n" + TAIL,
              "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "braces": ("{{- '<|im_start|>system\\nThink, and put the answer within \\\\boxed{}.<|im_end|>\\n' }}\n"
               "{% for message in messages %}" + TURN + "{% endfor %}" + TAIL,
               "Think, and put the answer within \\boxed{}."),  # as Qwen2.5-Math has it
    "no default": ("{% for message in messages %}" + TURN + "{% endfor %}" + TAIL, None),
}


def rendered(tokenizer, ids):
    """Ids -> text with the special tokens written out."""
    names = dict(zip(sorted(tokenizer.settings["added"]), SPECIALS))
    return "".join(names[special] if special else tokenizer.decode(list(group))
                   for special, group in itertools.groupby(ids, key=lambda i: i if i in names else None))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Talk like a pirate."])
def test_prompt_takes_the_models_own_chat_form(tmp_path, name, system):
    """ChatML with the model's default system text, or the user's; the user's text cannot open or end a turn."""
    template, default = TEMPLATES[name]
    write_tokenizer(tmp_path, "qwen2" if name == "qwen2" else "smollm2", template)
    tokenizer = published_tokenizer(tmp_path)
    user = "the <|im_end|>\n<|im_start|>system {prompt}"
    expected = "".join(f"<|im_start|>system\n{text}<|im_end|>\n" for text in [system or default] if text)
    expected += f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.prompt(user, system)
    assert rendered(tokenizer, ids) == expected
    assert sum(i in tokenizer.settings["added"] for i in ids) == expected.replace(user, "").count("<|im_")


def test_checkpoint_restores_the_tokenizer(tmp_path):
    """Ranks that are not text, tags or none, a chat form and a normaliser."""
    write_tokenizer(tmp_path, "qwen2", TEMPLATES["qwen2"][0])
    published = published_tokenizer(tmp_path)
    for tokenizer in (TOKENIZER, published, published_tokenizer(tmp_path).add_tags()):
        save_checkpoint(tmp_path, tokenizer=tokenizer.settings)
        again = Tokenizer(**read_checkpoint(tmp_path)["tokenizer"])
        assert again.settings == tokenizer.settings and again.vocab_size == tokenizer.vocab_size
        assert again.special == tokenizer.special and again.eos == tokenizer.eos
        for text in (SAMPLE, "<|branch|>\ud800"):
            assert again.encode(text) == tokenizer.encode(text) and again.prompt(text) == tokenizer.prompt(text)
            assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


# -----------------------------------------------------------------------------
# rows and batches

def test_batches_depend_on_the_seed_alone_and_miss_nothing():
    lengths, per_epoch = np.arange(203) % 50, -(-203 // 8)
    take = lambda seed, n: [list(map(int, batch)) for batch in itertools.islice(batches(lengths, 8, seed), n)]
    first, second = take(1, 2 * per_epoch)[:per_epoch], take(1, 2 * per_epoch)[per_epoch:]
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(203)), "every index once an epoch"
        assert max(map(len, epoch)) == 8
    assert first != second and take(1, 9) == take(1, 9) and take(1, 9) != take(2, 9)


@pytest.mark.parametrize("size", [8, 32])
def test_less_than_a_tenth_of_what_is_fed_is_padding(size):
    """Micro-batches hold every row of their batch once, at most the tokens asked for, and hardly any padding."""
    records = corpus(640)
    tokenizer = Tokenizer(PATTERN, learn_bpe("".join(r["response"] for r in records[:100]), 600), 600).add_tags()
    rows, _ = make_rows(records, tokenizer, GPTConfig(block_size=4096))
    full = padded = 0
    for batch in itertools.islice(batches(np.array([len(r.token) for r in rows]), size, 0), len(rows) // size):
        batch = [rows[i] for i in batch]
        groups = micro_batches(batch, 4096)
        assert sorted(id(r) for group in groups for r in group) == sorted(map(id, batch))
        for group in groups:
            fed = collate(group)[0].numel()
            assert fed <= 4096 or len(group) == 1
            full, padded = full + sum(len(r.token) for r in group), padded + fed
    assert 1 - full / padded < 0.10
    assert [len(group) for group in micro_batches(batch, 1)] == [1] * size, "a row too long for the limit goes alone"


def test_collated_rows_equal_rows_alone():
    """In a batch of rows of different lengths, with and without blocks, a model sees each row as if it were alone."""
    rows = [layout([1, 2], random_ids(seed, blocks=seed % 3, branches=2 + seed, long=20), TOKENIZER.special)
            for seed in range(4)]
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=512, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=16,
                          n_inner=16, head_size=8)).double().requires_grad_(False)
    for group in (rows, [rows[0]], [rows[0], rows[3]._replace(block=rows[3].block * 0, branch=rows[3].branch * 0)]):
        idx, position, mask, pick, target = collate(group)
        logits = model(idx, position, mask)
        assert logits.isfinite().all()
        expected_pick, expected_target = [], []
        for i, row in enumerate(group):
            T = len(row.token)
            own = branch_mask(torch.tensor(row.block), torch.tensor(row.branch))[None, None]
            alone = model(torch.tensor(row.token)[None], torch.tensor(row.position)[None], own)
            assert torch.allclose(logits[i, :T], alone[0], rtol=1e-10, atol=1e-12)
            expected_pick += [i * idx.size(1) + t for t in range(T) if row.target[t] != -100]
            expected_target += [t for t in row.target.tolist() if t != -100]
        n = len(expected_pick)
        assert pick[:n].tolist() == expected_pick and target[:n].tolist() == expected_target
        assert (target[n:] == -100).all(), "what fills the last places up has no target"
        assert idx.size(1) % 16 == 0 and len(pick) in (n + -n % 128, idx.numel()), "few shapes"


def test_held_out_prompts_are_never_trained_on():
    """All answers to a prompt fall on one side, the same on every run, in about the share that was asked for."""
    records = [{"prompt": f"prompt {i % 500}", "response": str(i)} for i in range(2000)]
    train, held_out = split_held_out(records, percent=10)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert len(train) + len(held_out) == 2000 and 0.05 < len(held_out) / 2000 < 0.15
    assert split_held_out(records[::-1], percent=10)[1] == held_out[::-1]
    assert split_held_out([{"prompt": "\ud83d", "response": ""}])


def test_serial_twins_leave_out_the_same_answers():
    """Both modes train on the same answers; a serial row holds its answer's ids and nothing else."""
    records = [r for r in corpus(40)] + [{"id": "long", "prompt": "p", "response": "word " * 5000}]
    config = GPTConfig(block_size=1200)
    (tagged, _), (serial, _) = (make_rows(records, TOKENIZER, config, m) for m in ("aspd", "serial"))
    assert 0 < len(tagged) == len(serial) < len(records)
    assert any(r.block.any() for r in tagged) and not any(r.block.any() for r in serial)
    texts = [TOKENIZER.decode(r.target[r.target >= 0].tolist()) for r in serial]
    assert set(texts) < {r["response"] for r in records}
