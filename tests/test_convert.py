"""Published folders: weights and logits, tokenizers, chat forms, and what is refused.

The rule everywhere: what would change the result is computed, or the folder is refused in one line
that names the setting and its value. The last section compares with transformers where that is
installed; the figures in the other ones are transformers', too.
"""
import json
import random
import re
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import pytest
import torch

import convert
import decode
import train
from aspd import BadInput
from convert import (SENTENCEPIECE, TAG_WORDS, grow, load_weights, published_config,
                     published_tokenizer, read_json, read_safetensors)
from data import PATTERN, Tokenizer, cli, corpus, learn_tokenizer
from helpers import write_answers
from model import GPT, read_checkpoint, rope, save_checkpoint
from published_helpers import (BYTE_LEVEL, FLAGS, HEADERS, MERGES, QWEN, QWEN25, SMOLLM2, SPECIALS,
                               TEMPLATES, THINKING, publish, published_weights, split, write_chat,
                               write_raw, write_safetensors, write_tokenizer)
from published_helpers import published_config as config_json
from test_gpt import tiny

ROOT = Path(__file__).parent.parent
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"


def refusal(function, *args, **settings):
    """The message of the error, of those that a command line tells, that a call must end in; it is
    one line."""
    with pytest.raises((BadInput, OSError)) as e:
        function(*args, **settings)
    message = str(e.value)
    assert "\n" not in message and len(message) < 1000
    return message


# ---- weights ----------------------------------------------------------------

PROMPT = [3, 17, 5, 29, 11]
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)
LINEAR = {"type": "linear", "factor": 4.0}
# Of the last prompt token, by transformers 5.24 in float32: the first six logits, then six greedy
# tokens.
EXPECTED = {
    ("llama", True, None): (
        [-0.23463, -0.20602, -0.92981, -0.7933, -0.50422, -1.95875], [11, 1, 39, 16, 34, 29]),
    ("llama", False, None): (
        [1.82358, -1.92273, 1.44658, -1.54639, -0.88443, 1.02799], [26, 15, 26, 15, 26, 18]),
    ("qwen2", True, None): (
        [0.53268, 0.9177, -0.47241, 0.59898, 0.82144, 0.64327], [27, 0, 0, 0, 0, 0]),
    ("qwen2", False, None): (
        [0.72453, -2.56029, 0.16156, 0.58173, -1.25076, 1.02928], [19, 11, 14, 15, 29, 12]),
    ("qwen3", True, None): (
        [0.78189, 1.16307, -0.25569, -0.40141, 0.27771, 0.26639], [26, 26, 26, 26, 26, 26]),
    ("qwen3", False, None): (
        [0.91542, 0.15425, 1.32661, 1.49611, -0.56213, 2.562], [33, 18, 12, 18, 18, 18]),
    ("llama", True, "linear"): (
        [-1.97383, 1.15166, 0.36701, 1.473, 0.26424, -1.31249], [39, 39, 29, 29, 29, 29]),
    ("llama", True, "llama3"): (
        [-1.70455, 2.01507, -0.87991, 1.02531, 0.07969, -1.29833], [18, 39, 18, 29, 29, 29]),
    ("qwen3", False, "llama3"): (
        [0.67721, 0.42313, 1.50287, 1.3151, -0.67317, 2.30478], [18, 17, 19, 33, 24, 27]),
}
ROPES = {None: {}, "linear": {"rope_scaling": LINEAR}, "llama3": {"rope_scaling": LLAMA3_ROPE}}


def from_published(folder, dtype=None):
    """The model alone."""
    with torch.device("meta"):
        model = GPT(published_config(read_json(folder / "config.json")))
    load_weights(model, folder, dtype)
    return model


def causal(ids):
    """What GPT.forward() takes."""
    mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).tril()
    return torch.tensor([ids]), torch.arange(len(ids))[None], mask


def forward(model, ids):
    with torch.no_grad():
        return model(*causal(ids))[0]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("model_type,tied,rope", EXPECTED)
def test_logits_are_those_of_transformers(tmp_path, model_type, tied, rope, shards):
    """Llama, Qwen2 (biases) and Qwen3 (norms, wide heads), tied and untied, grouped-query
    attention, plain and scaled positions, one file or several; then greedy text."""
    logits, tokens = EXPECTED[model_type, tied, rope]
    model = from_published(publish(tmp_path / "m", config_json(model_type, tied, **ROPES[rope]),
                                   shards))
    assert torch.allclose(forward(model, PROMPT)[-1, :6], torch.tensor(logits), rtol=1e-3)
    ids = list(PROMPT)
    for _ in tokens:
        ids.append(int(forward(model, ids)[-1].argmax()))
    assert ids[len(PROMPT):] == tokens


def test_names_that_add_nothing_are_dropped(tmp_path):
    """A copy of the tied embedding as lm_head, and the frequencies that old files hold."""
    config = config_json("llama", True)
    folder = publish(tmp_path / "m", config)
    expected = forward(from_published(folder), PROMPT)
    weights = published_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    write_safetensors(folder / "model.safetensors", weights)
    assert torch.equal(forward(from_published(folder), PROMPT), expected)


CHANGED_WEIGHTS = {  # what happens to the tensors, and what the message must name
    "missing": ({"model.layers.1.input_layernorm.weight": None}, "Missing.*layers.1.input_lay"),
    "misshapen": ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight.*\[3\].*\[16\]"),
    "unknown": ({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}, "Unexpected.*q_norm"),
    "a layer too many": ({"model.layers.2.input_layernorm.weight": torch.ones(16)},
                         "Unexpected.*layers.2"),
    "no head": ({"lm_head.weight": None}, "Missing.*lm_head"),
}


@pytest.mark.parametrize("name", CHANGED_WEIGHTS)
def test_tensors_that_do_not_fit_are_named(tmp_path, name):
    change, named = CHANGED_WEIGHTS[name]
    config = config_json("llama", False)
    folder = publish(tmp_path / "m", config)
    weights = {k: w for k, w in (published_weights(config) | change).items() if w is not None}
    write_safetensors(folder / "model.safetensors", weights)
    assert re.search(f"{folder}.*{named}", refusal(from_published, folder))


