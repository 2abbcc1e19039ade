"""Tokenizers, learnt and published; published folders: weights and logits, settings, chat forms, refusals.

The rule everywhere: what would change the result is implemented, or the folder is refused in one line that names it.
"""
import json
import random
import re
import time

import pytest
import torch

from data import PATTERN, Tokenizer, corpus, learn_bpe, make_tokenizer, published_tokenizer
from model import from_checkpoint, from_published, read_checkpoint, read_safetensors, save_checkpoint
from published_helpers import (BYTE_LEVEL, FLAGS, MERGES, QWEN, QWEN25, SMOLLM2, SPECIALS, TEMPLATES, publish,
                               published_config, published_weights, with_default, write_safetensors, write_tokenizer)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"


def refusal(function, *args):
    """The message of the ValueError that a call must end in; it is one line."""
    with pytest.raises(ValueError) as e:
        function(*args)
    message = str(e.value)
    assert "\n" not in message and len(message) < 1000
    return message


# -----------------------------------------------------------------------------
# weights

PROMPT = [3, 17, 5, 29, 11]
# Of the last prompt token, by transformers 5.23 in float32: the first six logits, then six greedy tokens.
EXPECTED = {
    ("llama", True): ([-0.23463, -0.20602, -0.92981, -0.7933, -0.50422, -1.95875], [11, 1, 39, 16, 34, 29]),
    ("llama", False): ([1.82358, -1.92273, 1.44658, -1.54639, -0.88443, 1.02799], [26, 15, 26, 15, 26, 18]),
    ("qwen2", True): ([0.53268, 0.91771, -0.47241, 0.59898, 0.82144, 0.64327], [27, 0, 0, 0, 0, 0]),
    ("qwen2", False): ([0.72453, -2.56029, 0.16156, 0.58173, -1.25076, 1.02928], [19, 11, 14, 15, 29, 12]),
}


def forward(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), torch.arange(len(ids))[None])[0]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("model_type,tied", EXPECTED)
def test_logits_are_those_of_transformers(tmp_path, model_type, tied, shards):
    """Llama and Qwen2 (biases), tied and untied, grouped-query attention, one file or several; then greedy text."""
    logits, tokens = EXPECTED[model_type, tied]
    model = from_published(publish(tmp_path / "m", published_config(model_type, tied), shards))
    assert torch.allclose(forward(model, PROMPT)[-1, :6], torch.tensor(logits), rtol=1e-3)
    ids = list(PROMPT)
    for _ in tokens:
        ids.append(int(forward(model, ids)[-1].argmax()))
    assert ids[len(PROMPT):] == tokens


def test_names_that_add_nothing_are_dropped(tmp_path):
    """A copy of the tied embedding as lm_head, and the frequencies that old files hold."""
    config = published_config("llama", True)
    folder = publish(tmp_path / "m", config)
    expected = forward(from_published(folder), PROMPT)
    weights = published_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    write_safetensors(next(folder.glob("*.safetensors")), weights)
    assert torch.equal(forward(from_published(folder), PROMPT), expected)


CHANGED_WEIGHTS = {  # what happens to the tensors, and what the message must name
    "missing": ({"model.layers.1.input_layernorm.weight": None}, "Missing.*layers.1.input_layernorm"),
    "misshapen": ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight.*\[3\].*\[16\]"),
    "unknown": ({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}, "Unexpected.*q_norm"),
    "a layer too many": ({"model.layers.2.input_layernorm.weight": torch.ones(16)}, "Unexpected.*layers.2"),
    "no head": ({"lm_head.weight": None}, "Missing.*lm_head"),
}


@pytest.mark.parametrize("name", CHANGED_WEIGHTS)
def test_tensors_that_do_not_fit_are_named(tmp_path, name):
    change, named = CHANGED_WEIGHTS[name]
    config = published_config("llama", False)
    folder = publish(tmp_path / "m", config)
    weights = {k: w for k, w in (published_weights(config) | change).items() if w is not None}
    write_safetensors(next(folder.glob("*.safetensors")), weights)
    assert re.search(f"{folder}.*{named}", refusal(from_published, folder))


