"""The live view, on a small terminal that the tests emulate: at every moment it shows the plain
text so far and, while a block is being written, a line a branch below it; at the end the answer
alone."""
import random
import re
import sys
import unicodedata
from contextlib import redirect_stdout

import pytest
import torch

import decode
from aspd import Block, Branch, join, plain, tokenize
from decode import LM, View, generate
from helpers import TOKENIZER, tiny_model
from script import script

SIZES = [(80, 24), (40, 10), (20, 6), (9, 3)]
TOO_SMALL = [(80, 1), (5, 24), (5, 1), (1, 1), (2, 2)]  # for any branch line
OURS = re.compile(r"\x1b\[\d*[AJ]")  # what the view itself may send to steer a terminal


# ---- a terminal -------------------------------------------------------------

def width(text):
    """Columns that it takes: wide characters two of them, combining ones none."""
    columns = 0
    for character in text:
        if not unicodedata.combining(character):
            columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return columns


class Terminal:
    """A window of some rows at the end of a growing list of lines. A full line wraps when its next
    character comes."""
    encoding = "utf-8"

    def __init__(self, columns, rows):
        self.columns = columns
        self.rows = rows
        self.clear()

    def clear(self):
        self.x = 0
        self.y = 0
        self.lines = [[]]   # of characters; a wide one is followed by an empty one
        self.wraps = set()  # lines that go on in the next one
        self.raw = ""

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
        self.raw += text
        for number, command, character in re.findall(r"\x1b\[(\d*)([AJ])|(.)", text, re.S):
            n = int(number or 1)
            if command == "A":  # up, but never out of the window
                top = max(len(self.lines) - self.rows, 0)
                self.y = max(self.y - n, top)
                self.x = min(self.x, self.columns - 1)
            elif command == "J":
                self.clear_below()
            elif character == "\n":
                self.next_line()
            elif character:
                self.put(character)

    def clear_below(self):
        """From here on; the window keeps its place."""
        below = self.lines[self.y + 1:]
        self.lines[self.y:] = [self.lines[self.y][:self.x]] + [[] for _ in below]
        self.wraps = {y for y in self.wraps if y < self.y}

    def next_line(self):
        self.x = 0
        self.y += 1
        if self.y == len(self.lines):
            self.lines.append([])

    def put(self, character):
        assert character.isprintable() or unicodedata.combining(character), "control characters"
        columns = width(character)
        if self.x + columns > self.columns:
            self.wraps.add(self.y)
            self.next_line()
        line = self.lines[self.y]
        line += " " * (self.x - len(line))
        if columns:
            line[self.x:self.x + columns] = [character] + [""] * (columns - 1)
        else:
            line[self.x - 1] += character
        self.x += columns

    def shows(self):
        """All lines from the first to the last with text, those that have scrolled out, too."""
        text = ""
        for y, line in enumerate(self.lines):
            text += "".join(line)
            if y not in self.wraps:
                text += "\n"
        return text.rstrip("\n")


def make_terminal(size, monkeypatch):
    """Of that size for the code under test, too."""
    for name, value in zip(("COLUMNS", "LINES"), size):
        monkeypatch.setenv(name, str(value))
    return Terminal(*size)


@pytest.fixture(params=SIZES, ids="{0[0]}x{0[1]}".format)
def terminal(request, monkeypatch):
    return make_terminal(request.param, monkeypatch)


# ---- answers to show --------------------------------------------------------

def told(segments, stop_after=None):
    """An LM that writes an answer of text segments, whatever its weights; perhaps interrupted after
    some passes."""
    lm = LM(tiny_model(block_size=8192), TOKENIZER)
    ids = tokenize(segments, TOKENIZER.encode)
    passes = enumerate(script(ids, TOKENIZER.tags, TOKENIZER.eos))

    def step(*args):
        n, tokens = next(passes)
        if n == stop_after:
            raise KeyboardInterrupt
        return torch.tensor(tokens), None

    lm.step = step
    return lm


def block(n, name="Part", text="words of it, and more words", repeat=1):
    """n branches, the second four times as long as the others, with line breaks between them."""
    branches = Block()
    for i in range(1, n + 1):
        title = "\n" * (i > 1) + f"{i}. **{name} {i}**"
        branches.append(Branch(title, ": " + text * repeat * (4 if i == 2 else 1)))
    return branches


def is_writing_block(engine):
    return isinstance(engine.segments[-1], Block)


def text_so_far(engine):
    """The plain text before the block that is being written, without the bytes of half a
    character."""
    done = engine.segments[:-1] if is_writing_block(engine) else engine.segments
    return TOKENIZER.decode(plain(done)).rstrip("\ufffd")