def write_index(folder, files):
    """model.safetensors.index.json, naming these files."""
    names = published_weights(json.loads((folder / "config.json").read_text()))
    weight_map = {name: files[k % len(files)] for k, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_index_decides_which_files_are_read(tmp_path):
    """A stale file beside two shards is ignored; a shard that is missing is named."""
    config = config_json("llama", True)
    folder = publish(tmp_path / "m", config, shards=2)
    expected = forward(from_published(folder), PROMPT)
    stale = {k: 2 * w for k, w in published_weights(config).items()}
    write_safetensors(folder / "model.safetensors", stale)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write_index(folder, shards)
    assert torch.equal(forward(from_published(folder), PROMPT), expected)
    write_index(folder, [shards[0], "model-00009-of-00009.safetensors"])
    assert "model-00009-of-00009.safetensors" in refusal(from_published, folder)
    for index in ("{}", "[1]", '{"weight_map": 3}', "{"):
        (folder / "model.safetensors.index.json").write_text(index)
        assert "model.safetensors.index.json" in refusal(from_published, folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Without an index nobody can tell which of them is meant."""
    folder = publish(tmp_path / "m", config_json("llama", True))
    other = folder / "other.safetensors"
    other.write_bytes((folder / "model.safetensors").read_bytes())
    assert re.search(f"{other}.*model.embed_tokens.weight", refusal(from_published, folder))


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = publish(tmp_path / "m", config_json("llama", True))
    (folder / "model.safetensors").unlink()
    assert re.search(rf"{folder}.*no \*.safetensors", refusal(from_published, folder))


# --- settings

def logits_with(tmp_path, **changes):
    """Logits of the tiny model under changed settings; None: the setting is left out."""
    config = config_json("llama", True) | changes
    folder = publish(tmp_path / "m", config_json("llama", True))
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return forward(from_published(folder), PROMPT)


PARAMETERS = {"rope_theta": 9000.0, "rope_type": "default"}
THETA = {  # where a theta of 9000 may stand
    "at the top": dict(rope_theta=9000.0),
    "in rope_parameters": dict(rope_theta=None, rope_parameters=PARAMETERS),
    "in rope_scaling": dict(rope_theta=None, rope_scaling={"rope_theta": 9000, "type": "default"}),
    "in both": dict(rope_theta=None, rope_scaling=PARAMETERS, rope_parameters=PARAMETERS),
    "beside a null": dict(rope_parameters={"rope_theta": 9000.0, "rope_type": None}),
}


@pytest.mark.parametrize("place", THETA)
def test_theta_is_found_wherever_it_stands(tmp_path, place):
    found = logits_with(tmp_path, **THETA[place])
    assert torch.equal(found, logits_with(tmp_path, rope_theta=9000.0))
    assert not torch.allclose(found, logits_with(tmp_path), rtol=1e-3)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    harmless = dict(rope_scaling=None, use_sliding_window=False, sliding_window=4096,
                    attention_dropout=0.0, layer_types=["full_attention"] * 2,
                    torch_dtype="float32", quantization_config=None)
    from_published(publish(tmp_path / "m", config_json("qwen2", True, **harmless)))


UNSUPPORTED = {  # a change of config.json, and what the message must name
    "yarn": (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_type = 'yarn'"),
    "dynamic": (dict(rope_scaling={"type": "dynamic", "factor": 4.0}), "type = 'dynamic'"),
    "longrope": (dict(rope_scaling={"rope_type": "longrope"}), "rope_type = 'longrope'"),
    "yarn beside a null": (dict(rope_scaling={"type": "yarn", "rope_type": None}), "type = 'yarn'"),
    "two ropes": (dict(rope_scaling={"rope_type": "linear", "factor": 2.0},
                       rope_parameters={"rope_type": "default"}), "rope_parameters.*differs"),
    "no factor": (dict(rope_scaling={"type": "linear"}), "no 'factor'"),
    "no speed": (dict(rope_scaling={"type": "linear", "factor": 0}), "factor = 0"),
    "no ramp": (dict(rope_scaling=LLAMA3_ROPE | {"low_freq_factor": 4.0}),
                "low_freq_factor = 4.0, high_freq_factor = 4.0"),
    "no old context": (dict(rope_scaling={k: v for k, v in LLAMA3_ROPE.items() if k[:4] != "orig"}),
                       "no 'original_max_position_embeddings'"),
    "rope by layer type": (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
                           "full_attention = .*rope_theta"),
    "rope is a list": (dict(rope_scaling=[1]), r"rope_scaling = \[1\]"),
    "sliding window": (dict(use_sliding_window=True), "use_sliding_window = True"),
    "sliding layers": (dict(layer_types=["full_attention", "sliding_attention"]),
                       "layer_types = 'sliding_attention'"),
    "experts": (dict(num_local_experts=8), "num_local_experts = 8"),
    "gelu": (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "biases": (dict(attention_bias=True), "attention_bias = True"),
    "more biases": (dict(mlp_bias=True), "mlp_bias = True"),
    "partial": (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    "quantised": (dict(quantization_config={"bits": 4}), "quantization_config = .*bits"),
    "mistral": (dict(model_type="mistral"), "model_type = 'mistral'"),
    "moe": (dict(model_type="qwen3_moe"), "model_type = 'qwen3_moe'"),
    "code of its own": (dict(auto_map={"AutoModel": "modeling.Mine"}), "auto_map = .*Mine"),
    "no width": (dict(hidden_size=None), "no 'hidden_size'"),
    "no heads": (dict(num_attention_heads=None), "no 'num_attention_heads'"),
    "no head at all": (dict(num_attention_heads=0), ""),
    "width is text": (dict(hidden_size="16"), ""),
    "theta is text": (dict(rope_theta="large"), "large"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_computed_is_refused_by_name(tmp_path, name):
    """By the command's own function, whose message names the file, too."""
    changes, named = UNSUPPORTED[name]
    config = {k: v for k, v in config_json(**changes).items() if v is not None}
    write_tokenizer(publish(tmp_path / "m", config_json()))
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    message = refusal(convert.convert, tmp_path / "m", tmp_path / "out")
    assert re.search(f"config.json: .*{named}", message), message
    assert not (tmp_path / "out").exists()


def test_config_that_is_not_json_is_refused(tmp_path):
    folder = publish(tmp_path / "m", config_json("llama", True))
    for content in ('{"model_type": ', "[1, 2]", "", "\xff"):
        (folder / "config.json").write_text(content, encoding="latin-1")
        assert "config.json" in refusal(from_published, folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(from_published, folder)


# --- safetensors

def test_safetensors_are_read_as_written(tmp_path):
    """Scalars and every supported type, or another type; the file stays as it is when a tensor is
    changed."""
    path = tmp_path / "x.safetensors"
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0), "c": torch.ones(1),
               "d": torch.tensor([1.5, -2.0], dtype=torch.float64),
               "e": torch.tensor([1.5, -2.0], dtype=torch.float16),
               "f": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    write_safetensors(path, weights)
    before = path.read_bytes()
    tensors = read_safetensors(path)
    assert tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    tensors["a"] += 1
    assert path.read_bytes() == before
    for name, tensor in read_safetensors(path, torch.bfloat16).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, weights[name].bfloat16())


def entry(shape=(6,), offsets=(0, 24), dtype="F32"):
    return {"t": {"dtype": dtype, "shape": [*shape], "data_offsets": [*offsets]}}


LIES = {  # a header for 24 bytes of data, and what the message must name
    "longer than the file": (entry([7], (0, 28)), "tensor t.*28"),
    "offsets outside": (entry(offsets=(8, 32)), "tensor t.*32"),
    "negative offset": (entry(offsets=(-8, 16)), "tensor t.*-8"),
    "end before begin": (entry([-2], (16, 8)), "tensor t.*16, 8"),
    "end before begin, shape unknown": (entry([-1], (4, 0)), "tensor t.*4, 0"),
    "fewer bytes than the shape": (entry([2, 3], (0, 20)), "tensor t.*20"),
    "more bytes than the shape": (entry([5]), "tensor t.*5"),
    "negative shape": (entry([-2, -3]), "tensor t.*-2"),
    "unknown type": (entry(dtype="I4"), "tensor t.*I4"),
    "fractional shape": (entry([1.5, 4]), "tensor t.*1.5"),
    "no type": ({"t": {"shape": [6], "data_offsets": [0, 24]}}, "tensor t.*dtype"),
    "no shape": ({"t": {"dtype": "F32", "data_offsets": [0, 24]}}, "tensor t.*shape"),
    "one offset": (entry(offsets=[0]), "tensor t"),
    "offsets are text": (entry(offsets=["0", "24"]), "tensor t"),
    "tensor is no object": ({"t": 3}, "tensor t = 3"),
    "header is a list": ([1, 2], "header"),
    "header is a number": (12, "header"),
}


@pytest.mark.parametrize("name", LIES)
def test_header_that_lies_is_refused_with_its_tensor(tmp_path, name):
    header, named = LIES[name]
    path = tmp_path / "lie.safetensors"
    write_raw(path, header, bytes(24))
    assert re.search(f"lie.safetensors.*{named}", refusal(read_safetensors, path))


BROKEN = {"empty": b"", "cut off": b"\x05\0\0",
          "huge header": (2**63).to_bytes(8, "little") + b"{}",
          "header past the end": (3).to_bytes(8, "little") + b"{}",
          "not JSON": (9).to_bytes(8, "little") + b'{"t": {"d',
          "not UTF-8": (4).to_bytes(8, "little") + b"\xff\xfe{}"}


@pytest.mark.parametrize("name", BROKEN)
def test_file_that_is_not_safetensors_is_refused(tmp_path, name):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BROKEN[name])
    assert "bad.safetensors" in refusal(read_safetensors, path)