def test_tensors_of_our_own_checkpoints_are_checked_alike(tmp_path):
    model = from_published(publish(tmp_path / "m", published_config("llama", True)))
    for change, named in [({"model.norm.weight": torch.ones(3)}, "model.norm.weight"), ({"x": torch.ones(1)}, '"x"')]:
        save_checkpoint(tmp_path, config=vars(model.config), model=model.state_dict() | change)
        assert named in refusal(from_checkpoint, read_checkpoint(tmp_path), tmp_path)
    save_checkpoint(tmp_path, config=vars(model.config), model=model.state_dict())
    assert torch.equal(forward(from_checkpoint(read_checkpoint(tmp_path)), PROMPT), forward(model, PROMPT))


# --- which files


def write_index(folder, files):
    """model.safetensors.index.json, naming these files."""
    names = published_weights(json.loads((folder / "config.json").read_text()))
    weight_map = {name: files[k % len(files)] for k, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_index_decides_which_files_are_read(tmp_path):
    """A stale file beside two shards is ignored; a shard that is missing is named."""
    config = published_config("llama", True)
    folder = publish(tmp_path / "m", config, shards=2)
    expected = forward(from_published(folder), PROMPT)
    write_safetensors(folder / "model.safetensors", {k: 2 * w for k, w in published_weights(config).items()})
    write_index(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    assert torch.equal(forward(from_published(folder), PROMPT), expected)
    write_index(folder, ["model-00001-of-00002.safetensors", "model-00009-of-00009.safetensors"])
    assert "model-00009-of-00009.safetensors" in refusal(from_published, folder)
    for index in ("{}", "[]", '{"weight_map": 3}', "{"):
        (folder / "model.safetensors.index.json").write_text(index)
        refusal(from_published, folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Without an index nobody can tell which of them is meant."""
    folder = publish(tmp_path / "m", published_config("llama", True))
    file, other = next(folder.glob("*.safetensors")), folder / "other.safetensors"
    other.write_bytes(file.read_bytes())
    message = refusal(from_published, folder)
    assert (str(file) in message or str(other) in message) and "model." in message


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = publish(tmp_path / "m", published_config("llama", True))
    next(folder.glob("*.safetensors")).unlink()
    assert str(folder) in refusal(from_published, folder)


# --- settings


def logits_with(tmp_path, **changes):
    """Logits of the tiny model under changed settings; None: the setting is left out."""
    config = {k: v for k, v in (published_config("llama", True) | changes).items() if v is not None}
    folder = publish(tmp_path / "m", published_config("llama", True))
    (folder / "config.json").write_text(json.dumps(config))
    return forward(from_published(folder), PROMPT)


THETA = {  # where a theta of 9000 may stand
    "at the top": dict(rope_theta=9000.0),
    "in rope_parameters": dict(rope_theta=None, rope_parameters={"rope_theta": 9000.0, "rope_type": "default"}),
    "in rope_scaling": dict(rope_theta=None, rope_scaling={"rope_theta": 9000, "type": "default"}),
    "beside another dict": dict(rope_theta=None, rope_scaling={"rope_type": "default"},
                                rope_parameters={"rope_theta": 9000.0}),
    "beside a null": dict(rope_theta=None, rope_scaling={"rope_theta": None, "rope_type": None},
                          rope_parameters={"rope_theta": 9000.0}),
}


@pytest.mark.parametrize("place", THETA)
def test_theta_is_found_wherever_it_stands(tmp_path, place):
    assert torch.equal(logits_with(tmp_path, **THETA[place]), logits_with(tmp_path, rope_theta=9000.0))
    assert not torch.allclose(logits_with(tmp_path, **THETA[place]), logits_with(tmp_path), rtol=1e-3)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    harmless = dict(rope_scaling=None, use_sliding_window=False, sliding_window=4096, attention_dropout=0.0,
                    layer_types=["full_attention"] * 2, torch_dtype="float32", quantization_config=None)
    from_published(publish(tmp_path / "m", published_config("qwen2", True, **harmless)))


UNSUPPORTED = {  # a change of config.json, and what the message must name
    "llama3": (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_type.*llama3"),
    "linear": (dict(rope_scaling={"type": "linear", "factor": 2.0}), "type.*linear"),
    "yarn": (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}), "rope_type.*yarn"),
    "yarn beside a null": (dict(rope_scaling={"type": "yarn", "rope_type": None}), "type.*yarn"),
    "yarn beside a default": (dict(rope_scaling={"rope_type": "yarn"}, rope_parameters={"rope_type": "default"}), "yarn"),
    "rope by layer type": (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "full_attention"),
    "rope is a list": (dict(rope_scaling=[1]), ""),
    "sliding window": (dict(use_sliding_window=True, sliding_window=32), "use_sliding_window"),
    "sliding layers": (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types.*sliding_attention"),
    "experts": (dict(num_local_experts=8), "num_local_experts"),
    "gelu": (dict(hidden_act="gelu"), "hidden_act.*gelu"),
    "biases": (dict(attention_bias=True), "attention_bias"),
    "more biases": (dict(mlp_bias=True), "mlp_bias"),
    "partial": (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "quantised": (dict(quantization_config={"bits": 4}), "quantization_config"),
    "mistral": (dict(model_type="mistral"), "model_type.*mistral"),
    "code of its own": (dict(auto_map={"AutoModelForCausalLM": "modeling.Mine"}), "auto_map"),
    "no width": (dict(hidden_size=None), "hidden_size"),
    "no heads": (dict(num_attention_heads=None), "num_attention_heads"),
    "no head at all": (dict(num_attention_heads=0), ""),
    "width is text": (dict(hidden_size="16"), ""),
    "theta is text": (dict(rope_theta="large"), "large"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, name):
    changes, named = UNSUPPORTED[name]
    assert re.search(f"config.json.*{named}", refusal(lambda: logits_with(tmp_path, **changes)))


def test_config_that_is_not_json_is_refused(tmp_path):
    folder = publish(tmp_path / "m", published_config("llama", True))
    for content in ('{"model_type": ', "[1, 2]", "", "\xff"):
        (folder / "config.json").write_text(content, encoding="latin-1")
        assert "config.json" in refusal(from_published, folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(from_published, folder)


# --- safetensors


def test_safetensors_are_read_as_written(tmp_path):
    """Scalars and every supported type; the file stays as it is when a tensor is changed."""
    path = tmp_path / "x.safetensors"
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0), "c": torch.ones(1)}
    write_safetensors(path, weights)
    before = path.read_bytes()
    tensors = read_safetensors(path)
    assert tensors.keys() == weights.keys() and all(torch.equal(tensors[k], weights[k]) for k in weights)
    tensors["a"] += 1
    assert path.read_bytes() == before
    for name, dtype in [("F64", torch.float64), ("F16", torch.float16), ("BF16", torch.bfloat16)]:
        raw = torch.tensor([1.5, -2.0], dtype=dtype)
        write_raw(path, {"t": {"dtype": name, "shape": [2], "data_offsets": [0, 2 * dtype.itemsize]}},
                  raw.view(torch.uint8).numpy().tobytes())
        assert torch.equal(read_safetensors(path)["t"], raw)


def write_raw(path, header, data):
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


LIES = {  # a header for 24 bytes of data, and what the message must name
    "longer than the file": ({"t": {"dtype": "F32", "shape": [7], "data_offsets": [0, 28]}}, "tensor t.*28"),
    "offsets outside": ({"t": {"dtype": "F32", "shape": [6], "data_offsets": [8, 32]}}, "tensor t.*32"),
    "negative offset": ({"t": {"dtype": "F32", "shape": [6], "data_offsets": [-8, 16]}}, "tensor t"),
    "end before begin": ({"t": {"dtype": "F32", "shape": [-2], "data_offsets": [16, 8]}}, "tensor t"),
    "end before begin, shape unknown": ({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "tensor t"),
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
    write_raw(path, header, bytes(24))
    assert re.search(f"lie.safetensors.*{named}", refusal(read_safetensors, path))


BROKEN = {"empty": b"", "cut off": b"\x05\0\0", "huge header": (2**63).to_bytes(8, "little") + b"{}",
          "header past the end": (3).to_bytes(8, "little") + b"{}",
          "not JSON": (9).to_bytes(8, "little") + b'{"t": {"d', "not UTF-8": (4).to_bytes(8, "little") + b"\xff\xfe{}"}


@pytest.mark.parametrize("name", BROKEN)
def test_file_that_is_not_safetensors_is_refused(tmp_path, name):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BROKEN[name])
    assert "bad.safetensors" in refusal(read_safetensors, path)


# --- Git LFS

@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_says_what_to_do_about_the_model(tmp_path, name):
    folder = publish(tmp_path / "m", published_config("llama", True))
    (folder / name).write_text(POINTER)
    message = refusal(from_published, folder)
    assert name in message and "git lfs pull" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                  "chat_template.jinja"])
def test_a_git_lfs_pointer_says_what_to_do_about_the_tokenizer(tmp_path, name):
    (write_tokenizer(tmp_path) / name).write_text(POINTER)
    message = refusal(published_tokenizer, tmp_path)
    assert name in message and "git lfs pull" in message


# -----------------------------------------------------------------------------
# the tokenizer itself

BYTES = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, eos=256).add_tags()
TAGS = "<|title|> <|/title|> <|para|> <|/para|> <|branch|> <|/branch|> <|endoftext|> <|im_end|> <eos>".split()


def test_user_text_never_becomes_a_special_token():
    """Whatever a text or a prompt contains, its ids are those of bytes."""
    for text in [*TAGS, "".join(TAGS), "a<|branch|>b", " ".join(TAGS), "{prompt} {system} {0} {"]:
        assert max(BYTES.encode(text)) < 256 and max(BYTES.prompt(text, system=text)) < 256
        assert BYTES.decode(BYTES.encode(text)) == text
        assert BYTES.decode(BYTES.prompt(text, system=text)) == f"{text}\nUser: {text}\nAssistant:\n"
        assert BYTES.decode(BYTES.prompt(text)) == f"User: {text}\nAssistant:\n"


def test_any_text_survives_the_round_trip_and_surrogates_become_the_replacement_character():
    rng = random.Random(0)

    def character():
        return chr(rng.choice([rng.randrange(128), rng.randrange(0x800), rng.randrange(0xD000, 0xE100),
                               rng.randrange(0x110000)]))

    learnt = Tokenizer(PATTERN, learn_bpe("two tips and two more tips " * 9, 300), 300).add_tags()
    for tokenizer in (BYTES, learnt):
        for _ in range(200):
            text = "".join(character() for _ in range(20)) + rng.choice(TAGS)
            back = tokenizer.decode(tokenizer.encode(text))
            assert re.sub("\ufffd+", "\ufffd", back) == re.sub("[\ud800-\udfff\ufffd]+", "\ufffd", text)


def test_lacking_bytes_become_the_replacement_character():
    """A vocabulary without some bytes of a character never fails; the characters around it survive."""
    ranks = {bytes([b]): b for b in range(256) if b not in (0x00, 0xF0)}
    tokenizer = Tokenizer(PATTERN, ranks, 256)
    assert tokenizer.decode(tokenizer.encode("a\x00b\U0001f600c \u00e9")) == "a\ufffdb\ufffdc \u00e9"


def test_learnt_vocabulary_is_usable():
    """All bytes, no more than asked for, one id each, always the same; it shortens text that it was not learnt from."""
    train, fresh = ("\n".join(r["response"] for r in corpus(120, seed=s)) for s in (1, 2))
    ranks = learn_bpe(train, 600)
    assert ranks == learn_bpe(train, 600) and sorted(ranks.values()) == list(range(600))
    assert all(ranks[bytes([b])] == b for b in range(256))
    tokenizer = Tokenizer(PATTERN, ranks, eos=600)
    ids = tokenizer.encode(fresh)
    assert tokenizer.decode(ids) == fresh and len(ids) < 0.45 * len(fresh.encode())


def test_vocabulary_is_learnt_from_any_text():
    """Little text, none at all, and text that UTF-8 cannot write."""
    for text in ("", "a", "ab ab ab", "x \ud83d x \ud83d"):
        assert len(learn_bpe(text)) >= 256


def test_tokenizer_is_made_by_name(tmp_path):
    """Learnt from texts, or of a folder; tags get ids of their own. Another name is an error."""
    learnt = make_tokenizer("bpe", iter(["a list of a list"] * 9))
    published = make_tokenizer(str(write_tokenizer(tmp_path, added=["<tool_call>"])), [])
    for tokenizer in (learnt, published):
        assert tokenizer.tags is None
        tokenizer = tokenizer.add_tags()
        assert len(set(tokenizer.tags)) == 6 and max(tokenizer.tags) == tokenizer.vocab_size - 1
        assert not {*tokenizer.tags} & {*tokenizer.bytes, *tokenizer.stop, *tokenizer.settings["taken"]}
    with pytest.raises(ValueError, match="no-such-name"):
        make_tokenizer("no-such-name", [])


# -----------------------------------------------------------------------------
# the tokenizer: ids

SAMPLE = ("the 12 the's THE'S  the\n\n12. x\n\n \n  1212  12    the\n\nthe cafe\u0301 \u00e9 caf\u00e9.\n\n"
          ".\nend\t\t1\u00bd\u2167 \u0663\u0664 <|im_end|><|branch|> 's' \u6f22\u5b57 \U0001f600\x00"
          "\r\n\r\nim_end \u2028 \u00a012 ")
# The ids that the tokenizers library 0.23.3 gives, with special tokens in the text taken as text.
IDS = {
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


@pytest.mark.parametrize("name", IDS)
def test_ids_are_those_of_the_tokenizers_library(tmp_path, name):
    """GPT-2's pattern, SmolLM2's digits split off before it, Qwen2's own pattern after NFC."""
    tokenizer = published_tokenizer(write_tokenizer(tmp_path, name))
    assert tokenizer.encode(SAMPLE) == IDS[name]
    special = {tokenizer.eos - 2, tokenizer.eos - 1, tokenizer.eos}
    assert not special & {*IDS[name], *tokenizer.bytes}, "no text becomes a special token"
    assert tokenizer.tags is None
    tags = tokenizer.add_tags().tags
    assert tags == tuple(range(tags[0], tags[0] + 6)) and tags[0] > max(*tokenizer.bytes, *special)


ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "\u00e9t\u00e9", "13"]


@pytest.mark.parametrize("name", IDS)
def test_added_tokens_that_are_not_special_are_text(tmp_path, name):
    """They are matched before all else, anywhere in a text, as the libraries do it; nothing is lost."""
    tokenizer = published_tokenizer(write_tokenizer(tmp_path, name, added=ADDED))
    ids = [tokenizer.encode(text) for text in ADDED]
    assert [len(i) for i in ids] == [1] * 5 and len({i[0] for i in ids}) == 5
    call, _, _, summer, thirteen = (i[0] for i in ids)
    x, y = tokenizer.encode("x")[0], tokenizer.encode("y")[0]
    assert tokenizer.encode("x<tool_call>x \u00e9t\u00e9s131") == [
        x, call, x, *tokenizer.encode(" "), summer, *tokenizer.encode("s"), thirteen, *tokenizer.encode("1")]
    assert tokenizer.encode("<tool_call") == tokenizer.encode("<tool_") + tokenizer.encode("call")
    pieces = [*ADDED, *SPECIALS, "<", "tool_call", "> ", " 1", "3", "\u00e9", "t", "\n", "the"]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=9))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not {tokenizer.eos - 2, tokenizer.eos - 1, tokenizer.eos} & {*tokenizer.encode(text)}
    assert not {*tokenizer.add_tags().tags} & {call, summer, thirteen}