def on_screen(text):
    """Text as a terminal is to show it, its control characters escaped."""
    shown = ""
    for character in text:
        control = unicodedata.category(character) == "Cc" and character != "\n"
        shown += character.encode("unicode_escape").decode() if control else character
    return shown


def watch(terminal, segments, look=None):
    """Writes an answer under a View. After every pass the terminal must show exactly the plain text
    so far, and below it the branch lines; look(engine, the branch lines) checks
    more. At the end: exactly the answer, and the cursor on the next line."""
    view = View()

    def spy(engine):
        view(engine)
        lines = [line.removesuffix("\n") for line in view.lines]
        expected = on_screen(text_so_far(engine)) + "\n".join(lines)
        assert terminal.shows() == expected.rstrip("\n")
        if look:
            look(engine, lines)

    with redirect_stdout(terminal):
        answer = generate(told(segments), "p", "adaptive", max_new_tokens=8000, watch=spy)
        assert answer.text == join(segments)
        view.write(answer.text + "\n")
    assert terminal.shows() == on_screen(answer.text).rstrip("\n") and terminal.x == 0
    return answer


LEAD = "Here is a lead, with some words in it:\n\n"
ANSWERS = {
    "no block": ["Only text, " * 50],
    "one block": [LEAD, block(3), "\n\nAnd an end."],
    "nothing around": [block(2)],
    "more branches than rows": [LEAD, block(16), "\nEnd.\n\n\n"],
    "longer than the window": [
        "A long paragraph. " * 25 + "\n", block(5, repeat=4), "\nSo on. " * 20 + "\n", block(4)],
    "blocks side by side": [LEAD, block(2), "\n", block(4), "\n", block(3), "\nEnd."],
    "wide characters": [
        "以下是幾個重點：\n\n", block(4, "重點的名稱", "這是很長的一段話，" * 9), "\n以上。😀"],
    "combining characters": ["e\u0301:\n", block(3, "e\u0301", "e\u0301" * 30), "\ne\u0301"],
    "block on a line that is begun": [
        LEAD, block(16), "\nTwo: ", block(2), block(2), "\nEnd."],
    "block behind a full line": [
        LEAD, block(16), "\n" + "x" * 40, block(2), "x" * 40 + "\n", block(2), "\nEnd."],
    "block behind wide characters": [
        LEAD, block(16), "\n重點有兩個：", block(2), "重點有兩個：\n", block(2), "\nEnd."],
}


# ---- at every moment --------------------------------------------------------

@pytest.mark.parametrize("name", ANSWERS)
def test_every_moment_shows_the_text_and_the_branches_and_the_end_the_answer_alone(terminal, name):
    """While a block is being written there is a line a branch, as many as fit; none is wider than
    the terminal. A block that opens in the middle of a line is shown when it is done."""
    most = [0]

    def look(engine, lines):
        begun = engine.segments[-1] if is_writing_block(engine) else []
        own_line = text_so_far(engine)[-1:] in ("", "\n")
        assert len(lines) == own_line * min(len(begun), terminal.rows - 2)
        for line in lines:
            assert line.startswith("| ") and width(line) < terminal.columns
        most.append(len(lines))

    answer = watch(terminal, ANSWERS[name], look)
    assert max(most) == min(max(map(len, answer.blocks), default=0), terminal.rows - 2)