@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_a_git_lfs_pointer_says_what_to_do(tmp_path, name):
    (complete(tmp_path) / name).write_text(POINTER)
    message = refusal(convert.convert, tmp_path / "m", tmp_path / "out")
    assert name in message and "git lfs pull" in message


# ---- rows for new tokens ----------------------------------------------------

def tables(model):
    """Embedding and head, or the one that is both."""
    head = [] if model.config.tied else [model.lm_head.weight]
    return [model.model.embed_tokens.weight, *head]


@pytest.mark.parametrize("tied", [True, False])
def test_growing_appends_rows_at_the_mean_of_the_given_ones_and_keeps_the_others(tied):
    """64 in all; embedding and head alike. Old tokens keep their logits, new ones start with the
    mean logit of theirs."""
    model = tiny(tied=tied)
    before = [table.clone() for table in tables(model)]
    logits = forward(model, PROMPT)
    groups = [[1, 2], [5], [1, 2, 3, 4], [7, 7, 9], [0, 37], list(range(40))]
    grow(model, groups)
    assert model.config.vocab_size == 64
    after = forward(model, PROMPT)
    assert after.shape == (5, 64)
    for old, new in zip(before, tables(model)):
        assert new.shape == (64, 16)
        assert torch.equal(new[:40], old)
        for i, words in enumerate(groups, start=40):
            assert torch.allclose(new[i], old[words].mean(0), rtol=1e-12, atol=1e-12)
        assert not new[46:].any()
    assert torch.allclose(after[:, :40], logits, rtol=1e-12, atol=1e-12)
    for i, words in enumerate(groups, start=40):
        assert torch.allclose(after[:, i], logits[:, words].mean(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_tags_start_at_the_mean_of_their_words(tmp_path, tied):
    """In the embedding and in the head, behind all published rows, of which none changes."""
    folder = complete(tmp_path, tie_word_embeddings=tied)
    convert.convert(folder, tmp_path / "out")
    state = read_checkpoint(tmp_path / "out")
    tokenizer = Tokenizer(**state["tokenizer"])
    assert tokenizer.tags == tuple(range(512, 518)) and state["config"]["positions"] is None
    assert len(set(TAG_WORDS)) == len(tokenizer.tags)
    published = read_safetensors(folder / "model.safetensors")
    for name in ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied):
        old = published[name]
        new = state["model"][name]
        assert torch.equal(new[:512], old)
        for tag, words in zip(tokenizer.tags, TAG_WORDS):
            assert torch.allclose(new[tag], old[tokenizer.encode(words)].mean(0))


# ---- the tokenizer itself: data.py's ----------------------------------------

BYTES = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, eos=256, tags=range(257, 263))
TAGS = ("<|title|> <|/title|> <|para|> <|/para|> <|branch|> <|/branch|> <|endoftext|> <|im_end|> "
        "<eos>").split()


def test_user_text_never_becomes_a_special_token():
    """Whatever a text or a prompt contains, its ids are those of bytes."""
    for text in [*TAGS, "".join(TAGS), "a<|branch|>b", " ".join(TAGS), "{prompt} {system} {0} {"]:
        assert max(BYTES.encode(text)) < 256 and max(BYTES.prompt(text)) < 256
        assert BYTES.decode(BYTES.encode(text)) == text
        assert BYTES.decode(BYTES.prompt(text)) == f"User: {text}\nAssistant:\n"


def test_any_text_survives_the_round_trip_and_surrogates_become_the_replacement_character():
    rng = random.Random(0)

    def character():
        return chr(rng.choice([rng.randrange(128), rng.randrange(0x800),
                               rng.randrange(0xD000, 0xE100), rng.randrange(0x110000)]))

    for tokenizer in (BYTES, learn_tokenizer(["two tips and two more tips "] * 9)):
        for _ in range(200):
            text = "".join(character() for _ in range(20)) + rng.choice(TAGS)
            back = tokenizer.decode(tokenizer.encode(text))
            assert back == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_learnt_vocabulary_is_usable():
    """All bytes, one id each, always the same, from any text; it shortens text that it was not
    learnt from."""
    train_texts, fresh = ([r["response"] for r in corpus(120, seed=s)] for s in (1, 2))
    tokenizer = learn_tokenizer(train_texts, 600)
    ranks = tokenizer.settings["ranks"]
    assert ranks == learn_tokenizer(train_texts, 600).settings["ranks"]
    assert sorted(ranks.values()) == list(range(len(ranks))) and len(ranks) <= 600
    assert all(ranks[bytes([b])] == b for b in range(256))
    text = "\n".join(fresh)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 0.45 * len(text.encode())
    for text in ("", "a", "ab ab ab", "x \ud83d x \ud83d"):
        assert learn_tokenizer([text]).eos >= 256


# ---- published tokenizers: ids ----------------------------------------------

SAMPLE = ("the 12 the's THE'S  the\n\n12. x\n\n \n  1212  12    the\n\nthe cafe\u0301 \u00e9 "
          "caf\u00e9.\n\n.\nend\t\t1\u00bd\u2167 \u0663\u0664 <|im_end|><|branch|> 's' "
          "\u6f22\u5b57 \U0001f600\x00\r\n\r\nim_end \u2028 \u00a012 ")
