"""A blind comparison: do readers find answers with branches worse than the serial twin's?

    python tests/judge.py --prompts FILE.jsonl   # the answers in tests/results/smollm2.json
    python tests/judge.py FILE.json --name Ada   # what bench.py --prompts --json wrote
    python tests/judge.py --summary              # tables of the marks that are kept

    ======== Pair 3 of 80, generic
    What are the most effective ways to deal with stress?

    -------- Answer A                                  # whose it is was drawn
    Stress has many causes. ...

    -------- Answer B
    There are several ways: ...

    Mark of A: 6
    Mark of B: 4 rc                                    # it repeats, and contradicts itself

Marks are kept after each pair, so the same command goes on later. All readers get the pairs in one
order, so that two who stop early have read the same ones. "q" stops and reveals who wrote what;
Ctrl-C stops and reveals nothing.
"""
import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from aspd import BadInput, check
from bench import interval
from data import cli, printable

KEPT = ROOT / "tests" / "results" / "blind-marks.json"
HOW = "Both answers of a prompt read blind, in a drawn order."
SIDES = {"aspd": "ASPD", "serial": "its serial twin"}  # as bench.py's JSON calls them
FAULTS = {"r": "repeats", "c": "contradicts", "o": "offtopic", "u": "cutoff", "g": "glued"}
HELP = """
Mark each answer from 1 to 10. Letters after it name faults, as in "4 rc":
r repeats, c contradicts itself or doubles a part, o is off topic,
u is cut off, g is glued: a break is missing.
Or: a or b shows that answer again, q stops and reveals who wrote what.
"""


@dataclass
class Mark:
    """What one reader says of one pair."""
    prompt: int         # its number in the file of answers, from 1
    category: str
    block: bool         # ASPD's answer has branches
    cut: bool           # the budget cut one of the answers
    shown_first: str    # the side that was answer A
    aspd: int           # from 1, the worst, to 10
    serial: int
    aspd_faults: list   # values of FAULTS
    serial_faults: list

    def __post_init__(self):
        named = isinstance(self.prompt, int) and isinstance(self.category, str)
        check(named and self.shown_first in SIDES, "a mark of no pair")
        for side in SIDES:
            check(1 <= getattr(self, side) <= 10, f"prompt {self.prompt}: a mark is 1 to 10")
            faults = set(getattr(self, side + "_faults"))
            check(faults <= set(FAULTS.values()), f"prompt {self.prompt}: an unknown fault")


# ---- files ------------------------------------------------------------------

def read_json(path):
    """The content of a JSON file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise BadInput(f"{path}: not JSON ({e})") from None


def read_pairs(path):
    """What bench.py wrote -> its results. Each has both sides, and each side a text."""
    message = f"{path}: no results with texts of both sides, as bench.py --prompts writes them"
    try:
        results = read_json(path)["results"]
        texts = [result[side]["text"] for result in results for side in SIDES]
    except (LookupError, TypeError):
        raise BadInput(message) from None
    check(texts and all(isinstance(text, str) for text in texts), message)
    return results


def read_prompts(path, results):
    """The prompt of each result: of a file of JSON Lines or, without one, of the results."""
    if not path:
        return [result.get("prompt", "(no prompt is kept: see --prompts)") for result in results]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
    except (ValueError, LookupError, TypeError):
        raise BadInput(f'{path}: a line is no JSON object with a "prompt"') from None
    check(len(prompts) == len(results), f"{path}: {len(prompts)} prompts for {len(results)} pairs")
    return prompts


def fingerprint(results):
    """Says whether marks are about these answers."""
    texts = [[result[side]["text"] for side in SIDES] for result in results]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def read_marks(path):
    """A file of marks -> the fingerprint of the answers, {name: {"how": ..., "marks": Marks}}."""
    book = read_json(path)
    try:
        for reader in book["readers"].values():
            reader["how"] = str(reader["how"])
            reader["marks"] = [Mark(**mark) for mark in reader["marks"]]
        return book["answers"], book["readers"]
    except (LookupError, TypeError, AttributeError, BadInput) as e:
        raise BadInput(f"{path}: not a file of marks that judge.py wrote ({e})") from None


def keep(path, answers, name, reader):
    """Adds a reader to a file of marks, or writes what is new. It is written whole."""
    readers = read_marks(path)[1] if path.exists() else {}
    book = {"answers": answers, "readers": readers | {name: reader}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(book, default=asdict, indent=1) + "\n")
    temporary.replace(path)


# ---- a session --------------------------------------------------------------

def ask(question):
    """A line of the reader's. q, and the end of a pipe, raise EOFError."""
    print(question, end="", flush=True)
    line = sys.stdin.readline()
    if not sys.stdin.isatty():
        print(line.rstrip("\n"))  # on a terminal it stands there already
    if not line or line.strip().lower() == "q":
        raise EOFError
    return line.strip()


