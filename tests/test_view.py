"""
The live view, on a small terminal that the tests emulate: at every moment it shows the plain text so far and, while a
block is being written, a line a branch below it; at the end the answer alone, with nothing left over.
"""
import itertools
import random
import re
import sys
import unicodedata
from collections import Counter

import pytest
import torch

import decode
from aspd import Branch, is_block, join, plain, tokenize
from bench import script
from decode import LM, View, generate
from helpers import TOKENIZER, tiny_model

SIZES = [(80, 24), (40, 10), (20, 6), (9, 3)]
COLOUR = re.compile(r"\x1b\[\d*m")


def width(text):
    """Columns that it takes, wide characters two of them, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class Terminal:
    """A window of some rows at the end of a growing list of lines. A full line wraps when its next character comes."""
    encoding, isatty = "utf-8", lambda self: True

    def __init__(self, columns, rows):
        self.columns, self.rows, self.x, self.y, self.raw, self.at_flush = columns, rows, 0, 0, "", lambda: None
        self.lines = [[]]  # of characters; a wide one is followed by an empty one
        self.wraps = set()  # lines that go on in the next one

    def flush(self):
        self.at_flush()

    def write(self, text):
        self.raw += text
        for n, command, c in re.findall(r"\x1b\[(\d*)([AGJm])|(.)", text, re.S):
            n = int(n or 1)
            if command == "A":  # up, but never out of the window
                self.x, self.y = min(self.x, self.columns - 1), max(self.y - n, len(self.lines) - self.rows, 0)
            elif command == "G":
                self.x = min(n, self.columns) - 1
            elif command == "J":  # the window keeps its place
                self.lines[self.y:] = [self.lines[self.y][:self.x]] + [[] for _ in self.lines[self.y + 1:]]
                self.wraps = {y for y in self.wraps if y < self.y}
            elif c == "\n":
                self.next_line()
            elif c:
                assert c.isprintable() or unicodedata.combining(c), "the tests write nothing else"
                if self.x + width(c) > self.columns:
                    self.wraps.add(self.y)
                    self.next_line()
                line = self.lines[self.y]
                line += " " * (self.x - len(line))
                if width(c):
                    line[self.x:self.x + width(c)] = [c] + [""] * (width(c) - 1)
                else:
                    line[self.x - 1] += c
                self.x += width(c)

    def next_line(self):
        self.x, self.y = 0, self.y + 1
        self.lines += [[]] * 0 if self.y < len(self.lines) else [[]]

    def shows(self):
        """All lines from the first to the last with text, those that have scrolled out of the window too."""
        return "".join("".join(line) + "\n" * (y not in self.wraps) for y, line in enumerate(self.lines)).rstrip("\n")


@pytest.fixture(params=SIZES, ids="{0[0]}x{0[1]}".format)
def terminal(request, monkeypatch):
    return make_terminal(request.param, monkeypatch)


def make_terminal(size, monkeypatch):
    for name, value in zip(("COLUMNS", "LINES"), size):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("NO_COLOR", raising=False)
    clock = itertools.count()
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(clock))  # a second later each time: shows every pass
    return Terminal(*size)


def told(segments, stop_after=None):
    """An LM that writes an answer of text segments, whatever its weights; perhaps interrupted after some passes."""
    lm, counter = LM(tiny_model(block_size=8192), TOKENIZER), itertools.count()
    passes = iter(script(tokenize(segments, TOKENIZER.encode), TOKENIZER.special))

    def step(*args):
        if next(counter) == stop_after:
            raise KeyboardInterrupt
        return torch.tensor(next(passes)), None

    lm.step = step
    return lm


def text_so_far(engine):
    """The plain text before the block that is being written, without the bytes of half a character."""
    done = engine.segments[:-1] if is_block(engine.segments[-1]) else engine.segments
    return TOKENIZER.decode(plain(done)).rstrip("\ufffd")


def watch(terminal, segments, look=lambda engine, lines: None):
    """Writes an answer under a View. After every pass the terminal must show exactly the plain text so far, and below
    it the branch lines; look(engine, the branch lines without colours) checks more. At the end: exactly the answer."""
    view = View(TOKENIZER, terminal)

    def spy(engine):
        view(engine)
        lines = [COLOUR.sub("", line).removeprefix("\n") for line in view.lines]
        assert terminal.shows() == "\n".join([text_so_far(engine), *lines]).rstrip("\n")
        look(engine, lines)

    answer = generate(told(segments), "p", "adaptive", max_new_tokens=8000, watch=spy)
    assert answer.text == join(segments)
    view.write(answer.text + "\n")
    assert terminal.shows() == answer.text.rstrip("\n") and not terminal.x, "the answer, and the next line to write on"
    return answer


def block(n, name="Part", text="words of it, and more words\n", repeat=1):
    titles = [f"{i}. **{name} {i}**" for i in range(1, n + 1)]
    return [Branch(title, f"{title}: " + text * (repeat + 3 * (i == 1))) for i, title in enumerate(titles)]


LEAD = "Here is a lead, with some words in it:\n\n"
ANSWERS = {
    "no block": ["Only text, " * 50],
    "one block": [LEAD, block(3), "\nAnd an end."],
    "nothing around": [block(2)],
    "more branches than rows": [LEAD, block(16), "End.\n\n\n"],
    "longer than the window": ["A long paragraph. " * 50 + "\n", block(5, repeat=9), "So on. " * 70 + "\n", block(4)],
    "blocks side by side": [LEAD, block(2), block(4), block(3), "End."],
    "wide characters": ["以下是幾個重點：\n\n", block(4, "重點的名稱", "這是很長的一段話，" * 9 + "\n"), "以上。😀"],
    "combining characters": ["e\u0301:\n", block(3, "e\u0301", "e\u0301" * 30 + "\n"), "e\u0301"],
    "block on a line that is begun": [LEAD, block(16), "Two: ", block(2, text="no line break "), block(2), "End."],
    "block behind a full line": [LEAD, block(16), "x" * 40, block(2), "x" * 40 + "\n", block(2), "End."],
    "block behind wide characters": [LEAD, block(16), "重點有兩個：", block(2), "重點有兩個：\n", block(2), "End."],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_moment_shows_the_text_and_the_branches_and_the_end_the_answer_alone(terminal, name):
    """While a block is being written there is a line a branch, as many as fit; none is wider than the terminal."""
    most = Counter()

    def look(engine, lines):
        begun = engine.segments[-1] if is_block(engine.segments[-1]) else []
        own = text_so_far(engine)[-1:] in ("", "\n")  # a block in the middle of a line is not shown before it is done
        assert len(lines) == own * min(len(begun), terminal.rows - 2)
        assert all(line.startswith("| ") and width(line) < terminal.columns for line in lines)
        most["lines"] = max(most["lines"], len(lines))

    answer = watch(terminal, ANSWERS[name], look)
    assert most["lines"] == min(max(map(len, answer.blocks), default=0), terminal.rows - 2)


def test_lines_that_are_exactly_full(terminal):
    """Whole lines of text, and of the branches, as long as the terminal is wide or twice that."""
    full = terminal.columns
    segments = ["x" * full + "\n", block(2, text="y" * 2 * full + "\n"), "x" * 2 * full + "\n", block(2), "z" * full]
    watch(terminal, segments)


ALPHABET = ["a", "b ", "7", "\n", "é", "漢字", "\U0001f600", "e\u0301", "<|branch|>"]


@pytest.mark.parametrize("size", SIZES[:3])
def test_random_answers(size, monkeypatch):
    """Lines of any length, wide, combining and ordinary characters; blocks begin on a line of their own."""
    for seed in range(4):
        rng = random.Random(seed)
        words = lambda n: "".join(rng.choices(ALPHABET, k=rng.randint(0, n)))
        segments = []
        for _ in range(rng.randint(1, 3)):
            titles = [f"{i}." + words(3).strip() for i in range(rng.randint(2, 7))]
            segments += [words(100) + "\n", [Branch(title, title + words(30) + "\n") for title in titles]]
        watch(make_terminal(size, monkeypatch), segments + [words(50)])


def test_branch_line_has_the_title_and_the_latest_words(monkeypatch):
    """A long title is cut to half the room; the rest of the line is what was written last."""
    terminal, seen = make_terminal((40, 10), monkeypatch), []
    titles, words = ["1. Short", "2. Too long for half of a line"], [f"{i:03}" for i in range(40)]
    segments = [LEAD, [Branch(title, f"{title}\n" + " \n".join(words)) for title in titles]]
    watch(terminal, segments, lambda engine, lines: seen.append(lines))
    for k in (1, 2, 5, 12, 40):
        text = " ".join(words[:k])
        assert [f"| 1. Short {text[-28:]}", f"| 2. Too long for ha {text[-18:]}"] in seen


def test_colours_unless_there_should_be_none(monkeypatch):
    """A colour a branch; with NO_COLOR set the same lines without any."""
    raw = {}
    for no_color in ("", "1"):
        terminal = make_terminal((40, 10), monkeypatch)
        if no_color:
            monkeypatch.setenv("NO_COLOR", no_color)
        watch(terminal, [LEAD, block(7), "End."])
        raw[no_color] = terminal.raw
    assert {*COLOUR.findall(raw[""])} == {"\x1b[0m", *(f"\x1b[{c}m" for c in range(31, 37))}
    assert raw["1"] == COLOUR.sub("", raw[""])


def test_view_is_not_drawn_more_often_than_one_can_see(monkeypatch):
    """With a millisecond a pass it is drawn about every fiftieth time, and the end is complete all the same."""
    terminal, clock = make_terminal((40, 10), monkeypatch), itertools.count(1000)
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(clock) / 1000)
    drawn, view = [], View(TOKENIZER, terminal)
    terminal.at_flush = lambda: drawn.append(terminal.shows())
    answer = generate(told([LEAD * 9]), "p", "adaptive", max_new_tokens=900, watch=view)
    view.write(answer.text + "\n")
    assert 4 < len(drawn) < answer.steps / 20 and drawn[-1] == (LEAD * 9).rstrip("\n")


# -----------------------------------------------------------------------------
# the command line

def run_main(terminal, monkeypatch, lm):
    monkeypatch.setattr(sys, "argv", ["decode.py", "--prompt", "p", "--device", "cpu", "--max-new-tokens", "8000"])
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(decode, "load", lambda *args: lm)
    decode.main()


def test_command_line_leaves_the_answer_alone(terminal, monkeypatch, capsys):
    """On stdout; the figures go to stderr. The view was live: branch lines came and went."""
    segments = [LEAD, block(4), "End."]
    run_main(terminal, monkeypatch, told(segments))
    assert terminal.shows() == join(segments) and terminal.x == 0 and "\x1b[J" in terminal.raw
    assert "finish: stop" in capsys.readouterr().err


def test_interrupt_leaves_the_text_so_far_and_a_clean_line(terminal, monkeypatch):
    """Before, within and after a block, whose lines go."""
    segments, texts = [LEAD, block(4), "And an end.\n" * 3], [""]
    follow = lambda engine: texts.append(text_so_far(engine))
    generate(told(segments), "p", "adaptive", max_new_tokens=8000, watch=follow)
    assert texts[-1] == join(segments) and texts.count(LEAD) > 60
    for passes in range(0, len(texts), 7):
        terminal.__init__(terminal.columns, terminal.rows)
        with pytest.raises(KeyboardInterrupt):
            run_main(terminal, monkeypatch, told(segments, stop_after=passes))
        assert terminal.shows() == texts[passes].rstrip("\n")
        assert terminal.x == 0 and terminal.y == texts[passes].count("\n") + 1 + len(terminal.wraps), "on a new line"