# The ids that the tokenizers library 0.23.3 gives to SAMPLE, with special tokens in it taken as
# text; Qwen2's to the NFC form.
IDS = {
    "gpt2": [
        262, 267, 261, 268, 223, 54, 42, 39, 9, 53, 223, 261, 201, 201, 266, 16, 223, 90, 264, 223,
        201, 223, 267, 266, 223, 267, 263, 223, 261, 201, 201, 262, 223, 69, 67, 72, 71, 139, 226,
        271, 223, 69, 67, 72, 270, 16, 201, 201, 16, 201, 71, 80, 70, 200, 200, 19, 129, 124, 161,
        230, 103, 223, 152, 99, 152, 100, 223, 274, 276, 65, 71, 80, 70, 275, 274, 68, 84, 67, 80,
        69, 74, 275, 223, 9, 85, 9, 223, 165, 123, 98, 164, 258, 248, 223, 175, 256, 249, 225, 191,
        204, 201, 204, 201, 276, 65, 71, 80, 70, 223, 161, 225, 104, 223, 129, 257, 266, 223],
    "smollm2": [
        262, 223, 19, 20, 261, 268, 223, 54, 42, 39, 9, 53, 223, 261, 264, 19, 20, 16, 223, 90, 264,
        223, 201, 263, 19, 20, 19, 20, 263, 19, 20, 263, 223, 261, 201, 201, 262, 223, 69, 67, 72,
        71, 139, 226, 271, 223, 69, 67, 72, 270, 16, 201, 201, 16, 201, 71, 80, 70, 200, 200, 19,
        129, 124, 161, 230, 103, 223, 152, 99, 152, 100, 223, 274, 276, 65, 71, 80, 70, 275, 274,
        68, 84, 67, 80, 69, 74, 275, 223, 9, 85, 9, 223, 165, 123, 98, 164, 258, 248, 223, 175, 256,
        249, 225, 191, 204, 201, 204, 201, 276, 65, 71, 80, 70, 223, 161, 225, 104, 223, 129, 257,
        19, 20, 223],
    "qwen2": [
        259, 220, 16, 17, 258, 265, 220, 51, 39, 36, 266, 220, 258, 261, 16, 17, 13, 220, 87, 261,
        220, 198, 220, 220, 16, 17, 16, 17, 220, 220, 16, 17, 260, 220, 258, 261, 259, 220, 66, 64,
        69, 267, 268, 220, 66, 64, 69, 267, 13, 261, 269, 68, 77, 67, 197, 197, 16, 126, 121, 158,
        227, 100, 220, 149, 96, 149, 97, 220, 271, 273, 274, 77, 67, 272, 271, 65, 81, 64, 77, 66,
        71, 272, 220, 6, 82, 6, 220, 162, 120, 95, 161, 255, 245, 220, 172, 253, 246, 222, 188, 201,
        198, 201, 198, 273, 274, 77, 67, 220, 158, 222, 101, 220, 126, 254, 16, 17, 220],
}
V = 1000  # rows of an embedding, more than any tiny tokenizer here has ids


def tokenizer_of(folder, vocab_size=V, **settings):
    return published_tokenizer(folder, vocab_size, **settings)[0]


