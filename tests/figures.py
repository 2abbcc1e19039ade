"""Draws the README's pictures, as SVG, from decodes and from what tests/bench.py has measured.

    python tests/bench.py --baseline base --json tests/results/builtin.json
    python tests/figures.py --ckpt out --baseline base

row.svg    the row of a small answer: its tokens, positions and mask
race.svg   one real answer being written, serial and parallel, pass by pass; it moves
speed.svg  speed by kind of prompt

They bring their own background, and follow the reader's choice of a light or a dark page. A figure
whose input is missing is left out, and the exit code is then 2.
"""
import argparse
import json
import math
import re
import sys
import textwrap
import time
from bisect import bisect_right
from html import escape
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aspd import (TAG_NAMES, Block, Branch, Tags, branch_mask, check, layout, naming, pieces,
                  tokenize)
from bench import machine
from data import cli, extract, printable
from decode import generate, load

PROMPT = "Write bullet points on camels, foxes, lions and wolves."  # held out from training
PANELS = {"builtin.json": "The built-in corpus", "smollm2.json": "SmolLM2-135M, fine-tuned"}
BARS = {  # key of tests/bench.py's figures: class of colour, what it means
    "ideal": ("shared", "ideal: plain tokens written in a pass"),
    "fewer_steps": ("c1", "passes: times fewer than serially"),
    "speedup": ("c2", "clock: times faster than serially"),
}
WIDTH = 600        # of all figures, in their own units; a README shows them 400 to 800 pixels wide
MARGIN = 20
INNER = WIDTH - 2 * MARGIN
HOLD = 3.5         # seconds that the end of the race stays
MAX_BYTES = 200_000
COLORS = {  # class: on a light page, on a dark one
    "page": ("#ffffff", "#0d1117"),
    "edge": ("#d0d7de", "#30363d"),
    "track": ("#eaeef2", "#21262d"),
    "ink": ("#1f2328", "#e6edf3"),
    "dim": ("#59636e", "#9198a1"),
    "shared": ("#aab4bf", "#5c6672"),  # serial tokens
    "bar": ("#59636e", "#9198a1"),
    "c1": ("#0b62c4", "#6cb6ff"),      # branches, in their order
    "c2": ("#bc4c00", "#ff9e5e"),
    "c3": ("#0f7a4f", "#4fc98e"),
    "c4": ("#8a3fc0", "#cf9bff"),
    "c5": ("#9e6a03", "#e3b341"),
    "c6": ("#bf2b75", "#ff8fc4"),
}
STYLE = """\
text{font-family:system-ui,sans-serif;font-size:14px;white-space:pre}
.head{font-size:17px;font-weight:600;font-variant-numeric:tabular-nums}
.mono{font-family:ui-monospace,monospace;font-size:12px}
.small{font-size:12px}.bold{font-weight:600}.right{text-anchor:end}.mid{text-anchor:middle}
.one{stroke:#8c959f;stroke-dasharray:3 3}.halo{paint-order:stroke;stroke-width:2px}
"""


# ---- SVG --------------------------------------------------------------------

def text(x, y, content, classes="ink"):
    """A line of text; y is its base line."""
    return f'<text x="{x:g}" y="{y:g}" class="{classes}">{escape(printable(content))}</text>'


def box(x, y, width, height, classes, radius=0):
    """A filled rectangle."""
    rounded = f' rx="{radius:g}"' if radius else ""
    return (f'<rect x="{x:g}" y="{y:g}" width="{width:.4g}" height="{height:g}"{rounded} '
            f'class="{classes}"/>')


def color_of(branch):
    """The class of branch 1, 2, ...; of serial text, 0, the ink's."""
    return f"c{(branch - 1) % 6 + 1}" if branch else "ink"


def palette(k):
    """CSS: the colours of light pages (k = 0) or of dark ones (1)."""
    fills = [f".{name}{{fill:{pair[k]}}}" for name, pair in COLORS.items()]
    strokes = f".page{{stroke:{COLORS['edge'][k]}}}.halo{{stroke:{COLORS['page'][k]}}}"
    return "".join(fills) + strokes


