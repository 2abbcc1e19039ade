"""The README's pictures: whole XML, drawn from the mask, from real passes and from the figures of tests/bench.py."""
import json
import math
import re
from argparse import Namespace
from xml.etree import ElementTree

import pytest
import torch

import aspd
import figures
from aspd import Block, Branch, branch_mask, join, steps, tokenize
from decode import generate
from helpers import TOKENIZER, fails, save_tiny, tiny_model
from script import script

SEGMENTS = ["Two tips:\n\n", Block([Branch("1. Ä", ": eight hours & more."), Branch("\n2. <B", ": walk.")]), "\n\nGo."]
KINDS = {name: {"answers": 3, "ideal": 2.5, "fewer_steps": 2.25, "speedup": speedup}
         for name, speedup in (("slow", 0.9), ("fast <&>", 1.75))}


def elements(picture, name):
    """All elements with that class or that tag."""
    every = ElementTree.fromstring(picture).iter()
    return [e for e in every if name in e.get("class", "").split() or e.tag.endswith("}" + name)]


def texts(picture, name):
    return ["".join(e.itertext()) for e in elements(picture, name)]


def write_results(folder, *names):
    """What tests/bench.py --json would have written there."""
    folder.mkdir(exist_ok=True)
    for name in names:
        summary = {"machine": "A machine", "kinds": KINDS, "all": KINDS["slow"]}
        (folder / name).write_text(json.dumps({"summary": summary, "results": []}))
    return folder


@pytest.fixture
def race(tmp_path, monkeypatch):
    """race.svg of SEGMENTS, which the engine is made to write; and the passes of each side."""
    serial = [[token] for token in TOKENIZER.encode(join(SEGMENTS))] + [[TOKENIZER.eos]]
    passes = {"serial": serial,
              "adaptive": script(tokenize(SEGMENTS, TOKENIZER.encode), TOKENIZER.tags, TOKENIZER.eos)}
    ckpt = save_tiny(tmp_path / "ckpt", tiny_model(block_size=512))

    def forced(lm, prompt, mode, watch):
        left = iter(passes[mode])
        lm.step = lambda *_: (torch.tensor(next(left)), None)
        return generate(lm, prompt, mode, watch=watch)

    monkeypatch.setattr(figures, "generate", forced)
    return figures.draw_race(Namespace(ckpt=ckpt, baseline=None, prompt="Tips & <tricks>?")), passes


def test_the_row_is_that_of_aspd_and_its_cells_are_the_mask(capsys):
    picture = figures.draw_row(None)
    _, row, names = figures.example()
    aspd.main()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:len(names) + 1]]
    assert texts(picture, "token") == names == [line[1] for line in printed]
    assert row.position.tolist() == [int(line[4]) for line in printed]
    mask = branch_mask(row.block, row.branch)
    assert len(elements(picture, "cell")) == mask.sum() == sum(line[-1].count("#") for line in printed)
    assert len(elements(picture, "hole")) == (~mask).tril().sum()
    assert len(elements(picture, "place")) == len(names)


def test_the_race_has_a_frame_a_pass_and_every_token_in_its_own(race):
    picture, passes = race
    assert len(passes["adaptive"]) == 1 + steps(tokenize(SEGMENTS, TOKENIZER.encode))
    frames = [e.get("class").split()[1] for e in elements(picture, "frame")]
    assert frames == [f"af{k}" for k in range(len(passes["serial"]))] + [f"bf{k}" for k in range(len(passes["adaptive"]))]
    rules = re.findall(r"@keyframes (\w+){.*?(\d+\.\d+)%", picture)
    assert [name for name, _ in rules if "f" in name] == frames
    times = [float(at) for name, at in rules if name.startswith("bf")]
    assert times == sorted(times) and 0 < times[0] and times[-1] < 100

    # Which bytes are chosen in a pass, and which letters the picture shows in it.
    for side, mode in ("a", "serial"), ("b", "adaptive"):
        shown = [""] * len(passes[mode])
        for span in elements(picture, "tspan"):
            born = span.get("class").split()[-1]
            if born[0] == side:
                shown[int(born[1:])] += span.text
        for k, chosen in enumerate(passes[mode]):
            plain = TOKENIZER.decode(chosen).replace("\ufffd", "")  # half of a letter
            assert sorted(shown[k].replace("Ä", "").strip()) == sorted(plain.strip()), (mode, k)
        assert "".join(shown).count("Ä") == 1


def test_the_race_stands_still_when_the_first_side_is_done(race):
    """Without animation: one frame of each side, the last one of one of them."""
    picture, passes = race
    seen = re.findall(r"\.(\w+){animation-name:\w+;opacity:1}", picture)
    assert [name[:2] for name in seen] == ["af", "bf"]
    assert {f"af{len(passes['serial']) - 1}", f"bf{len(passes['adaptive']) - 1}"} & set(seen)
    assert "prefers-reduced-motion" in picture and len(picture.encode()) < figures.MAX_BYTES
    assert "Word for word the same answer" in picture


def test_the_bars_are_as_long_as_the_figures(tmp_path):
    for names in (["builtin.json"], ["builtin.json", "smollm2.json"]):
        picture = figures.draw_speed(Namespace(results=write_results(tmp_path / "results", *names)))
        bars = [e for e in elements(picture, "bar-speedup")]
        assert len(bars) == 3 * len(names)
        width = {n: float(bars[n].get("width")) for n in range(3)}  # the fastest first, all of them last
        assert math.isclose(width[0] / width[1], 1.75 / 0.9, rel_tol=1e-3) and width[1] == width[2]
        assert [texts(picture, "halo").count(value) for value in ("1.75", "0.90", "2.25")] == \
            [n * len(names) for n in (1, 2, 3)]
        assert texts(picture, "desc") and "fast <&>" in texts(picture, "text")


def test_what_is_missing_is_named_in_one_line_and_the_rest_is_drawn(tmp_path, monkeypatch, capsys):
    argv = ["--ckpt", tmp_path / "none", "--results", tmp_path / "none", "--out", tmp_path / "out"]
    message = fails(figures, argv, monkeypatch, capsys)
    assert "no race.svg: no" in message and "ckpt.pt" in message and "builtin.json" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["row.svg"]
    write_results(tmp_path / "results", "builtin.json")
    (tmp_path / "results" / "smollm2.json").write_text('{"summary": {}}')
    argv[3] = tmp_path / "results"
    message = fails(figures, argv, monkeypatch, capsys)
    assert "smollm2.json: no 'kinds'" in message and "builtin" not in message


def test_an_untrained_checkpoint_is_drawn_too(tmp_path, monkeypatch, capsys):
    """Whatever it writes: the lines are cut, the bytes of half characters are shown as such."""
    monkeypatch.setattr(figures, "MAX_BYTES", 10**6)
    args = Namespace(ckpt=save_tiny(tmp_path / "ckpt"), baseline=None, prompt="Go")
    assert elements(figures.draw_race(args), "frame")