@pytest.mark.parametrize("name", IDS)
def test_ids_are_those_of_the_tokenizers_library(tmp_path, name):
    """GPT-2's pattern, SmolLM2's digits split off before it, Qwen2's own pattern."""
    tokenizer = tokenizer_of(write_tokenizer(tmp_path, name))
    text = unicodedata.normalize("NFC", SAMPLE) if name == "qwen2" else SAMPLE
    assert tokenizer.encode(text) == IDS[name]
    special = {tokenizer.eos - 2, tokenizer.eos - 1, tokenizer.eos}
    assert not special & {*IDS[name], *tokenizer.bytes}, "no text becomes a special token"
    assert tokenizer.tags == tuple(range(V, V + 6)), "behind the embedding"


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "qwen2", "llama3"])
def test_any_text_comes_back_to_the_letter(tmp_path, name):
    """In normal form or not, with special and added tokens in it; a special one is never made."""
    added = [*THINKING, "<|fim_prefix|>", "\u00e9t\u00e9", "13"]
    tokenizer = tokenizer_of(write_tokenizer(tmp_path, name, added=added))
    pieces = [*added, *SPECIALS, "<", "tool_call", "> ", " 1", "3", "e\u0301", "\u00e9", "t", "\n",
              "the", "\ufb01", "\u1100\u1161", "\x00", "\u212b"]
    rng = random.Random(0)
    special = {tokenizer.eos - 2, tokenizer.eos - 1, tokenizer.eos}
    for text in [SAMPLE, *("".join(rng.choices(pieces, k=9)) for _ in range(300))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not special & {*ids}


def test_added_tokens_that_are_not_special_can_be_written(tmp_path):
    """A model writes "</think>" as one token, which is text."""
    tokenizer = tokenizer_of(write_tokenizer(tmp_path, "qwen2", added=THINKING))
    ids = [i for i, text in tokenizer.bytes.items() if text.decode("utf-8", "replace") in THINKING]
    assert len(ids) == 2 and tokenizer.decode(ids) == "".join(THINKING)
    assert not {*tokenizer.encode("<think>\n\n</think>")} & {*ids}


def test_ignored_merges_leave_a_whole_word_alone(tmp_path):
    """As in Llama 3: "zebra" is a token that no merge makes."""
    def change(t):
        t["model"]["vocab"]["zebra"] = 900

    tokenizer = tokenizer_of(write_tokenizer(tmp_path, "llama3", change=change))
    assert tokenizer.encode("zebra") == [900] and len(tokenizer.encode("zebras")) == 6
    write_tokenizer(tmp_path, "qwen2", change=change)
    assert "the token 'zebra'" in refusal(tokenizer_of, tmp_path)

    def two_parts(t):  # tiktoken would join "the" and "n", which the merges do not
        t["model"]["vocab"]["then"] = 900

    write_tokenizer(tmp_path, "llama3", change=two_parts)
    assert "the token 'then'" in refusal(tokenizer_of, tmp_path)


def test_bytes_that_a_vocabulary_lacks_get_rows(tmp_path):
    """As some published vocabularies lack rare bytes. Nothing that had an id changes."""
    def change(t):
        for c in "\u0100\u0101\u00f0":  # the bytes 0, 1 and 240
            del t["model"]["vocab"][c]

    config = config_json(vocab_size=400, max_position_embeddings=256, tie_word_embeddings=False)
    folder = publish(tmp_path / "m", config)
    write_tokenizer(folder, "smollm2", change=change)
    before = from_published(folder)
    report = convert.convert(folder, tmp_path / "out")
    assert "400 tokens, 3 for bytes that the vocabulary lacks, 6 tags" in report
    lm = decode.load(tmp_path / "out")
    text = "a\x00b\x01 \U0001f600c \u00e9"
    ids = lm.tokenizer.encode(text)
    assert lm.tokenizer.decode(ids) == text and {400, 401, 402} <= {*ids}
    assert forward(lm.model, PROMPT).shape[-1] == lm.model.config.vocab_size == 448
    difference = forward(lm.model, PROMPT)[:, :400] - forward(before, PROMPT)
    assert difference.abs().max() < 1e-5
    known = [i for i, byte in lm.tokenizer.bytes.items() if len(byte) == 1 and i < 400]
    for table in (lm.model.model.embed_tokens, lm.model.lm_head):  # a mean wins over no byte
        mean = table.weight[known].mean(0)
        assert torch.allclose(table.weight[400:403], mean.expand(3, -1), rtol=1e-5)
    assert decode.generate(lm, text, max_new_tokens=4).tokens == 4


def test_a_vocabulary_may_be_padded_but_not_too_small(tmp_path):
    size = 256 + len(MERGES) + len(SPECIALS)
    write_tokenizer(tmp_path)
    assert tokenizer_of(tmp_path, size).tags[0] == size
    message = refusal(tokenizer_of, tmp_path, size - 1)
    assert f"the id {size - 1}" in message and f"vocab_size = {size - 1}" in message


def test_checkpoint_restores_the_tokenizer(tmp_path):
    """Ranks that are not text, a chat form with ids, all ends."""
    write_tokenizer(tmp_path, "qwen2", QWEN25, added=THINKING)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [277, 275]}')
    tokenizer = tokenizer_of(tmp_path)
    save_checkpoint(tmp_path, tokenizer=tokenizer.settings)
    again = Tokenizer(**read_checkpoint(tmp_path)["tokenizer"])
    assert again.settings == tokenizer.settings and again.vocab_size == tokenizer.vocab_size
    assert again.tags == tokenizer.tags and again.stop == tokenizer.stop == {275, 277}
    for text in (SAMPLE, "<|branch|>\ud800<tool_call>"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.prompt(text) == tokenizer.prompt(text)


# ---- published tokenizers: what is refused ----------------------------------

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
        flags_of_it = FLAGS | {"special": False} | flags
        t["added_tokens"].append({"id": i, "content": token, **flags_of_it})
    return change


def with_words(words, *merges):
    """A change that adds tokens of the BPE and merges."""
    def change(t):
        t["model"]["vocab"] |= {word: 900 + i for i, word in enumerate(words)}
        t["model"]["merges"] = MERGES + list(merges)
    return change


BEFORE = ["pre_tokenizer", "pretokenizers"]
PLAIN_SPLIT = split(QWEN)["pretokenizers"][0]
NO_REGEX = {**BYTE_LEVEL, "use_regex": False}
REFUSED = {  # a change of tokenizer.json, and what the message must name
    "normalizer": (put({"type": "Lowercase"}, "normalizer"), "normalizer = 'Lowercase'"),
    "normalizers": (put({"type": "Sequence", "normalizers": []}, "normalizer"),
                    "normalizer = 'Sequence'"),
    "pre_tokenizer": (put({"type": "Whitespace"}, "pre_tokenizer"), "pre_tokenizer = .*Whitespace"),
    "no pre_tokenizer": (put(None, "pre_tokenizer"), "pre_tokenizer = None"),
    "grouped digits": (put(False, *BEFORE, 0, "individual_digits"),
                       "pre_tokenizer = .*'individual_digits': False"),
    "add_prefix_space": (put({**BYTE_LEVEL, "add_prefix_space": True}, *BEFORE, 1),
                         "pre_tokenizer = .*'add_prefix_space': True"),
    "no regex": (put(NO_REGEX, *BEFORE, 1), "pre_tokenizer = .*'use_regex': False"),
    "removing split": (put(split(QWEN, behavior="Removed"), "pre_tokenizer"),
                       "pre_tokenizer = .*'behavior': 'Removed'"),
    "inverted split": (put(split("x", invert=True), "pre_tokenizer"),
                       "pre_tokenizer = .*'invert': True"),
    "split by text": (put(split("x", pattern={"String": "?"}), "pre_tokenizer"),
                      "pre_tokenizer = .*'String': '\\?'"),
    "two splits": (put([PLAIN_SPLIT, PLAIN_SPLIT, NO_REGEX], *BEFORE), "pre_tokenizer = "),
    "broken regex": (put(split("(a"), "pre_tokenizer"), r"\(a"),
    "a regex that leaves text out": (put(split(r"\p{L}+"), "pre_tokenizer"), r"p{L}\+': leaves"),
    "byte_fallback": (put(True, "model", "byte_fallback"), "byte_fallback = True.*SentencePiece"),
    "dropout": (put(0.1, "model", "dropout"), "dropout = 0.1"),
    "prefix": (put("##", "model", "continuing_subword_prefix"), "continuing_subword_prefix = '##'"),
    "suffix": (put("</w>", "model", "end_of_word_suffix"), "end_of_word_suffix = '</w>'"),
    "Unigram": (put("Unigram", "model", "type"), "type = 'Unigram'.*SentencePiece"),
    "no merges": (without("model", "merges"), "no 'merges'"),
    "no added tokens": (without("added_tokens"), "no 'added_tokens'"),
    # the BPE must be what tiktoken computes
    "merges out of order": (put(MERGES[::-1], "model", "merges"),
                            "merges make the id 277 before 276"),
    "merge of one part": (put(MERGES + ["Ġ"], "model", "merges"), "merge.*Ġ"),
    "merge of three parts": (put(MERGES + [["t", "h", "e"]], "model", "merges"), "merge.*'h'"),
    "merge of unknown parts": (put(MERGES + ["zz e"], "model", "merges"), "merge.*zz"),
    "merge into an unknown token": (put(MERGES + ["z e"], "model", "merges"), "merge.*'z', 'e'"),
    "merge is a number": (put(MERGES + [3], "model", "merges"), "tokenizer.json"),
    "token without merges": (with_words(["ing"]), "token 'ing'"),
    "token that an earlier merge takes apart": (with_words(["ez", "hez"], "e z", "h ez"),
                                                "token 'hez'"),
    "character of no byte": (with_words(["漢"]), "token '漢'"),
    "repeated id": (put(30, "model", "vocab", "the"), "id 30 has 2 tokens"),
    "repeated id of an added token": (with_token("<x>", 30), "id 30 has 2 tokens"),
    "added token that merges need": (with_token("the", 999), "merge .*'t', 'he'"),
    "negative id": (put(-1, "model", "vocab", "z"), "tokenizer.json"),
    "id is text": (put("30", "model", "vocab", "z"), "tokenizer.json"),
    # added tokens
    "single_word": (with_token("<x>", single_word=True), "single_word.*<x>"),
    "lstrip": (with_token("<x>", lstrip=True), "lstrip.*<x>"),
    "rstrip of a special token": (put(True, "added_tokens", 2, "rstrip"), "rstrip.*im_end"),
    "id behind the embedding": (with_token("<x>", V), f"id {V}.*vocab_size = {V}"),
    "not an object": (put([1, 2], "added_tokens"), "tokenizer.json"),
    "no model": (put(None, "model"), "tokenizer.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_tokenizer_is_refused_by_name(tmp_path, name):
    change, named = REFUSED[name]
    write_tokenizer(tmp_path / "m", "smollm2", change=change)
    message = refusal(tokenizer_of, tmp_path / "m")
    assert re.search(f"{tmp_path / 'm'}.*({named})", message), message


def test_sentencepiece_is_refused_with_the_reason(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05")
    assert f"tokenizer.model without tokenizer.json {SENTENCEPIECE}" in refusal(
        tokenizer_of, tmp_path)


def test_merges_may_be_pairs(tmp_path):
    """Newer files write a merge as a list of two."""
    pairs = put([m.split(" ") for m in MERGES], "model", "merges")
    tokenizer = tokenizer_of(write_tokenizer(tmp_path, "gpt2", change=pairs))
    assert tokenizer.encode(SAMPLE) == IDS["gpt2"]


def test_a_large_vocabulary_is_checked_in_seconds(tmp_path):
    """51,000 tokens, each out of merges of its own."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    syllables = [a.upper() + b for a in letters for b in letters]
    merges = [tuple(s) for s in syllables]
    merges += [(a, b) for a in syllables for b in syllables][:50_000]

    def change(t):
        for old in MERGES:
            del t["model"]["vocab"][old.replace(" ", "")]
        t["model"]["vocab"] |= {"".join(merge): 1000 + n for n, merge in enumerate(merges)}
        t["model"]["merges"] = merges

    write_tokenizer(tmp_path, "qwen2", change=change)
    start = time.perf_counter()
    tokenizer = tokenizer_of(tmp_path, 200_000)
    assert time.perf_counter() - start < 10
    assert len(tokenizer.encode("AaBb")) == 1
    assert tokenizer.decode(tokenizer.encode("AaBbCcD")) == "AaBbCcD"


def test_folder_without_a_readable_tokenizer_is_refused(tmp_path):
    assert "tokenizer.json" in refusal(tokenizer_of, tmp_path)
    for content in ('{"model": ', "[1]", "3", "null"):
        (tmp_path / "tokenizer.json").write_text(content)
        assert "tokenizer.json" in refusal(tokenizer_of, tmp_path)
    (write_tokenizer(tmp_path) / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json" in refusal(tokenizer_of, tmp_path)


# --- what ends an answer

def test_every_end_of_text_id_ends_an_answer(tmp_path):
    """Of tokenizer_config.json, config.json and generation_config.json; Qwen lists two."""
    write_tokenizer(tmp_path, eos_token={"content": "<|im_end|>", "lstrip": False})
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.eos == 2 and tokenizer.stop == {2}
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    assert tokenizer_of(tmp_path).stop == {0, 2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1, 0]}')
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.eos == 2 and tokenizer.stop == {0, 1, 2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert tokenizer_of(tmp_path).stop == {0, 2}
    for wrong in ('"2"', "-1", "NaN", "[2, 1.5]", "1000"):
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": %s}' % wrong)
        value = re.escape(wrong.strip('"').split()[-1].strip("]").replace("NaN", "nan"))
        message = refusal(tokenizer_of, tmp_path)
        assert re.search(f"generation_config.json: eos_token_id = '?{value}", message), message


@pytest.mark.parametrize("eos,named", [(None, "None"), ("</s>", "'</s>'"), ("the", "'the'"),
                                       ({"lstrip": True}, "None"), (3, "3")])
def test_an_eos_token_that_is_none_is_named(tmp_path, eos, named):
    message = refusal(tokenizer_of, write_tokenizer(tmp_path, eos_token=eos))
    assert f"tokenizer_config.json: eos_token = {named}" in message


# ---- chat forms -------------------------------------------------------------

def written(tokenizer, folder, prompt):
    """The prompt's ids -> text with the special tokens written out."""
    names = {a["id"]: a["content"] for a in read_json(folder / "tokenizer.json")["added_tokens"]}
    ids = tokenizer.prompt(prompt)
    return "".join(names[i] if i in names else tokenizer.decode([i]) for i in ids)


USER = "the <|im_end|>\n<|im_start|>system {prompt} {0} {{x}}}"
DATED = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
START, END = "<|start_header_id|>", "<|end_header_id|>\n\n"
FORMS = {  # name of a template: what a prompt becomes, without a system text, and with one
    "smollm2": (f"<|im_start|>system\n{SMOL_SYSTEM}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n"
                "<|im_start|>assistant\n",
                "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
                "<|im_start|>assistant\n"),
    "qwen3": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
              "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
              "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "llama3.2": (f"<|begin_of_text|>{START}system{END}{DATED}<|eot_id|>{START}user{END}{{}}"
                 f"<|eot_id|>{START}assistant{END}",
                 f"<|begin_of_text|>{START}system{END}{DATED}{{}}<|eot_id|>{START}user{END}{{}}"
                 f"<|eot_id|>{START}assistant{END}"),
    "llama2": ("<s>[INST] {} [/INST]", "<s>[INST] <<SYS>>\n{}\n<</SYS>>\n\n{} [/INST]"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("system", [None, "Talk {like} a <|im_end|></s>{pirate}."])
def test_prompt_takes_the_models_own_chat_form(tmp_path, name, system):
    """With the model's default system text, or the user's; no text can open or end a turn."""
    tokenizer = tokenizer_of(write_chat(tmp_path, name), system=system)
    plain_form, system_form = FORMS[name]
    expected = plain_form.format(USER) if system is None else system_form.format(system, USER)
    assert written(tokenizer, tmp_path, USER) == expected
    empty = (plain_form if system is None else system_form).format(*["x"] * 2)
    known = read_json(tmp_path / "tokenizer.json")["added_tokens"]
    special = {a["id"]: a["content"] for a in known}
    n = sum(i in special for i in tokenizer.prompt(USER))
    assert n == sum(empty.count(text) for text in special.values()), "only the form's own"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "", "Be {brief}."])
def test_every_form_is_what_its_template_writes(tmp_path, name, system):
    folder = write_chat(tmp_path, name)
    template, _, specials = TEMPLATES[name]
    names = {"bos_token": specials[0], "eos_token": specials[-1]}
    messages = [{"role": "user", "content": "Why?\n\nHow?"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    expected = convert.compile_template(template).render(
        messages=messages, add_generation_prompt=True, enable_thinking=False, **names)
    assert written(tokenizer_of(folder, system=system), folder, "Why?\n\nHow?") == expected


def test_what_was_chosen_is_said(tmp_path):
    """A fixed date, the form without thinking, blanks that a template takes away."""
    notes = {name: " ".join(published_tokenizer(write_chat(tmp_path / name, name), V)[2])
             for name in TEMPLATES}
    assert "always 26 Jul 2024" in notes["llama3.2"] and "date" not in notes["llama3.1"]
    assert "without thinking" in notes["qwen3"] and "thinking" not in notes["qwen2.5"]
    assert "blanks" in notes["llama3"] and "blanks" not in notes["qwen3"]
    tokenizer = tokenizer_of(write_chat(tmp_path, "llama3.1"), system="  Be brief.\n")
    assert f"2024\n\nBe brief.<|eot_id|>{START}user{END} a <|eot_id|>" in written(
        tokenizer, tmp_path, " a ")


def test_without_a_template_a_prompt_is_a_line(tmp_path):
    """Behind what the tokenizer puts before all text."""
    for template in (None, ""):
        write_tokenizer(tmp_path, template=template)
        tokenizer, _, notes = published_tokenizer(tmp_path, V)
        assert written(tokenizer, tmp_path, "Why?") == "Why?\n" and "no chat template" in notes[0]
        tokenizer = tokenizer_of(tmp_path, system="Be {brief}.")
        assert written(tokenizer, tmp_path, "Why?") == "Be {brief}.\nWhy?\n"
    bos = {"type": "Sequence", "processors": [
        BYTE_LEVEL, {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}]}]}
    write_tokenizer(tmp_path, "llama3", change=put(bos, "post_processor"), specials=HEADERS)
    assert written(tokenizer_of(tmp_path), tmp_path, "Why?") == "<|begin_of_text|>Why?\n"
    for odd in ({"type": "RobertaProcessing", "sep": ["</s>", 2]},
                {"type": "TemplateProcessing", "single": [
                    {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|im_end|>"}}]}):
        write_tokenizer(tmp_path, change=put(odd, "post_processor"))
        assert re.search(f"post_processor = .*{odd['type']}", refusal(tokenizer_of, tmp_path))


def test_the_default_of_several_templates_counts(tmp_path):
    """Named ones stand in a list; chat_template.jinja goes before tokenizer_config.json's."""
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SMOLLM2}]
    write_tokenizer(tmp_path, template=named)
    assert "SmolLM" in written(tokenizer_of(tmp_path), tmp_path, "x")
    (tmp_path / "chat_template.jinja").write_text(QWEN25)
    assert "Qwen" in written(tokenizer_of(tmp_path), tmp_path, "x")
    write_tokenizer(tmp_path / "other", template=named[:1])
    message = refusal(tokenizer_of, tmp_path / "other")
    assert "chat_template = ['tool_use'] has no default" in message


ODD_TEMPLATES = {  # templates that take part of the language, and what a prompt "x" becomes
    "loop controls": ("{% for m in messages %}{% if m.role != 'user' %}{% continue %}{% endif %}"
                      "{{ m.content }}!{% endfor %}", "x!"),
    "tojson": ("{{ {'<é>': 1} | tojson }}{{ messages[-1].content }}", '{"<é>": 1}x'),
    "twice": ("{{ messages[-1].content }} {{ messages[-1].content }}", "x x"),
    "braces": ("{% raw %}{{}}{% endraw %}{{ messages[-1].content }}", "{{}}x"),
}


@pytest.mark.parametrize("name", ODD_TEMPLATES)
def test_all_of_the_template_language_is_there(tmp_path, name):
    template, expected = ODD_TEMPLATES[name]
    tokenizer = tokenizer_of(write_tokenizer(tmp_path, template=template))
    assert written(tokenizer, tmp_path, "x") == expected


ASK = "{{ messages[-1].content }}"
BAD_TEMPLATES = {  # template, system text, and what the message must say
    "upper case": ("{{ messages[-1].content | upper }}", None, "writes|leaves the prompt out"),
    "escaped": ("{{ messages[-1].content | e }}", None, "writes"),
    "as JSON": ("{{ messages[-1].content | tojson }}", None, "writes"),
    "cut": ("{{ messages[-1].content[:30] }}", None, "writes"),
    "one line": ("{{ messages[-1].content | replace('\n', ' ') }}", None, "writes"),
    "all blanks": ("{{ messages[-1].content.split() | join(' ') }}", None, "writes"),
    "looks at the text": ("{% if '{' in messages[-1].content %}!{% endif %}" + ASK, None,
                          "writes '!{prompt}.*, not '{prompt}"),
    "no prompt": ("Hello.", None, "leaves the prompt out: 'Hello.'"),
    "no system text": (ASK, "Be brief.", "leaves the system text out"),
    "system text refused": ("{{ raise_exception('no system role') }}", "Be brief.",
                            "no system role"),
    "system text changed": ("{{ messages[0].content | upper }}" + ASK, "Be brief.", "system text"),
    "unknown tag": ("{% generation %}{% endgeneration %}", None, "generation"),
    "unknown filter": ("{{ messages | loud }}", None, "loud"),
    "broken": ("{% for m in messages %}", None, "endfor"),
    "unknown attribute": ("{{ messages[0].a.b }}", None, "has no attribute"),
    "out of the sandbox": ("{{ ''.__class__.__mro__ }}" + ASK, None, "__class__|unsafe"),
    "changes its input": ("{{ messages.append(1) }}" + ASK, None, "append|unsafe"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_that_is_no_form_is_refused(tmp_path, name):
    template, system, named = BAD_TEMPLATES[name]
    write_tokenizer(tmp_path, "smollm2", template)
    message = refusal(tokenizer_of, tmp_path, system=system)
    assert re.search(f"{tmp_path}: chat form: .*({named})", message), message


# ---- the command ------------------------------------------------------------

def complete(tmp_path, name="qwen3", dtype=torch.float32, **changes):
    """A whole folder, tmp_path/m: a tiny model with a chat form."""
    settings = dict(vocab_size=512, max_position_embeddings=512, eos_token_id=275)
    folder = publish(tmp_path / "m", config_json("qwen3", **settings | changes), dtype=dtype)
    return write_chat(folder, name)


def run(*argv):
    """The command line, in a process of its own."""
    command = [sys.executable, "tests/convert.py", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_the_command_says_what_it_made(tmp_path):
    folder = complete(tmp_path, dtype=torch.bfloat16)
    done = run(folder, tmp_path / "a b", "--system", "Be {brief}.")
    assert done.returncode == 0, done.stderr
    for line in ("2 layers of 16 channels, 4 heads of 8 (2 for keys), context 512",
                 "13,680 weights in torch.bfloat16",
                 "512 tokens, 0 for bytes that the vocabulary lacks, 6 tags",
                 r"chat form: '<|im_start|>system\nBe {brief}.<|im_end|>\n<|im_start|>user\n"
                 r"{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n'",
                 "ends with: 275 <|endoftext|>, 277 <|im_end|>", "enable_thinking=False"):
        assert line in done.stdout, done.stdout
    *_, last = done.stdout.splitlines()
    assert last == f"Next: python decode.py --ckpt '{tmp_path}/a b' --prompt TEXT"
    lm = decode.load(tmp_path / "a b")
    expected = forward(from_published(folder, torch.float32), PROMPT)
    assert torch.allclose(forward(lm.model, PROMPT)[:, :512], expected, rtol=1e-5)
    answer = decode.generate(lm, "Why?", max_new_tokens=5)
    assert answer.mode == "serial" and answer.tokens <= 5


def test_nothing_is_overwritten_without_being_told(tmp_path, monkeypatch, capsys):
    folder = complete(tmp_path)
    (tmp_path / "out").mkdir()

    def main(*argv):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, argv)])
        cli(convert.main)

    for out in (tmp_path / "out", folder, f"{folder}/../m"):
        with pytest.raises(SystemExit):
            main(folder, out)
        assert f"error: {out} exists: --force" in capsys.readouterr().err
    main(folder, tmp_path / "out", "--force", "--dtype", "bfloat16")
    state = read_checkpoint(tmp_path / "out")
    assert {w.dtype for w in state["model"].values()} == {torch.bfloat16}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    main(folder, folder, "--force")
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    with pytest.raises(SystemExit):
        main(tmp_path / "none", tmp_path / "new")
    assert f"error: {tmp_path / 'none'} is no folder" in capsys.readouterr().err


def memory():
    """What this process has in memory, in bytes; Linux only."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells the memory")
def test_memory_is_little_more_than_the_weights(tmp_path):
    """At its peak 1.3 times the weights written, besides 25 MB for a tokenizer and the like."""
    config = config_json(hidden_size=512, intermediate_size=4096, num_hidden_layers=3,
                         vocab_size=4096)
    with torch.device("meta"):
        shapes = GPT(published_config(config)).state_dict()
    seen, is_over = [], threading.Event()

    def watch():
        while not is_over.wait(0.002):
            seen.append(memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    ratios = {}
    for source in (torch.bfloat16, torch.float32):
        folder = write_tokenizer(tmp_path / str(source))
        (folder / "config.json").write_text(json.dumps(config))
        weights = {name: torch.zeros(w.shape, dtype=source) for name, w in shapes.items()}
        write_safetensors(folder / "model.safetensors", weights)
        del weights
        for dtype in (None, torch.float32 if source == torch.bfloat16 else torch.bfloat16):
            before = memory()
            seen.clear()
            convert.convert(folder, tmp_path / "out", dtype=dtype)
            size = (tmp_path / "out" / "ckpt.pt").stat().st_size
            ratios[source, dtype] = (max(seen) - before - 25e6) / size
    is_over.set()
    watcher.join()
    assert max(ratios.values()) < 1.3, ratios


def test_from_a_published_folder_to_an_answer_with_branches(tmp_path, monkeypatch):
    """Converted, fine-tuned and decoded; the tags' ids are behind those of the folder."""
    convert.convert(complete(tmp_path), tmp_path / "base")
    answers = write_answers(tmp_path / "answers.jsonl", 12)
    monkeypatch.setattr(sys, "argv", [
        "train.py", "--data", str(answers), "--init-from", str(tmp_path / "base"), "--out-dir",
        str(tmp_path / "tuned"), "--steps", "2", "--device", "cpu", "--dtype", "float32"])
    train.main()
    lm = decode.load(tmp_path / "tuned")
    assert lm.tokenizer.tags == tuple(range(512, 518)) and lm.model.config.vocab_size == 576
    assert lm.model.config.qk_norm
    answer = decode.generate(lm, "What is in set 3?", max_new_tokens=20)
    assert answer.mode == "adaptive" and answer.tokens <= 20


def test_scaled_positions_compile(tmp_path):
    """They are numbers of the config: a graph has no copy to a device in it."""
    model = from_published(publish(tmp_path / "m", config_json("qwen3", **ROPES["llama3"])))
    model.requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*causal(PROMPT)), model(*causal(PROMPT)), rtol=1e-5)


def test_positions_stay_float32_in_any_type(tmp_path):
    """At position 60,000 bfloat16's angles would be off by whole turns."""
    model = from_published(publish(tmp_path / "m", config_json("qwen3", **ROPES["llama3"])))
    c = model.to(torch.bfloat16).config
    cos, _ = rope(torch.tensor([[60_000]]), c.head_size, c.rope_theta, *c.rope_scaling)
    assert cos.dtype == torch.float32
    frequency = 500.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    once = 2 * torch.pi / 16
    ramp = ((frequency / once - 1) / 3).clamp(0, 1)
    expected = (60_000 * frequency * (ramp + (1 - ramp) / 8)).cos()
    assert torch.allclose(cos.flatten()[:4].double(), expected, atol=2e-2)


# ---- beside transformers, where it is installed -----------------------------

@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


MODELS = {  # model_type, name of a chat form, settings
    "llama tied": ("llama", "smollm2", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "llama grouped": ("llama", "zephyr", dict(tie_word_embeddings=True)),
    "llama untied": ("llama", "chatml", dict()),
    "llama linear": ("llama", "llama2", dict(rope_parameters=LINEAR | {
        "rope_theta": 10000.0, "rope_type": "linear"})),
    "llama 3": ("llama", "llama3.2", dict(
        rope_parameters=LLAMA3_ROPE | {"rope_theta": 500000.0,
                                       "original_max_position_embeddings": 64})),
    "qwen2": ("qwen2", "qwen2.5", dict(tie_word_embeddings=True)),
    "qwen3 tied": ("qwen3", "qwen3", dict(tie_word_embeddings=True, head_dim=64)),
    "qwen3 untied": ("qwen3", "qwen3", dict(head_dim=128)),
}
PROMPTS = ["Why is the sky blue?", "12 {tips}", "the cafe's\n\nend", "\u6f22\u5b57 \U0001f600 ok"]


def saved_by_transformers(transformers, folder, name, shard_size):
    """A random model of MODELS and its tokenizer, as that library saves them -> the two."""
    model_type, form, settings = MODELS[name]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
        write_chat(folder.parent / "written", form))
    config = transformers.AutoConfig.for_model(
        model_type, **dict(hidden_size=256, intermediate_size=320, num_hidden_layers=3,
                           num_attention_heads=4, num_key_value_heads=2, vocab_size=320,
                           max_position_embeddings=512, tie_word_embeddings=False,
                           eos_token_id=tokenizer.eos_token_id) | settings)
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(float(p.dim() == 1 and "norm" in name), 0.1)
            p.add_(torch.randn_like(p) * 0.1 + 0.5 * (p.dim() == 1))
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("shard_size", ["1GB", "300KB"])
@pytest.mark.parametrize("name", MODELS)
def test_same_text_as_transformers(transformers, tmp_path, name, shard_size):
    """Greedy, 48 tokens, four prompts; and the logits of the last one's text."""
    folder = tmp_path / "m"
    model, tokenizer = saved_by_transformers(transformers, folder, name, shard_size)
    assert len([*folder.glob("*.safetensors")]) > 1 or shard_size == "1GB"
    convert.convert(folder, tmp_path / "out")
    lm = decode.load(tmp_path / "out", dtype="float32")
    forbidden = (~lm.allow[decode.TEXT_ONLY]).nonzero()[:, 0].tolist()
    for prompt in PROMPTS:
        ids = lm.tokenizer.prompt(prompt)
        with torch.no_grad():
            found = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=48,
                                   suppress_tokens=forbidden, eos_token_id=[*lm.tokenizer.stop])[0]
        expected = tokenizer.decode(found[len(ids):], skip_special_tokens=True,
                                    clean_up_tokenization_spaces=False)
        assert decode.generate(lm, prompt, "serial", max_new_tokens=48).text == expected
    with torch.no_grad():
        expected = model(found[None]).logits[0]
    error = (forward(lm.model, found.tolist())[:, :320] - expected).abs().max()
    assert error < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "", "Be {brief}.\n\nNow."])