def svg(title, description, height, body, style=""):
    """A whole file. body: a list of elements."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
        f"<title>{escape(title)}</title>", f"<desc>{escape(printable(description))}</desc>",
        "<style>", STYLE + palette(0), f"@media (prefers-color-scheme:dark){{{palette(1)}}}",
        style + "</style>",
        box(.5, .5, WIDTH - 1, height - 1, "page", 10), *body, "</svg>"])


# ---- the row ----------------------------------------------------------------

def example():
    """The answer of `python aspd.py`: segments of text, their row, and the names of its tokens."""
    vocab = {name: i for i, name in enumerate([*TAG_NAMES, "<eos>"])}

    def encode(words):  # one id a word
        return [vocab.setdefault(word, len(vocab)) for word in words.split()]

    block = Block([Branch("1. Sleep", ": eight hours."), Branch("2. Move", ": walk daily.")])
    segments = ["Two tips:", block, "Start today."]
    ids = tokenize(segments, encode)
    row = layout(encode("How to live well?"), ids, vocab["<eos>"], Tags(*range(6)))
    names = {i: name for name, i in vocab.items()}
    return segments, row, [names[i] for i in row.token.tolist()]


def draw_row(args):
    """The example: its text, where its tokens stand, and who sees whom."""
    segments, row, names = example()
    left = 176  # of the positions and of the mask
    cell = (WIDTH - MARGIN - left) / len(names)
    words = []
    for segment in segments:
        parts = segment if isinstance(segment, Block) else [Branch(segment, "")]
        for n, part in enumerate(parts, start=isinstance(segment, Block)):
            words.append(f'<tspan class="{color_of(n)}">{part.title + part.rest} </tspan>')
    body = [text(MARGIN, 36, "The row of an answer with two branches", "ink head"),
            f'<text x="{MARGIN}" y="60">{"".join(words)}</text>',
            text(left, 94, "Where its tokens stand: siblings share positions", "dim small"),
            *positions_of(row, left, cell, 104),
            *mask_of(row, names, left, cell, 222)]
    legend = [("shared", 9, "serial tokens, which all later ones see"),
              ("c1", 9, "branch 1, seen by itself and after the block"),
              ("c2", 9, "branch 2, likewise"), ("dim", 2, "hidden: the sibling's tokens")]
    for n, (color, size, words) in enumerate(legend):
        y = 238 + n * 20
        body += [box(302 - size / 2, y - size / 2, size, size, color, 1.5),
                 text(314, y + 4, words, "ink small")]
    description = ("The row of the answer that `python aspd.py` prints. Its two branches have the "
                   "same positions, and do not see each other.")
    return svg("Tokens, positions and mask", description, 222 + cell * len(names) + MARGIN, body)


def positions_of(row, left, cell, y):
    """Elements: a track for the serial text and for each branch, every token at its position."""
    branch = row.branch.tolist()
    position = row.position.tolist()
    names = ["serial"] + [f"branch {b}" for b in range(1, max(branch) + 1)]
    body = []
    for b, name in enumerate(names):
        at = y + b * 22
        body += [text(left - 8, at + 11, name, f"{color_of(b)} small right"),
                 box(left, at, (max(position) + 1) * cell - 1.2, 14, "track", 2)]
        for own, p in zip(branch, position):
            if own == b:
                color = color_of(b) if b else "shared"
                body.append(box(left + p * cell, at, cell - 1.2, 14, f"{color} place", 1.5))
    at = y + len(names) * 22 + 8
    body.append(text(left - 8, at, "position", "dim small right"))
    for p in range(0, max(position) + 1, 5):
        body.append(text(left + (p + .5) * cell, at, str(p), "dim small mid"))
    return body


def mask_of(row, names, left, cell, top):
    """Elements: a row for each token, with its name, its position and what it sees."""
    branch = row.branch.tolist()
    body = [text(left - 66, top - 10, "token", "dim small right"),
            text(left - 8, top - 10, "position", "dim small right"),
            text(left, top - 10, "Who sees whom: a column for each token that may be seen",
                 "dim small")]
    for t, sees in enumerate(branch_mask(row.block, row.branch).tolist()):
        y = top + t * cell
        color = color_of(branch[t])
        body += [text(left - 66, y + cell - 3, names[t], f"{color} mono right token"),
                 text(left - 8, y + cell - 3, str(int(row.position[t])), f"{color} mono right")]
        for key in range(t + 1):
            x = left + key * cell
            if sees[key]:
                seen = color_of(branch[key]) if branch[key] else "shared"
                body.append(box(x, y, cell - 1.2, cell - 1.2, f"{seen} cell", 1.5))
            else:
                body.append(box(x + cell / 2 - 1.6, y + cell / 2 - 1.6, 2, 2, "dim hole", 1))
    return body


# ---- the race ---------------------------------------------------------------

class Recorder:
    """Decodes, and keeps: the answer, when each pass was done, and what was written by then."""

    def __init__(self, lm, mode, prompt):
        self.times = []    # seconds to the end of each pass; the first is the prefill
        self.lengths = []  # of each piece of the answer, in tokens, after each pass
        self.tokenizer = lm.tokenizer
        self.start = time.perf_counter()
        self.answer = generate(lm, prompt, mode, watch=self)
        self.lengths = self.lengths[1:] + [list(map(len, pieces(self.segments)))]

    def __call__(self, engine):
        self.times.append(time.perf_counter() - self.start)
        self.lengths.append(list(map(len, pieces(engine.segments))))  # without this pass's tokens
        self.segments = engine.segments

    def written(self):
        """Yields each segment with [(ids, the pass that chose each)] of its pieces."""
        n = 0
        for segment in self.segments:
            passes = []
            for ids in pieces([segment]):
                grown = [lengths[n] if n < len(lengths) else 0 for lengths in self.lengths]
                passes.append((ids, [bisect_right(grown, j) for j in range(len(ids))]))
                n += 1
            yield segment, passes


def decode_both(args):
    """Five decodes of each side, in turn -> the serial and the parallel one of median time."""
    lm = load(args.ckpt)
    twin = load(args.baseline) if args.baseline else lm
    runs = []
    for _ in range(1 + 5):  # one to warm up
        runs.append((Recorder(twin, "serial", args.prompt), Recorder(lm, "adaptive", args.prompt)))
    return [sorted(side, key=lambda run: run.times[-1])[2] for side in zip(*runs[1:])]


def characters(passes, tokenizer):
    """[(ids, passes)] of one piece of text -> its characters, and the pass that wrote each."""
    shown = ""
    born = []
    for ids, chosen in passes:
        before = shown
        for n in range(len(ids)):
            shown = before + tokenizer.decode(ids[:n + 1]).rstrip("\ufffd")
            born += [chosen[n]] * (len(shown) - len(born))
        shown = before + tokenizer.decode(ids)
        born += chosen[-1:] * (len(shown) - len(born))
    return list(zip(shown, born))


def em(char):
    """About the width of a character in the widest of the usual fonts, as a part of its height."""
    if char in "iljI.,:;'!| ()[]":
        return .36
    if char in "mwMW" or not char.isascii():
        return .92
    return .72 if char.isupper() else .6


def flow(chars, x, y, width, side):
    """Sets characters, [(char, pass, class)], in lines -> (elements, y of the line below)."""
    lines = [[]]
    used = 0
    start = 0
    for part in re.findall(r"\n+|[^\S\n]+|\S{1,16}", "".join(char for char, _, _ in chars)):
        here = chars[start:start + len(part)]
        start += len(part)
        room = sum(14 * em(char) * (1.13 if "bold" in classes else 1) for char, _, classes in here)
        if "\n" in part or used + room > width and not part.isspace():
            lines.append([])
            used = 0
        if "\n" not in part and (lines[-1] or not part.isspace()):
            lines[-1] += here
            used += room
    body = []
    for line in filter(None, lines):
        spans = []
        for (born, color), run in groupby(line, key=lambda char: char[1:]):
            letters = escape(printable("".join(char for char, _, _ in run)))
            spans.append(f'<tspan class="{color} {side}{born}">{letters}</tspan>')
        body.append(f'<text x="{x:g}" y="{y:g}">{"".join(spans)}</text>')
        y += 18
    return body, y


def serial_lines(run, y):
    """The serial answer, in colour what extract() finds in it -> (elements, y of the line below).
    """
    segments, _ = extract(run.answer.text, run.answer.prompt)
    colors = []
    for segment in segments:
        if isinstance(segment, Block):
            for n, branch in enumerate(segment, start=1):
                colors += [color_of(n) + " bold"] * len(branch.title)
                colors += [color_of(n)] * len(branch.rest)
        else:
            colors += ["ink"] * len(segment)
    (_, passes), = run.written()
    chars = [(*char, color) for char, color in zip(characters(passes, run.tokenizer), colors)]
    return flow(chars, MARGIN, y, INNER, "a")


def parallel_lines(run, y):
    """The parallel answer, its branches side by side -> (elements, y of the line below)."""
    body = []
    for segment, passes in run.written():
        if not isinstance(segment, Block):
            chars = [(*char, "ink") for char in characters(passes, run.tokenizer)]
            lines, y = flow(chars, MARGIN, y, INNER, "b")
            body += lines
            continue
        branches = list(zip(passes[::2], passes[1::2]))  # title and rest
        columns = min(len(branches), 4)
        pitch = (INNER + 14) / columns
        for first in range(0, len(branches), columns):
            ends = []
            for n, pair in enumerate(branches[first:first + columns]):
                color = color_of(first + n + 1)
                title = len(run.tokenizer.decode(pair[0][0]))
                chars = [(*char, color + " bold" * (k < title)) for k, char in
                         enumerate(characters(pair, run.tokenizer))]
                lines, end = flow(chars, MARGIN + n * pitch, y + 6, pitch - 14, "b")
                body += lines
                ends.append(end)
            y = max(ends) + 6
    return body, y


def panel(name, side, run, y):
    """The head of a side: its name and, a frame a pass, its clock and a bar of its progress."""
    body = [text(MARGIN, y, name, "ink head"), box(MARGIN, y + 9, INNER, 5, "track", 2.5)]
    for k, (seconds, lengths) in enumerate(zip(run.times, run.lengths)):
        n = sum(lengths)
        body.append(f'<g class="frame {side}f{k}">'
                    + box(MARGIN, y + 9, INNER * n / max(run.answer.tokens, 1), 5, "bar", 2.5)
                    + text(WIDTH - MARGIN - 76, y, f"{n} tokens, pass {k}", "dim right")
                    + text(WIDTH - MARGIN, y, f"{seconds:.3f} s", "ink head right") + "</g>")
    return body


def motion(times, side, slower, loop, still):
    """CSS: when each token (class side + pass) and each frame (side, f, pass) is seen. Where
    nothing moves, it is what was seen after `still` seconds."""
    rules = []
    ends = [100 * slower * t / loop for t in times[1:]] + [100]
    for k, (t, end) in enumerate(zip(times, ends)):
        at = f"{100 * slower * t / loop:.2f}%"
        until = f"{end:.2f}%,to{{opacity:0}}" if end < 100 else "to{opacity:1}"
        seen = t <= still
        last = seen and (k + 1 == len(times) or times[k + 1] > still)
        rules.append(f"@keyframes {side}{k}{{0%{{fill-opacity:.18}}{at},to{{fill-opacity:1}}}}"
                     f"@keyframes {side}f{k}{{0%{{opacity:0}}{at}{{opacity:1}}{until}}}"
                     f".{side}{k}{{animation-name:{side}{k}{'' if seen else ';fill-opacity:.18'}}}"
                     f".{side}f{k}{{animation-name:{side}f{k};opacity:{int(last)}}}")
    return "\n".join(rules)


def draw_race(args):
    """One answer, written serially and in parallel."""
    serial, parallel = decode_both(args)
    times = serial.times[-1], parallel.times[-1]
    slower = max(math.ceil(9 / max(times)), 1)
    loop = max(times) * slower + HOLD
    same = serial.answer.text == parallel.answer.text
    what = "One answer" if same else "Two answers"
    models = "a serial model and its parallel twin" if args.baseline else "one model"
    speed = f"slowed down {slower} times" if slower > 1 else "at its true speed"
    body = [text(MARGIN, 36, textwrap.shorten(args.prompt, 55), "ink head"),
            text(MARGIN, 57, f"{what} of {models}, {speed}", "dim small")]
    body += panel("Serial", "a", serial, 92)
    lines, y = serial_lines(serial, 126)
    body += lines + panel("Parallel", "b", parallel, y + 22)
    lines, y = parallel_lines(parallel, y + 56)
    result = (f"{parallel.answer.steps} passes instead of {serial.answer.steps}: "
              f"{times[0] / times[1]:.1f} times as fast")
    words = "Word for word the same answer" if same else "The two answers differ"
    body += lines + [text(MARGIN, y + 22, result, "ink head"),
                     text(MARGIN, y + 42, f"{words}; {machine('cpu')}, median of five",
                          "dim small")]
    still = min(times)
    style = [f".frame,tspan{{animation:{loop:.2f}s step-end 2s infinite}}",
             motion(serial.times, "a", slower, loop, still),
             motion(parallel.times, "b", slower, loop, still),
             "@media (prefers-reduced-motion:reduce){.frame,tspan{animation:none!important}}"]
    picture = svg("An answer being written, serially and in parallel", f"{result}. {words}.",
                  y + 58, body, "\n".join(style))
    size = len(picture.encode())
    check(size < MAX_BYTES, f"race.svg would have {size} bytes: choose a prompt of a short answer")
    return picture


# ---- speed ------------------------------------------------------------------

def draw_speed(args):
    """Speed by kind of prompt, of every file of PANELS that is there; the first must be."""
    body = [text(MARGIN, 36, "Speed by kind of prompt", "ink head"),
            text(MARGIN, 58, "Times serial decoding. Beside each kind, how many answers.", "dim")]
    y = 82
    for color, words in BARS.values():
        body += [box(MARGIN, y - 10, 11, 11, color, 2), text(MARGIN + 18, y, words, "ink")]
        y += 20
    files = [Path(args.results, name) for name in PANELS]
    for file in files[:1] + [file for file in files[1:] if file.exists()]:
        check(file.exists(), f"no {file}: first run `python tests/bench.py --json {file}`")
        with naming(file):
            summary = json.loads(file.read_text(encoding="utf-8"))["summary"]
            bars, y = bars_of(PANELS[file.name], summary, y + 24)
            body += bars
    return svg("Speed by kind of prompt", "Fewer passes, wall-clock and ideal, by kind of prompt.",
               y + 8, body)


def bars_of(title, summary, y):
    """One file of tests/bench.py -> (elements, y of the line below); the fastest kind first."""
    kinds = sorted(summary["kinds"].items(), key=lambda kind: -kind[1]["speedup"])
    kinds.append(("all", summary["all"]))
    longest = max(f[key] for _, f in kinds for key in BARS)
    left = 166
    unit = (WIDTH - MARGIN - 44 - left) / max(longest, 1)
    one = left + unit  # where serial decoding ends
    bottom = y + 24 + 51 * len(kinds)
    values = []  # on top of everything else
    body = [text(MARGIN, y, title, "ink head")]
    for n, (name, f) in enumerate(kinds):
        y_kind = y + 24 + 51 * n
        body += [text(left - 36, y_kind + 24, name, "ink right" + " bold" * (name == "all")),
                 text(left - 8, y_kind + 24, str(f["answers"]), "dim small right")]
        for k, (key, (color, _)) in enumerate(BARS.items()):
            end = left + f[key] * unit
            body.append(box(left, y_kind + 14 * k, end - left, 12, f"{color} bar-{key}", 2))
            values.append(text(end + 5, y_kind + 14 * k + 10.5, f"{f[key]:.2f}", "ink small halo"))
    body += [f'<line x1="{one:g}" y1="{y + 16}" x2="{one:g}" y2="{bottom}" class="one"/>', *values,
             text(one, bottom + 14, "1 = serial", "dim small mid"),
             text(MARGIN, bottom + 36, summary["machine"], "dim small")]
    return body, bottom + 44


# ---- command line -----------------------------------------------------------

def main():
    """The command line."""
    p = argparse.ArgumentParser(description="Draws the README's pictures, as SVG.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--ckpt", default="out", metavar="DIR", help="a folder with a ckpt.pt, for race.svg")
    add("--baseline", metavar="DIR", help="the serial twin's; none: --ckpt with blocks forbidden")
    add("--prompt", default=PROMPT, metavar="TEXT", help="what race.svg answers")
    add("--results", default=Path(__file__).parent / "results", metavar="DIR",
        help="where tests/bench.py's JSON is, for speed.svg: " + ", ".join(PANELS))
    add("--out", default=Path(__file__).parent / "figures", metavar="DIR", help="where to draw")
    args = p.parse_args()

    Path(args.out).mkdir(parents=True, exist_ok=True)
    problems = []
    for name, draw in {"row": draw_row, "race": draw_race, "speed": draw_speed}.items():
        try:
            picture = draw(args)
        except (ValueError, OSError) as e:  # the other figures may still be drawn
            problems.append(f"no {name}.svg: {e}")
            continue
        Path(args.out, f"{name}.svg").write_text(picture + "\n", "utf-8")
        print(f"{args.out}/{name}.svg: {len(picture.encode())} bytes")
    check(not problems, "; ".join(problems))


if __name__ == "__main__":
    cli(main)