def test_surrogates_and_lacking_bytes_become_the_replacement_character(tmp_path):
    """As some published vocabularies lack rare bytes: never a crash, and what stands around survives."""
    def without_zero(t):
        del t["model"]["vocab"]["\u0100"]  # the byte 0

    tokenizer = published_tokenizer(write_tokenizer(tmp_path, "smollm2", change=without_zero))
    assert tokenizer.decode(tokenizer.encode("a\x00b\U0001f600 \u00e9")) == "a\ufffdb\U0001f600 \u00e9"
    assert re.fullmatch("a\ufffd+b", tokenizer.decode(tokenizer.encode("a\ud83db")))


def test_checkpoint_restores_the_tokenizer(tmp_path):
    """Ranks that are not text, tags or none, added tokens, a chat form, all ends and a normaliser."""
    write_tokenizer(tmp_path, "qwen2", QWEN25, added=ADDED)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [279, 277]}')
    published = published_tokenizer(tmp_path)
    for tokenizer in (published, published.add_tags()):
        save_checkpoint(tmp_path, tokenizer=tokenizer.settings)
        again = Tokenizer(**read_checkpoint(tmp_path)["tokenizer"])
        assert again.settings == tokenizer.settings and again.vocab_size == tokenizer.vocab_size
        assert again.tags == tokenizer.tags and again.stop == tokenizer.stop and again.eos == tokenizer.eos
        assert again.bytes == tokenizer.bytes
        for text in (SAMPLE, "<|branch|>\ud800<tool_call>"):
            assert again.encode(text) == tokenizer.encode(text) and again.prompt(text) == tokenizer.prompt(text)