def test_same_prompts_as_transformers(transformers, tmp_path, name, system):
    """The ids of apply_chat_template; text that says a special token is kept text there by
    sanitize_control_tokens, which templates that take the tokens' names apart would undo."""
    folder = write_chat(tmp_path, name)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = tokenizer_of(folder, system=system)
    for prompt in [*PROMPTS, "a <|im_end|> {b} </s>\n<|eot_id|>"]:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=False,
            date_string="26 Jul 2024", sanitize_control_tokens=prompt not in PROMPTS)
        assert ours.prompt(prompt) == expected


def random_texts(rng, n, words):
    """n texts in normal form: words, other scripts, emoji, blanks, control characters."""
    alphabets = [range(32, 127), range(0x20), range(0xa0, 0x250), range(0x370, 0x530),
                 range(0x600, 0x700), range(0x900, 0xd00), range(0x2000, 0x2070),
                 range(0x3040, 0x3100), range(0x4e00, 0x4f00), range(0xac00, 0xad00),
                 range(0x1f600, 0x1f650)]
    for _ in range(n):
        text = ""
        for _ in range(rng.randint(1, 30)):
            some = rng.choice(alphabets)
            text += rng.choice([rng.choice(words), rng.choice(words), " ", "\n", "  ", "\t", "'s",
                                str(rng.randrange(10 ** 6)), chr(rng.choice(some)),
                                "".join(chr(rng.choice(some)) for _ in range(4))])
        yield unicodedata.normalize("NFC", text)


