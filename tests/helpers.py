"""What several tests share: a tokenizer over bytes, random segments, command lines, checkpoints, answers to train on."""
import json
import random
import sys
from dataclasses import asdict

import pytest
import torch

from aspd import Block, Branch, tokenize
from data import PATTERN, Tokenizer, cli
from model import GPT, GPTConfig, save_checkpoint

TOKENIZER = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, eos=256, tags=(*range(257, 263),))
ALPHABET = ["a", "b ", "7", "\n", " \n\n", "é", "漢字", "\U0001f600", "e\u0301", "\x00", "{prompt}", "<|branch|>",
            "<|/title|>", "<|im_end|>", "<|endoftext|>"]


def random_text(rng, pieces=8, alphabet=ALPHABET):
    return "".join(rng.choices(alphabet, k=pieces))


def random_segments(rng, blocks=2, branches=8, long=60):
    """Text segments, serial text around the blocks; the second branch of each block is far longer than the others."""
    segments = [random_text(rng)]
    for _ in range(blocks):
        block = Block()
        for i in range(branches):
            title = f"{i}." + random_text(rng, rng.randint(0, 3))
            rest = random_text(rng, long if i == 1 else rng.randint(0, 6))
            block.append(Branch(title, rest))
        segments.append(block)
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
# our own checkpoints, and answers to train on

def tiny_model(**config):
    """An untrained model over TOKENIZER's ids, always with the same weights."""
    torch.manual_seed(0)
    settings = dict(block_size=256, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16,
                    n_inner=24, head_size=8)
    return GPT(GPTConfig(**settings | config))


def save_tiny(out_dir, model=None, **changes):
    """A checkpoint of tiny_model(), as train.py would write it, with changes to its dict."""
    model = model or tiny_model()
    state = dict(step=3, args={}, config=asdict(model.config), model=model.state_dict(), optimizer={},
                 tokenizer=TOKENIZER.settings)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out_dir, **state | changes)
    return out_dir


def write_answers(path, n=160):
    """Short answers, most with a list of long items that do not need each other."""
    lines = []
    for i in range(n):
        items = []
        for k, word in enumerate(("alpha", "beta", "gamma"), start=1):
            sentence = f"{word} number {i % 7} is a thing with {word} sides and {word} ends in it. "
            items.append(f"{k}. **Part {word}**: " + sentence * (1 + (k + 1) % 2))
        text = f"Parts of set {i}:\n\n" + "\n".join(items) + "\n\nThat is all."
        if i % 4 == 0:
            text = f"Set {i} is empty, so there is nothing to say."
        lines.append(json.dumps({"prompt": f"What is in set {i}?", "response": text}) + "\n")
    path.write_text("".join(lines))
    return path
