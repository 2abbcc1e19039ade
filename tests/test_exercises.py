"""The exercises of tests/exercises.py, in copies of the code that are git repositories: every one
empties its function and nothing else, fails its mark, and comes back."""
import ast
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from exercises import EXERCISES

ROOT = Path(__file__).parent.parent
NUMBERS = range(1, len(EXERCISES) + 1)
OWN = ("GIT_", "PYTEST_")  # settings of whoever runs this
ENV = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
ENV |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="the exercises need git")


def run(folder, *command):
    return subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=300)


def git(folder, *args):
    done = run(folder, "git", "-c", "user.name=n", "-c", "user.email=e", *args)
    assert done.returncode == 0, done.stderr


def exercise(folder, *args):
    return run(folder, sys.executable, "tests/exercises.py", *map(str, args))


def refused(folder, *args):
    """The line with which exercises.py refuses something."""
    done = exercise(folder, *args)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and line.startswith("error: ")
    return line


def run_marks(folder, selected, *files):
    """Runs `pytest -k selected` -> [(outcome, test)], and what was printed."""
    options = ["-rA", "-p", "no:cacheprovider"]  # a line for every test; nothing left behind
    done = run(folder, sys.executable, "-m", "pytest", "-k", selected, *options, *files)
    summary = done.stdout.split("short test summary info")[-1]
    return re.findall(r"(?m)^([A-Z]+) \S*?::(\w+)", summary), done.stdout


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A repository of the code and its tests."""
    folder = tmp_path_factory.mktemp("committed")
    (folder / "tests").mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all")
    return folder


@pytest.fixture
def repository(committed, tmp_path):
    """A clone of it."""
    git(tmp_path, "clone", "-q", committed, "clone")
    return tmp_path / "clone"


class Tried(NamedTuple):
    """What came of an exercise: before, while it was empty, and after --solution."""
    before: dict     # {path: bytes}
    task: str        # as printed
    emptied: dict
    failed: tuple    # the mark: [(outcome, test)], and what was printed
    comparison: str  # as printed
    kept: str        # what was in the function's place
    after: dict


def contents(folder):
    """{path: bytes} of all code."""
    paths = [*folder.glob("*.py"), *(folder / "tests").glob("*.py")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def try_exercise(folder, committed, n):
    git(folder, "clone", "-q", committed, f"clone{n}")
    folder /= f"clone{n}"
    before = contents(folder)
    task = exercise(folder, n).stdout
    emptied = contents(folder)
    failed = run_marks(folder, f"exercise_{n}")
    comparison = exercise(folder, n, "--solution").stdout
    kept = (folder / "out-exercises" / f"{n}.py").read_text(encoding="utf-8")
    return Tried(before, task, emptied, failed, comparison, kept, contents(folder))


def solve_all(folder, committed):
    """All marks in one run, once every function was emptied and put back -> as run_marks()."""
    git(folder, "clone", "-q", committed, "solved")
    folder /= "solved"
    for n in NUMBERS:
        assert exercise(folder, n).returncode == exercise(folder, n, "--solution").returncode == 0
    marks = [mark for each in EXERCISES for mark in each.marks]
    files = []  # others take time to be imported
    for path in (folder / "tests").glob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        if any(f"def {mark}(" in source for mark in marks):
            files.append(path)
    return run_marks(folder, " or ".join(marks), *files)


@pytest.fixture(scope="module")
def tried(committed, tmp_path_factory):
    """{n: what will have come of exercise n; 0: of all marks}, two at a time."""
    folder = tmp_path_factory.mktemp("clones")
    pool = ThreadPoolExecutor(2)
    jobs = {0: pool.submit(solve_all, folder, committed)}
    yield jobs | {n: pool.submit(try_exercise, folder, committed, n) for n in NUMBERS}
    pool.shutdown(cancel_futures=True)


# ---- every exercise ---------------------------------------------------------

def test_marks_are_tests_and_no_function_comes_twice():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    tests = re.findall(r"(?m)^def (test_\w+)", "\n".join(sources))
    for _, _, hints, marks in EXERCISES:
        assert marks
        for test in marks:
            selected = [name for name in tests if test in name]
            assert selected == [test], "-k selects one test alone, by a part of its name"
        assert 2 <= len(hints.strip().splitlines()) <= 6
    assert len({each.name for each in EXERCISES}) == len(EXERCISES) >= 10


def without_body(source, name):
    """A file's bytes with `return None` for what a function has below its docstring."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == part)
    assert ast.get_docstring(node) and len(node.body) > 1
    lines = source.splitlines(keepends=True)
    body = slice(node.body[0].end_lineno, node.end_lineno)
    lines[body] = [b" " * node.body[0].col_offset + b"return None\n"]
    return b"".join(lines)