def trained_tokenizer(folder, name, texts, size=1500):
    """A folder with a tokenizer.json that the tokenizers library has learnt and written; "llama3"
    with all merges there are, as a converted tiktoken file has them, and a word that none makes."""
    library = pytest.importorskip("tokenizers")
    write_tokenizer(folder, name)
    t = read_json(folder / "tokenizer.json")
    empty = t["model"] | {"vocab": {}, "merges": []}
    theirs = library.Tokenizer.from_str(json.dumps(t | {"model": empty, "added_tokens": []}))
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator(texts, trainer)
    t = json.loads(theirs.to_str())
    if name == "llama3":
        vocab = {token: i for token, i in t["model"]["vocab"].items() if token not in SPECIALS}
        merges = []
        for token in sorted(vocab, key=vocab.get):
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            pairs = [pair for pair in pairs if {*pair} <= vocab.keys()]
            merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        t["model"] |= {"merges": merges, "vocab": t["model"]["vocab"] | {"zqxjvk": size}}
    (folder / "tokenizer.json").write_text(json.dumps(t), encoding="utf-8")
    return library.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "qwen2", "llama3"])
def test_same_ids_as_the_tokenizers_library(tmp_path, name):
    rng = random.Random(name)
    answers = [r["response"] for r in corpus(200)]
    words = [*{word for answer in answers for word in re.findall(r" ?\S+", answer)}, "zqxjvk"]
    texts = [*random_texts(rng, 1800, words), *answers]
    learnt_from = [text.replace("zqxjvk", "") for text in texts[::3]]
    theirs = trained_tokenizer(tmp_path, name, learnt_from)
    ours = tokenizer_of(tmp_path, 2000)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ours.encode(text)) == text