def show(heading, text):
    """Prints a text at the terminal's width, lists indented; on a terminal a screenful a time."""
    columns, rows = shutil.get_terminal_size()
    screenful = max(rows - 4, 5)
    lines = []
    for line in printable(text).expandtabs(4).splitlines():
        mark = re.match(r" {0,20}(?:([*+-]|\d+\.) +)?", line)[0]  # of a list's item
        wrapped = textwrap.wrap(line, min(columns, 100), subsequent_indent=" " * len(mark))
        lines += wrapped or [""]
    print(f"\n{printable(heading)}")
    for n, line in enumerate(lines, start=1):
        print(line)
        if n % screenful == 0 and n < len(lines) and sys.stdin.isatty():
            left = len(lines) - n
            if ask(f"[Enter: more, s: skip the other {left} lines] ").lower() == "s":
                return


def ask_mark(label, texts):
    """Asks until the answer is a mark -> the mark, the names of the faults."""
    while True:
        line = ask(f"Mark of {label}: ").lower()
        mark = re.fullmatch(rf"(10|[1-9])([\s,{''.join(FAULTS)}]*)", line)
        if mark:
            return int(mark[1]), [fault for key, fault in FAULTS.items() if key in mark[2]]
        if line.upper() in texts:
            show(f"-------- Answer {line.upper()} again", texts[line.upper()])
        else:
            print('Not a mark. A mark is 1 to 10, with letters for faults if any, as in "4 rc".')


def judge_pair(number, result, prompt):
    """Shows both answers and asks for their marks -> a Mark."""
    order = random.sample(list(SIDES), 2)
    texts = {label: result[side]["text"] for label, side in zip("AB", order)}
    for label, text in texts.items():
        show(f"-------- Answer {label}", text)
        if label == "A" and sys.stdin.isatty():
            ask("[Enter: answer B] ")
    show("-------- The prompt was", prompt)
    print(HELP)
    said = {}
    for label, side in zip("AB", order):
        said[side], said[side + "_faults"] = ask_mark(label, texts)
    block = bool(result["aspd"].get("blocks"))
    cut = any(result[side].get("finish") == "length" for side in SIDES)
    category = str(result.get("category", "other"))
    return Mark(number, category, block, cut, order[0], **said)


def session(results, prompts, marks):
    """Judges one pair after the other, up to the last; adds to the marks, and yields each time."""
    numbers = list(range(1, len(results) + 1))
    random.Random(0).shuffle(numbers)  # the same for all readers
    done = {mark.prompt for mark in marks}
    for n, number in enumerate(numbers, start=1):
        if number not in done:
            result = results[number - 1]
            prompt = str(prompts[number - 1])
            kind = result.get("category", "other")
            show(f"======== Pair {n} of {len(numbers)}, {kind}", prompt)
            marks.append(judge_pair(number, result, prompt))
            yield


# ---- what the marks say -----------------------------------------------------