@pytest.mark.parametrize("size", TOO_SMALL, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", ["one block", "longer than the window", "combining characters"])
def test_terminal_too_small_for_branch_lines_shows_none_rather_than_wrong_ones(
        size, name, monkeypatch):
    """One row, or five columns, or less: the text alone, which nothing is ever taken from."""
    def look(engine, lines):
        assert not lines

    terminal = make_terminal(size, monkeypatch)
    watch(terminal, ANSWERS[name], look)
    assert "\x1b" not in terminal.raw


@pytest.mark.parametrize("columns", [5, 7, 8, 9, 13])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_small_terminals_show_right_lines_or_none(columns, rows, monkeypatch):
    """Whatever the size: no line wraps or scrolls away, so the lines that are taken back are the
    lines that were written."""
    def look(engine, lines):
        assert len(lines) < rows and all(width(line) < columns for line in lines)

    for name in ("one block", "wide characters", "block behind a full line"):
        watch(make_terminal((columns, rows), monkeypatch), ANSWERS[name], look)


def test_lines_that_are_exactly_full(terminal):
    """Whole lines of text, and of the branches, as long as the terminal is wide or twice that."""
    full = terminal.columns
    long = block(2, text="y" * 2 * full)
    watch(terminal, ["x" * full + "\n", long, "\n" + "x" * 2 * full + "\n", block(2), "z" * full])


WORDS = ["a", "b ", "7", "\n", "é", "漢字", "\U0001f600", "e\u0301", "<|branch|>", "\x1b[2J", "\r"]


@pytest.mark.parametrize("size", SIZES[:3], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("seed", range(4))
def test_random_answers(size, seed, monkeypatch):
    """Lines of any length, of wide, combining, control and ordinary characters."""
    rng = random.Random(seed)

    def words(most):
        return "".join(rng.choices(WORDS, k=rng.randint(0, most)))

    segments = []
    for _ in range(rng.randint(1, 3)):
        branches = Block()
        for i in range(rng.randint(2, 7)):
            branches.append(Branch("\n" * (i > 0) + f"{i}." + words(3), words(30)))
        segments += ["." + words(100) + "\n", branches]
    watch(make_terminal(size, monkeypatch), segments + ["\n" + words(50)])


def test_branch_line_has_the_title_and_the_latest_words(monkeypatch):
    """Half the line for how the title begins, and half for what was written last."""
    terminal = make_terminal((40, 10), monkeypatch)
    words = [f"{i:03}" for i in range(40)]
    rest = "\n" + " \n".join(words)
    titles = ["1. Short", "\n2. Too long for half of a line"]
    seen = []

    def look(engine, lines):
        seen.append(lines)

    watch(terminal, [LEAD, Block(Branch(title, rest) for title in titles)], look)
    for k in (1, 2, 5, 12, 40):
        text = " ".join(words[:k])
        assert [f"| 1. Short {text[-18:]}", f"| 2. Too long for ha {text[-18:]}"] in seen


def test_branch_line_holds_nothing_that_moves_the_cursor():
    """No tab and no line break of its branch, which may stand in a text."""
    for title, rest in [("\n1.\tA", "\tone\ttwo\n\nthree\u2028\x0b\x85"), ("\n2. B", "")]:
        assert decode.branch_line(title, rest, 40).removesuffix("\n").isprintable()


# ---- control characters -----------------------------------------------------

CONTROLS = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))
EVIL = "\x1b[2J\x1b]0;title\x07\r\x08\x9b1A\x7f\x00"


@pytest.mark.parametrize("size", [(80, 24), (20, 6), (5, 1)], ids="{0[0]}x{0[1]}".format)
def test_control_characters_never_reach_the_terminal(size, monkeypatch):
    """In text, in titles and in branches: shown escaped, so that no answer can clear the screen,
    move the cursor or ring. The Answer keeps them."""
    terminal = make_terminal(size, monkeypatch)
    branches = Block([Branch("1. " + EVIL, EVIL * 3), Branch("\n2. b" + EVIL, CONTROLS)])
    segments = [EVIL + "text\n", branches, "\n" + CONTROLS + EVIL]
    answer = watch(terminal, segments)
    assert answer.text == join(segments)
    sent = OURS.sub("", terminal.raw)
    assert not [c for c in sent if unicodedata.category(c) == "Cc" and c != "\n"]
    assert "\\x1b[2J" in terminal.shows().replace("\n", "") and "\\x9b1A" in terminal.shows()


# ---- the command line -------------------------------------------------------

def run_main(terminal, monkeypatch, lm):
    def load(*args):
        return lm

    arguments = ["decode.py", "--prompt", "p", "--device", "cpu", "--max-new-tokens", "8000"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(decode, "load", load)
    decode.main()


def test_command_line_leaves_the_answer_alone(terminal, monkeypatch, capsys):
    """On stdout; the figures go to stderr. The view was live: branch lines came and went."""
    segments = [LEAD, block(4), "\nEnd."]
    run_main(terminal, monkeypatch, told(segments))
    assert terminal.shows() == join(segments) and terminal.x == 0
    assert "\x1b[J" in terminal.raw
    assert "finish: stop" in capsys.readouterr().err


def test_interrupt_leaves_the_text_so_far(terminal, monkeypatch):
    """Before, within and after a block, whose lines go."""
    segments = [LEAD, block(4), "\nAnd an end.\n" * 3]
    texts = [""]

    def follow(engine):
        texts.append(text_so_far(engine))

    generate(told(segments), "p", "adaptive", max_new_tokens=8000, watch=follow)
    assert texts[-1] == join(segments) and texts.count(LEAD) > 60
    for passes in range(0, len(texts), 7):
        terminal.clear()
        with pytest.raises(KeyboardInterrupt):
            run_main(terminal, monkeypatch, told(segments, stop_after=passes))
        assert terminal.shows() == texts[passes].rstrip("\n")
