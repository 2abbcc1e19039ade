"""A reader's session over a pipe: what is shown and hidden, what is kept, what the summary says."""
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import judge
import pytest
from helpers import fails

SCRIPT = Path(judge.__file__)
RESULTS = SCRIPT.parent / "results"


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """A file of 40 pairs. The texts say whose they are, so that a test can mark them by it."""
    monkeypatch.chdir(tmp_path)
    results = []
    for i in range(1, 41):
        result = {"category": "even" if i % 2 == 0 else "odd", "prompt": f"Question {i}?"}
        for side in judge.SIDES:
            blocks = [[3, 4]] if side == "aspd" and i % 4 == 0 else []
            finish = "length" if side == "serial" and i % 5 == 0 else "stop"
            text = f"The {side} text of {i}.\n"
            result[side] = {"text": text, "blocks": blocks, "finish": finish}
        results.append(result)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"summary": {}, "results": results}))
    return path


@pytest.fixture
def session(answers, monkeypatch, capsys):
    """A function of what a reader types, and of options -> what was printed, the marks by name."""
    def run(typed, *options, file=answers):
        stdin = io.TextIOWrapper(io.BytesIO(typed.encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        judge.main([str(file), "--marks", "marks.json", *options])
        readers = json.loads(Path("marks.json").read_text())["readers"]
        return capsys.readouterr().out, {name: r["marks"] for name, r in readers.items()}
    return run


def headings(out):
    return [line for line in out.splitlines() if line.startswith(("====", "----"))]


# ---- marks ------------------------------------------------------------------

def test_marks_and_faults_are_kept_with_their_side(session):
    """Answer A always gets 7 and is off topic; B gets 2."""
    out, marks = session("7 o\n2\n" * 40)
    assert [line for line in out.splitlines() if line.startswith("Mark of")] == (
        ["Mark of A: 7 o", "Mark of B: 2"] * 40)
    assert sorted(m["prompt"] for m in marks["reader"]) == list(range(1, 41))
    for mark in marks["reader"]:
        first = mark["shown_first"]
        second = "serial" if first == "aspd" else "aspd"
        assert [mark[first], mark[second]] == [7, 2]
        assert [mark[first + "_faults"], mark[second + "_faults"]] == [["offtopic"], []]
        assert mark["block"] == (mark["prompt"] % 4 == 0)
        assert mark["cut"] == (mark["prompt"] % 5 == 0)
        shown = out.index(f"The {first} text of {mark['prompt']}.")
        assert shown < out.index(f"The {second} text of {mark['prompt']}.")


def test_the_order_is_drawn_and_hidden_until_the_end(session):
    out, marks = session("5\n5\n" * 40)
    drawn = Counter(mark["shown_first"] for mark in marks["reader"])
    assert min(drawn[side] for side in judge.SIDES) >= 5  # by chance 15 to 25, hardly ever fewer
    asked = out[:out.index("answer A was of")]
    asked = re.sub(r"The (aspd|serial) text of", "", asked)
    assert not re.search("aspd|serial|twin|branch|block", asked, re.I), "nothing tells the sides"
    for mark in marks["reader"]:
        side = judge.SIDES[mark["shown_first"]]
        line = rf"\| {mark['prompt']} +\| {mark['category']} +\| {side} +\| 5 +\| 5 +\|"
        assert re.search(line, out), "the end reveals it"


@pytest.mark.parametrize("bad", ["0", "11", "-3", "5.5", "five", "5 x", "r 5", "", "55", "\u0665"])
def test_what_is_no_mark_is_asked_again(session, bad):
    out, marks = session(f"{bad}\n10 R, c\n3cr\n")
    assert out.count("Not a mark") == 1
    mark, = marks["reader"]
    assert sorted([mark["aspd"], mark["serial"]]) == [3, 10]
    assert mark["aspd_faults"] == mark["serial_faults"] == ["repeats", "contradicts"]


def test_bytes_that_are_no_text_are_asked_again(session, monkeypatch, answers, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n4\n4\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    judge.main([str(answers), "--marks", "marks.json"])
    assert capsys.readouterr().out.count("Not a mark") == 1


def test_an_answer_can_be_read_again(session):
    out, marks = session("b\n5\nA\n5\n")
    assert "-------- Answer B again" in out and "-------- Answer A again" in out
    number = marks["reader"][0]["prompt"]
    assert out.count(f"The aspd text of {number}.") == 2
    assert out.count(f"The serial text of {number}.") == 2


def test_control_characters_are_shown_escaped_and_long_lines_wrapped(session, answers):
    content = json.loads(answers.read_text())
    for result in content["results"]:
        result["aspd"]["text"] = "\x1b[2Jgone\r\n" + "  - " + "word " * 60
        result["prompt"] = "\x1b]0;title\x07"
    answers.write_text(json.dumps(content))
    out, _ = session("5\n5\n", "--name", "\x1bc")
    assert "\x1b" not in out and "\x07" not in out and "\r" not in out
    assert r"\x1b[2Jgone\r" in out and r"\x1b]0;title\x07" in out
    lines = [line for line in out.splitlines() if "word word" in line]
    assert len(lines) > 2 and all(len(line) <= 100 for line in lines)
    assert lines[0].startswith("  - word") and lines[1].startswith("    word")


def test_prompts_come_from_a_file_where_the_answers_have_none(session, answers):
    content = json.loads(answers.read_text())
    lines = [json.dumps({"prompt": result.pop("prompt")}) + "\n" for result in content["results"]]
    answers.write_text(json.dumps(content))
    assert "no prompt is kept" in session("5\n5\n")[0]
    Path("prompts.jsonl").write_text("".join(lines))
    out, marks = session("5\n5\n", "--prompts", "prompts.jsonl")
    assert f"Question {marks['reader'][1]['prompt']}?" in out


# ---- stopping, going on, others ---------------------------------------------

@pytest.mark.parametrize("end", ["", "q\n", "7\n", "7\nq\n", "7\nq"])
def test_a_session_may_stop_anywhere_and_keeps_whole_pairs(session, end):
    out, marks = session("4\n6\n" * 3 + end)
    assert len(marks["reader"]) == 3
    assert "The same command goes on" in out
    assert "| reader | 3 " in out, "and reveals what was marked"


def test_a_session_that_stops_at_once_reveals_nothing(session):
    out, marks = session("")
    assert marks == {"reader": []} and "|" not in out


def test_going_on_asks_for_what_is_left_only(session):
    first, marks = session("4\n6\n" * 15)
    second, after = session("6\n4\n" * 40)
    assert "reader has marked 15 of 40 pairs" in second
    assert after["reader"][:15] == marks["reader"]
    assert sorted(m["prompt"] for m in after["reader"]) == list(range(1, 41))
    third, _ = session("")
    assert not headings(third), "nothing is left"


def test_a_second_reader_is_added_and_compared(session):
    """Both read the same pairs first. Ada prefers ASPD where Bob does in two pairs of four."""
    session("5\n5\n" * 4, "--name", "Ada")
    out, marks = session("5\n5\n" * 6, "--name", "Bob")
    numbers = [[m["prompt"] for m in marks[name]] for name in ("Ada", "Bob")]
    assert numbers[0] == numbers[1][:4]
    assert re.search(r"Ada, these pairs \| 4 .*\n.*Ada, all pairs +\| 4 ", out)

    book = json.loads(Path("marks.json").read_text())
    for name, given in (("Ada", [8, 8, 2, 2]), ("Bob", [8, 2, 2, 8, 5, 5])):
        for mark, aspd in zip(book["readers"][name]["marks"], given):
            mark["aspd"] = aspd
    Path("marks.json").write_text(json.dumps(book))
    out, _ = session("", "--name", "Bob")
    assert re.search(r"\| Ada and Bob \| 4 +\| 50% +\| 50% ", out)


def test_a_reader_added_meanwhile_is_not_lost(session, monkeypatch):
    session("5\n5\n", "--name", "Ada")
    keep = judge.keep

    def keep_later(path, answers, name, reader):
        if len(reader["marks"]) == 1:  # somebody else writes, in between
            keep(path, answers, "Eve", {"how": "", "marks": []})
        keep(path, answers, name, reader)

    monkeypatch.setattr(judge, "keep", keep_later)
    _, marks = session("5\n5\n5\n5\n", "--name", "Bob")
    assert [len(marks[name]) for name in ("Ada", "Eve", "Bob")] == [1, 0, 2]


def test_over_a_pipe(answers, tmp_path):
    """As a program: a pipe that ends, and no file but the marks is left."""
    done = subprocess.run([sys.executable, SCRIPT, answers.name], cwd=tmp_path, text=True,
                          input="3 r\n9\n", capture_output=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert "answer A was of" in done.stdout
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "answers.json", "answers.json", "out-marks"]
    book = judge.read_marks(tmp_path / "out-marks" / "answers.json")
    assert len(book[1]["reader"]["marks"]) == 1


# ---- the kept marks ---------------------------------------------------------

def test_the_kept_marks_are_of_the_kept_answers():
    results = judge.read_pairs(RESULTS / "smollm2.json")
    answers, readers = judge.read_marks(judge.KEPT)
    assert answers == judge.fingerprint(results)
    for reader in readers.values():
        for mark in reader["marks"]:
            result = results[mark.prompt - 1]
            assert mark.category == result["category"]
            assert mark.block == bool(result["aspd"]["blocks"])
            assert mark.cut == ("length" in [result[side]["finish"] for side in judge.SIDES])


def test_the_summary_equals_the_kept_marks_and_the_table_in_results(capsys):
    judge.main(["--summary"])
    out = capsys.readouterr().out
    tables = out[out.index("\n\n") + 2:]
    assert tables.strip() in (SCRIPT.parent / "RESULTS.md").read_text()

    cells = {}
    for line in tables.splitlines():
        if line.startswith("|"):
            name, *values = [cell.strip() for cell in line.strip("|").split("|")]
            cells[name] = values
    reader, = json.loads(judge.KEPT.read_text())["readers"].values()
    marks = reader["marks"]
    groups = {"all": marks, "with a block": [m for m in marks if m["block"]],
              "without": [m for m in marks if not m["block"]],
              "neither is cut": [m for m in marks if not m["cut"]],
              "ASPD shown first": [m for m in marks if m["shown_first"] == "aspd"],
              "twin shown first": [m for m in marks if m["shown_first"] == "serial"]}
    for mark in marks:
        groups.setdefault(mark["category"], []).append(mark)
    for name, group in groups.items():
        n = len(group)
        aspd = sum(m["aspd"] for m in group) / n
        serial = sum(m["serial"] for m in group) / n
        assert cells[name][:3] == [str(n), f"{aspd:.2f}", f"{serial:.2f}"]
        difference = cells[name][3].split()
        assert float(difference[0]) == pytest.approx(aspd - serial, abs=0.0051)
        if len(difference) > 1:
            low, high = float(difference[1][1:]), float(difference[3][:-1])
            assert low < aspd - serial < high
        assert int(cells[name][4]) == sum(m["aspd"] > m["serial"] for m in group)
        assert int(cells[name][5]) == sum(m["aspd"] < m["serial"] for m in group)
    for fault in judge.FAULTS.values():
        counts = [sum(fault in m[side + "_faults"] for m in marks) for side in judge.SIDES]
        assert cells[fault] == [str(n) for n in counts]


def test_own_marks_stand_beside_the_kept_ones(session):
    out, marks = session("5\n5\n" * 5, file=RESULTS / "smollm2.json")
    done = {m["prompt"] for m in marks["reader"]}
    _, readers = judge.read_marks(judge.KEPT)
    (name, kept), = readers.items()
    same = [mark.aspd for mark in kept["marks"] if mark.prompt in done]
    assert re.search(rf"\| {name}, these pairs \| 5 +\| {sum(same) / 5:.2f} ", out)
    assert re.search(rf"\| {name}, all pairs +\| 80 ", out)
    assert re.search(rf"\| {name} and reader \| 5 ", out)


# ---- bad input --------------------------------------------------------------

MARK = {"prompt": 1, "category": "odd", "block": False, "cut": False, "shown_first": "aspd",
        "aspd": 5, "serial": 5, "aspd_faults": [], "serial_faults": []}


def book(**change):
    return json.dumps({"answers": "", "readers": {"a": {"how": "", "marks": [MARK | change]}}})


BAD = {  # a file's content, and how the command line names it
    "nothing": (None, "{}"),
    "no JSON": ("{", "{}"),
    "no text": (b"\xff\xfe", "{}"),
    "a list": ("[]", "{}"),
    "no results": ('{"results": []}', "{}"),
    "step by step": ('{"results": [{"bench": "step"}]}', "{}"),
    "one side": ('{"results": [{"aspd": {"text": ""}}]}', "{}"),
    "a number as text": ('{"results": [{"aspd": {"text": 1}, "serial": {"text": ""}}]}', "{}"),
    "no prompts": ("{}\n", "ANSWERS --prompts {}"),
    "too few prompts": ('{"prompt": "p"}\n', "ANSWERS --prompts {}"),
    "prompts not JSON": ("Hello?\n", "ANSWERS --prompts {}"),
    "other answers": (book(), "ANSWERS --marks {}"),
    "a mark of 11": (book(aspd=11), "--summary --marks {}"),
    "a mark in words": (book(aspd="good"), "--summary --marks {}"),
    "an unknown fault": (book(aspd_faults=["dull"]), "--summary --marks {}"),
    "an unknown side": (book(shown_first="left"), "--summary --marks {}"),
    "an unknown field": (book(colour="red"), "--summary --marks {}"),
    "no prompt's number": (book(prompt=None), "--summary --marks {}"),
    "marks that are answers": ('{"results": []}', "--summary --marks {}"),
    "no marks": (None, "--summary --marks {}"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(answers, monkeypatch, capsys, name):
    content, line = BAD[name]
    if content is not None:
        Path("bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    argv = line.format("bad.json").replace("ANSWERS", str(answers)).split()
    assert "bad.json" in fails(judge, argv, monkeypatch, capsys)
    assert sorted(Path().rglob("*")) == before, "nothing is written"