def table(*rows):
    """Prints rows of strings, the first of them the headings, as Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    print()
    for cells in [rows[0], rule, *rows[1:]]:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths)]
        print(printable(f"| {' | '.join(padded)} |"))


HEADINGS = ["", "pairs", "ASPD", "twin", "difference", "ASPD better", "twin better"]


def row(name, marks):
    """A row of the table under HEADINGS: means, the difference with its 95% interval, counts."""
    if not marks:
        return [name, "0"] + ["-"] * (len(HEADINGS) - 2)
    aspd = np.array([mark.aspd for mark in marks])
    serial = np.array([mark.serial for mark in marks])
    gap = aspd - serial
    difference = f"{gap.mean():+.2f}"
    if len(marks) >= 5:  # of fewer, an interval says nothing
        low, high = interval(gap)
        difference += f" ({low:+.2f} to {high:+.2f})"
    means = [f"{aspd.mean():.2f}", f"{serial.mean():.2f}"]
    return [name, str(len(marks)), *means, difference, str(sum(gap > 0)), str(sum(gap < 0))]


def agreements(readers):
    """Prints, of every two readers, in how many pairs both prefer the same side, or neither does,
    and how many that would be by chance, had each spread the same verdicts over other pairs."""
    verdicts = {}
    for name, reader in readers.items():
        verdicts[name] = {mark.prompt: np.sign(mark.aspd - mark.serial) for mark in reader["marks"]}
    rows = [["two readers", "pairs", "agree on the better", "by chance"]]
    for names in combinations(readers, 2):
        common = set(verdicts[names[0]]) & set(verdicts[names[1]])
        if common:
            first, second = np.array([[verdicts[name][p] for p in common] for name in names])
            chance = sum(np.mean(first == v) * np.mean(second == v) for v in (-1, 0, 1))
            shares = [f"{np.mean(first == second):.0%}", f"{chance:.0%}"]
            rows.append([" and ".join(names), str(len(common)), *shares])
    if len(rows) > 1:
        table(*rows)


def summary(readers):
    """Prints all that the marks of each reader say."""
    for name, reader in readers.items():
        marks = reader["marks"]
        groups = {
            "all": marks,
            "with a block": [mark for mark in marks if mark.block],
            "without": [mark for mark in marks if not mark.block],
            "neither is cut": [mark for mark in marks if not mark.cut],
            "ASPD shown first": [mark for mark in marks if mark.shown_first == "aspd"],
            "twin shown first": [mark for mark in marks if mark.shown_first == "serial"],
        }
        for kind in dict.fromkeys(mark.category for mark in marks):
            groups[kind] = [mark for mark in marks if mark.category == kind]
        print(printable(f"{name}: {reader['how']}"))
        table(HEADINGS, *[row(group, found) for group, found in groups.items()])
        faults = [fault for mark in marks for fault in mark.aspd_faults]
        others = [fault for mark in marks for fault in mark.serial_faults]
        counts = [[f, str(faults.count(f)), str(others.count(f))] for f in FAULTS.values()]
        table(["answers with this fault", "ASPD", "twin"], *counts)
    agreements(readers)


def reveal(name, readers):
    """Prints who wrote what, and a reader's marks beside the others' of the same pairs."""
    marks = readers[name]["marks"]
    if not marks:
        return
    rows = []
    for mark in marks:
        cells = [SIDES[mark.shown_first], str(mark.aspd), str(mark.serial)]
        rows.append([str(mark.prompt), mark.category, *cells])
    table(["prompt", "kind", "answer A was of", "ASPD", "twin"], *rows)
    done = {mark.prompt for mark in marks}
    rows = [row(name, marks)]
    for other, reader in readers.items():
        if other != name:
            same = [mark for mark in reader["marks"] if mark.prompt in done]
            rows.append(row(f"{other}, these pairs", same))
            rows.append(row(f"{other}, all pairs", reader["marks"]))
    table(HEADINGS, *rows)
    agreements(readers)


def parse_args(argv=None):
    """The settings."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = p.add_argument
    add("file", nargs="?", type=Path, default=KEPT.with_name("smollm2.json"),
        help="answers, as bench.py --json writes them (%(default)s)")
    add("--prompts", help="JSON Lines with their prompts, where the file has none")
    add("--name", default="reader", help="whose marks these are (%(default)s)")
    add("--marks", type=Path, help="the file that keeps the marks (out-marks/ + the answers' name)")
    add("--summary", action="store_true", help="prints a table of --marks, or of those kept here")
    return p.parse_args(argv)


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    if args.summary:
        summary(read_marks(args.marks or KEPT)[1])
        return
    sys.stdin = sys.stdin or open(os.devnull)  # where it was closed before the start
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="backslashreplace")
    results = read_pairs(args.file)
    prompts = read_prompts(args.prompts, results)
    path = args.marks or Path("out-marks", args.file.name)
    answers = fingerprint(results)
    judged, kept = read_marks(KEPT)
    readers = {}
    if path.exists():
        same, readers = read_marks(path)
        check(same == answers, f"{path}: its marks are of other answers than those in {args.file}")
    reader = readers.setdefault(args.name, {"how": HOW, "marks": []})
    print(f"{printable(args.name)} has marked {len(reader['marks'])} of {len(results)} pairs.")
    try:
        keep(path, answers, args.name, reader)  # fails now, if it fails
        for _ in session(results, prompts, reader["marks"]):
            keep(path, answers, args.name, reader)
    except EOFError:
        print("\nThe same command goes on from here.")
    reveal(args.name, (kept if judged == answers else {}) | readers)


if __name__ == "__main__":
    cli(main)