# -----------------------------------------------------------------------------
# the tokenizer: what is refused


def put(value, *path):
    """A change that sets t[path[0]][path[1]]... to a value."""
    def change(t):
        for key in path[:-1]:
            t = t[key]
        t[path[-1]] = value
    return change


def without(*path):
    """A change that removes t[path[0]][path[1]]..."""
    def change(t):
        for key in path[:-1]:
            t = t[key]
        del t[path[-1]]
    return change


def with_token(token, i=999, **flags):
    """A change that adds an added token."""
    def change(t):
        t["added_tokens"].append({"id": i, "content": token, **FLAGS, "special": False} | flags)
    return change


def with_words(words, *merges):
    """A change that adds tokens of the BPE and merges."""
    def change(t):
        t["model"]["vocab"] |= {word: 900 + i for i, word in enumerate(words)}
        t["model"]["merges"] = MERGES + list(merges)
    return change


BEFORE = ["pre_tokenizer", "pretokenizers"]
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False}
BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>"}}]}
REFUSED = {  # a change of tokenizer.json, and what the message must name
    "normalizer": (put({"type": "Lowercase"}, "normalizer"), "normalizer.*Lowercase"),
    "normalizers": (put({"type": "Sequence", "normalizers": []}, "normalizer"), "normalizer.*Sequence"),
    "pre_tokenizer": (put({"type": "Whitespace"}, "pre_tokenizer"), "pre_tokenizer.*Whitespace"),
    "no pre_tokenizer": (put(None, "pre_tokenizer"), "pre_tokenizer"),
    "grouped digits": (put(False, *BEFORE, 0, "individual_digits"), "pre_tokenizer.*individual_digits"),
    "add_prefix_space": (put({**BYTE_LEVEL, "add_prefix_space": True}, *BEFORE, 1), "add_prefix_space"),
    "no regex": (put({**BYTE_LEVEL, "use_regex": False}, *BEFORE, 1), "pre_tokenizer.*use_regex"),
    "removing split": (put([{**SPLIT, "behavior": "Removed"}, {**BYTE_LEVEL, "use_regex": False}], *BEFORE), "pre_token"),
    "split by text": (put([{**SPLIT, "pattern": {"String": " "}}, {**BYTE_LEVEL, "use_regex": False}], *BEFORE), ""),
    "two splits": (put([SPLIT, SPLIT, {**BYTE_LEVEL, "use_regex": False}], *BEFORE), "pre_tokenizer"),
    "broken regex": (put([{**SPLIT, "pattern": {"Regex": "(a"}}, {**BYTE_LEVEL, "use_regex": False}], *BEFORE), ""),
    "byte_fallback": (put(True, "model", "byte_fallback"), "byte_fallback"),
    "dropout": (put(0.1, "model", "dropout"), "dropout"),
    "prefix": (put("##", "model", "continuing_subword_prefix"), "continuing_subword_prefix"),
    "suffix": (put("</w>", "model", "end_of_word_suffix"), "end_of_word_suffix"),
    "Unigram": (put("Unigram", "model", "type"), "Unigram"),
    "no merges": (without("model", "merges"), "merges"),
    "no added tokens": (without("added_tokens"), "added_tokens"),
    "BOS": (put(BOS, "post_processor"), "token before"),
    "BOS of another kind": (put({"type": "RobertaProcessing", "sep": ["</s>", 2]}, "post_processor"), "token before"),
    # the BPE must be what tiktoken computes
    "merges out of order": (put(MERGES[::-1], "model", "merges"), "order.*merges"),
    "merge of one part": (put(MERGES + ["Ġ"], "model", "merges"), "merge.*Ġ"),
    "merge of three parts": (put(MERGES + [["t", "h", "e"]], "model", "merges"), "merge.*'h'"),
    "merge is a number": (put(MERGES + [3], "model", "merges"), "tokenizer.json"),
    "merge of unknown parts": (put(MERGES + ["zz e"], "model", "merges"), "merge.*zz"),
    "merge into an unknown token": (put(MERGES + ["z e"], "model", "merges"), "merge.*'z', 'e'"),
    "token without merges": (with_words(["ing"]), "token 'ing'"),
    "token that an earlier merge takes apart": (with_words(["ez", "hez"], "e z", "h ez"), "token 'hez'"),
    "character of no byte": (with_words(["漢"]), "漢"),
    "special token of the BPE": (with_token("Ġthe", 261, special=True), "the"),
    "repeated id": (put(30, "model", "vocab", "the"), "one id|an id|id"),
    "repeated id of an added token": (with_token("<x>", 30), "id"),
    "added token with two ids": (with_token("the", 999), "id|the"),
    "negative id": (put(-1, "model", "vocab", "the"), "tokenizer.json|order"),
    "id is text": (put("30", "model", "vocab", "z"), ""),
    # added tokens
    "single_word": (with_token("<x>", single_word=True), "<x>"),
    "lstrip": (with_token("<x>", lstrip=True), "<x>"),
    "rstrip of a special token": (put(True, "added_tokens", 2, "rstrip"), "im_end"),
    "empty": (with_token(""), "added"),
    "part of a special token": (with_token("<|im"), "'<|im'"),
    "not an object": (put([1, 2], "added_tokens"), "tokenizer.json"),
    "no model": (put(None, "model"), "tokenizer.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_tokenizer_is_refused_by_name(tmp_path, name):
    change, named = REFUSED[name]
    write_tokenizer(tmp_path / "m", "smollm2", change=change)
    message = refusal(published_tokenizer, tmp_path / "m")
    assert re.search(f"{tmp_path / 'm'}.*({named})", message), message


def test_merges_may_be_pairs(tmp_path):
    """Newer files write a merge as a list of two."""
    pairs = put([m.split(" ") for m in MERGES], "model", "merges")
    assert published_tokenizer(write_tokenizer(tmp_path, "gpt2", change=pairs)).encode(SAMPLE) == IDS["gpt2"]


def test_a_large_vocabulary_is_checked_in_seconds(tmp_path):
    """151,000 tokens, each out of merges of its own."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    syllables = [a.upper() + b for a in letters for b in letters]
    merges = [tuple(s) for s in syllables] + [(a, b) for a in syllables for b in syllables][:150_000]

    def change(t):
        for old in MERGES:
            del t["model"]["vocab"][old.replace(" ", "")]
        t["model"]["vocab"] |= {"".join(merge): 1000 + n for n, merge in enumerate(merges)}
        t["model"]["merges"] = merges

    write_tokenizer(tmp_path, "qwen2", change=change)
    start = time.perf_counter()
    tokenizer = published_tokenizer(tmp_path)
    assert time.perf_counter() - start < 10
    assert len(tokenizer.encode("AaBb")) == 1 and tokenizer.decode(tokenizer.encode("AaBbCcD")) == "AaBbCcD"


def test_folder_without_a_readable_tokenizer_is_refused(tmp_path):
    assert "tokenizer.json" in refusal(published_tokenizer, tmp_path)
    for content in ('{"model": ', "[1]", "3", "null"):
        (tmp_path / "tokenizer.json").write_text(content)
        assert "tokenizer.json" in refusal(published_tokenizer, tmp_path)


# -----------------------------------------------------------------------------
# the tokenizer: what ends an answer


def test_every_end_of_text_id_ends_an_answer(tmp_path):
    """Of tokenizer_config.json, config.json and generation_config.json; Qwen lists two."""
    write_tokenizer(tmp_path, eos_token={"content": "<|im_end|>", "lstrip": False})
    tokenizer = published_tokenizer(tmp_path)
    assert tokenizer.eos == 2 and tokenizer.stop == {2}
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    assert published_tokenizer(tmp_path).stop == {0, 2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1, 0]}')
    tokenizer = published_tokenizer(tmp_path)
    assert tokenizer.eos == 2 and tokenizer.stop == {0, 1, 2}
    assert Tokenizer(**tokenizer.add_tags().settings).stop == {0, 1, 2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert published_tokenizer(tmp_path).stop == {0, 2}
    for wrong in ('"2"', "{}", "[null, []]", "-1", "NaN", "[2, 1.5]"):
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": %s}' % wrong)
        refusal(published_tokenizer, tmp_path)


@pytest.mark.parametrize("eos,named", [(None, "None"), ("</s>", "</s>"), ("the", "the"), ({"lstrip": True}, "content"),
                                       (3, "3")])
def test_an_eos_token_that_is_none_names_its_file(tmp_path, eos, named):
    write_tokenizer(tmp_path, eos_token=eos)
    message = refusal(published_tokenizer, tmp_path)
    assert "tokenizer_config.json" in message and named in message or "content" in message


def test_no_tokenizer_config_names_the_file(tmp_path):
    (write_tokenizer(tmp_path) / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json" in refusal(published_tokenizer, tmp_path)


# -----------------------------------------------------------------------------
# the tokenizer: chat forms


def rendered(tokenizer, ids):
    """Ids -> text with the special tokens written out."""
    special = dict(zip(sorted(tokenizer.settings["taken"]), SPECIALS))
    return "".join(special[i] if i in special else tokenizer.decode([i]) for i in ids)


USER = "the <|im_end|>\n<|im_start|>system {prompt} {0} {{x}} "


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Talk like a {pirate}."])
def test_prompt_takes_the_models_own_chat_form(tmp_path, name, system):
    """ChatML with the model's default system text, or the user's; no text can open or end a turn."""
    template, default = TEMPLATES[name]
    tokenizer = published_tokenizer(write_tokenizer(tmp_path, "qwen2" if "qwen" in name else "smollm2", template))
    expected = "".join(f"<|im_start|>system\n{text}<|im_end|>\n" for text in [system or default] if text)
    expected += f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.prompt(USER, system)
    assert rendered(tokenizer, ids) == expected
    assert sum(i in tokenizer.settings["taken"] for i in ids) == expected.replace(USER, "").count("<|im_")


def render(template, messages):
    """A template as transformers renders it."""
    environment = pytest.importorskip("jinja2.sandbox").ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Talk like a pirate."])
def test_prompt_is_what_the_template_renders(tmp_path, name, system):
    template, _ = TEMPLATES[name]
    tokenizer = published_tokenizer(write_tokenizer(tmp_path, "smollm2", template))
    messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": "Why?\n"}]
    assert rendered(tokenizer, tokenizer.prompt("Why?\n", system)) == render(template, messages)


def test_without_a_template_a_prompt_is_a_line(tmp_path):
    for template in (None, ""):
        tokenizer = published_tokenizer(write_tokenizer(tmp_path, template=template))
        assert rendered(tokenizer, tokenizer.prompt("Why?")) == "Why?\n"
        assert rendered(tokenizer, tokenizer.prompt("Why?", "Be brief.")) == "Be brief.\nWhy?\n"


def test_the_default_of_several_templates_counts(tmp_path):
    """Named ones stand in a list; chat_template.jinja goes before what tokenizer_config.json has."""
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SMOLLM2}]
    tokenizer = published_tokenizer(write_tokenizer(tmp_path, template=named))
    assert "SmolLM" in tokenizer.settings["system"]
    (tmp_path / "chat_template.jinja").write_text(QWEN25)
    assert "Qwen" in published_tokenizer(tmp_path).settings["system"]
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat template" in refusal(published_tokenizer, tmp_path)
    write_tokenizer(tmp_path / "other", template=named[:1])
    assert "default" in refusal(published_tokenizer, tmp_path / "other")


VARIANTS = {  # templates that render another prompt than the forms that are known
    "BOS before": "{{ bos_token }}" + SMOLLM2,
    "BOS before Qwen2.5": "{{- bos_token }}" + QWEN25,
    "renamed roles": SMOLLM2.replace("message['role']", "{'user': 'human'}.get(message['role'], message['role'])"),
    "renamed assistant": SMOLLM2.replace("assistant\n", "model\n"),
    "think": SMOLLM2.replace("assistant\n", "assistant\n<think>\n"),
    "think in Qwen2.5": QWEN25.replace(r"'<|im_start|>assistant\n'", r"'<|im_start|>assistant\n<think>\n\n</think>\n\n'"),
    "text after the user's": SMOLLM2.replace("+ '<|im_end|>'", "+ ' Think step by step.<|im_end|>'"),
    "stripped": SMOLLM2.replace("message['content']", "message['content'] | trim"),
    "always the default system text": "{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + TEMPLATES["no default"][0],
    "two system texts": "{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + SMOLLM2,
    "no line break": SMOLLM2.replace("'<|im_end|>' + '\n'", "'<|im_end|>'"),
    "another system text": with_default("Talk like a pirate."),
    "Llama 2": "[INST] {{ messages[0]['content'] }} [/INST]",
    "mentions ChatML": "{# <|im_start|> #}{{ messages[0]['content'] }}",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_template_that_is_not_known_is_refused(tmp_path, name):
    write_tokenizer(tmp_path, "smollm2", VARIANTS[name])
    assert "chat template" in refusal(published_tokenizer, tmp_path)


def test_chatml_needs_its_special_tokens(tmp_path):
    def rename(t):
        t["added_tokens"][1]["content"] = "<|start|>"
        t["model"]["vocab"]["<|start|>"] = t["model"]["vocab"].pop("<|im_start|>")

    write_tokenizer(tmp_path, "smollm2", SMOLLM2, change=rename)
    assert "im_start" in refusal(published_tokenizer, tmp_path)