@pytest.mark.parametrize("n", NUMBERS)
def test_an_emptied_function_fails_its_mark_and_its_solution_is_as_before(tried, n):
    """All of its body goes, and nothing else. Then a test of those that mark it fails, and
    nothing before. --solution gives every byte back."""
    name, line, _, marks = EXERCISES[n - 1]
    result = tried[n].result()
    module, function = name.split(".", 1)
    path = f"{module}.py"
    source = without_body(result.before[path], function)
    assert result.emptied == result.before | {path: source}
    assert line in result.task and f" python -m pytest -k exercise_{n}\n" in result.task
    assert result.comparison.startswith("--- yours\n+++ solution\n")
    name = function.split(".")[-1]
    assert f"def {name}(" in result.kept and result.kept.endswith(" return None\n")
    assert result.kept.encode() in source, "what one wrote is kept"
    assert result.after == result.before
    outcomes, report = result.failed
    assert outcomes[-1] == ("FAILED", outcomes[-1][1]) and outcomes[-1][1] in marks, report[-3000:]
    assert "1 failed" in report.splitlines()[-1] and "error" not in report.splitlines()[-1]


def test_every_solution_passes_its_mark(tried):
    """No other test is run."""
    outcomes, report = tried[0].result()
    expected = {("PASSED", mark) for each in EXERCISES for mark in each.marks}
    assert set(outcomes) == expected, report[-3000:]


def test_a_mark_that_passes_runs_its_tests_alone_and_may_be_called_by_two_digits(committed):
    outcomes, report = run_marks(committed, "exercise_01")
    assert set(outcomes) == {("PASSED", test) for test in EXERCISES[0].marks}, report[-3000:]


# ---- what is refused, and what is kept --------------------------------------

def test_all_are_listed(repository):
    done = exercise(repository)
    assert done.returncode == 0
    assert all(each.line in done.stdout for each in EXERCISES)
    assert done.stdout.count("Judge") == 11
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_uncommitted_changes_are_refused(repository):
    """In its file alone, staged or not; also those of another exercise."""
    assert exercise(repository, 2).returncode == 0
    emptied = contents(repository)
    assert "aspd.py has uncommitted changes" in refused(repository, 1)
    git(repository, "add", "aspd.py")
    assert "aspd.py has uncommitted changes" in refused(repository, 1)
    assert contents(repository) == emptied
    assert exercise(repository, 4).returncode == 0, "of another file"


def test_other_edits_survive_the_solution(repository):
    """Whatever was written in the function's place, which need not be Python, nor end as it did."""
    exercise(repository, 12)
    path = repository / "decode.py"
    source = path.read_text(encoding="utf-8").replace("MODES = ", "# My remark.\nMODES = ")
    attempt = "        rest = (\n# no indentation\n\n        if rest:\n\n    def helper(self):"
    other = source.replace("        return None\n", attempt + "\n        pass\n")
    path.write_bytes(other.encode())
    assert exercise(repository, 12, "--solution").returncode == 0
    committed = (ROOT / "decode.py").read_text(encoding="utf-8")
    last = "# <|para|> and the branches\n"
    expected = committed.replace("MODES = ", "# My remark.\nMODES = ")
    expected = expected.replace(last, last + "\n    def helper(self):\n        pass\n")
    assert path.read_text(encoding="utf-8") == expected


def test_what_cannot_be_done_is_refused_in_one_line(repository):
    for number in (0, len(EXERCISES) + 1, -1, "x", ""):
        assert f"1 to {len(EXERCISES)}" in refused(repository, number)
    assert "which one" in refused(repository, "--solution")
    exercise(repository, 1)
    git(repository, "commit", "-qam", "emptied")
    assert "is empty in the last commit" in refused(repository, 1)
    path = repository / "aspd.py"
    path.write_text(path.read_text().replace("def branch_mask", "def mask"))
    assert "branch_mask is not there" in refused(repository, 1, "--solution")
    shutil.rmtree(repository / ".git")
    assert "not a git repository" in refused(repository, 4)
