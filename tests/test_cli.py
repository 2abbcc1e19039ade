"""The command lines, tried as a new user would: every bad input gives exit code 2 and one clear line with the value and
the place, and leaves nothing half-written. A new kind of bad input is a new line of BAD."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import decode
import train
from helpers import fails, save_tiny, write_answers

ROOT = Path(__file__).parent.parent
GOOD = '{"prompt": "p", "response": "r"}\n'


def chat(role, text):
    return json.dumps({"conversations": [{"from": role, "value": text}]}) + "\n"


ANSWERS = {  # a file of answers, and what data.py FILE and train.py --data FILE must say about it
    "missing.jsonl": (None, "missing.jsonl"),
    "empty.jsonl": ("", "empty.jsonl: no usable answers"),
    "blank.jsonl": ("\ufeff\n \n", "blank.jsonl: no usable answers"),
    "empty-array.json": (" []\n", "empty-array.json: no usable answers"),
    "broken.jsonl": (GOOD * 2 + '{"prompt": "p", \n', "broken.jsonl, record 3"),
    "no-answer.jsonl": ('{"prompt": "p"}\n' * 3, r"3 x record that ends without an answer \(prompt\)\).*read are"),
    "prompt-alone.jsonl": (chat("human", "hi"), "prompt-alone.jsonl: no usable answers.*conversations"),
    "roles.jsonl": (chat("critic", "hi"), "roles.jsonl: no usable answers.*1 x critic turn out of place"),
    "other-names.jsonl": ('{"question": "q", "reply": "r"}\n', 'question, reply.*"prompt", "response"'),
    "indented.json": (json.dumps(json.loads(GOOD), indent=2), "record 1.*JSON Lines has one object a line"),
    "not-an-object.jsonl": (GOOD + "3\n", "record 2.*expected an object, not int"),
    "latin1.jsonl": ('{"prompt": "caf\u00e9"}\n'.encode("latin-1"), "latin1.jsonl: .*utf-8"),
    "utf16.jsonl": (GOOD.encode("utf-16"), "utf16.jsonl: .*utf-8"),
    "zipped.jsonl": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "zipped.jsonl: .*utf-8"),
}
BAD = [  # the script, its command line, what the message must say; {files} is the folder of the fixture
    *[(data, "{files}/" + name, named) for name, (_, named) in ANSWERS.items()],
    (data, "{files}", "files"),
    (data, "{files}/good.jsonl --out {files}/nowhere/out.jsonl", "nowhere"),
    (data, "{files}/good.jsonl --out {files}", "files"),
    (data, "{files}/good.jsonl --out {files}/good.jsonl/out.jsonl", "good.jsonl"),
    (data, "{files}/good.jsonl --show many", "many"),
    (data, "{files}/good.jsonl {files}/good.jsonl", "unrecognized"),
    (decode, "--ckpt {files}/ckpt", "--prompt"),
    (decode, "--prompt p --ckpt {files}/nowhere", "nowhere.*python train.py"),
    (decode, "--prompt {empty} --ckpt {files}/ckpt", "prompt is .*: no text"),
    (decode, "--prompt p --json {empty} --ckpt {files}/ckpt", "No such file"),
    (train, "--data {empty}", "Is a directory"), (train, "--init-from {empty}", "no ckpt.pt"), (data, "{empty}", "Is a directory"),
    (decode, "--prompt {blank} --ckpt {files}/ckpt", "prompt is .*: no text"),
    (decode, "--prompt {long} --ckpt {files}/ckpt", "ppp' has 3.. tokens, the context only 256"),
    (decode, "--prompt p --ckpt {files}/ckpt --mode parallel", "parallel"),
    (decode, "--prompt p --ckpt {files}/ckpt --device abacus", "abacus"),
    (decode, "--prompt p --ckpt {files}/ckpt --temperature -1", "temperature.*-1"),
    (decode, "--prompt p --ckpt {files}/ckpt --json {files}/nowhere/out.json", "nowhere"),
    (decode, "--prompts {files}/blank.jsonl --ckpt {files}/ckpt", "blank.jsonl: no prompts"),
    (decode, "--prompts {files}/other-names.jsonl --ckpt {files}/ckpt", "other-names.jsonl, record 1: the prompt is None: no text"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the files that BAD names."""
    folder = tmp_path_factory.mktemp("files")
    write_answers(folder / "good.jsonl", 40)
    for name, (content, _) in ANSWERS.items():
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    save_tiny(folder / "ckpt")
    return folder


@pytest.mark.parametrize("module,line,named", BAD, ids=[f"{m.__name__} {line}".replace("{files}/", "") for m, line, _ in BAD])
def test_a_bad_command_line_is_refused_in_one_line(files, tmp_path, monkeypatch, capsys, module, line, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    before = sorted(files.rglob("*"))
    words = {"{empty}": "", "{blank}": " \n", "{long}": "p" * 300}
    argv = [words.get(word, word.replace("{files}", str(files))) for word in line.split()]
    message = fails(module, argv, monkeypatch, capsys)
    assert re.search(named, message), message
    assert not list(tmp_path.iterdir()) and sorted(files.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize("old", [None, "old\n"])
def test_output_that_is_never_reached_leaves_what_was_there(tmp_path, monkeypatch, capsys, old):
    """data.py --out stops at a broken line far into the file."""
    out = tmp_path / "out.jsonl"
    (tmp_path / "late.jsonl").write_text(GOOD * 2100 + "{\n")
    if old:
        out.write_text(old)
    before = sorted(tmp_path.iterdir())
    assert "record 2101" in fails(data, [tmp_path / "late.jsonl", "--out", out], monkeypatch, capsys)
    assert sorted(tmp_path.iterdir()) == before and (old is None or out.read_text() == old)


def decode_three(files, tmp_path, second="p"):
    """A command line of decode.py with three prompts, and the file that it writes."""
    prompts = [{"prompt": "p"}, {"prompt": second}, {"prompt": "p"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    out = tmp_path / "out.json"
    return ["--ckpt", files / "ckpt", "--prompts", tmp_path / "prompts.jsonl", "--json", out, "--device", "cpu",
            "--max-new-tokens", "3"], out


def test_a_prompt_that_is_too_long_is_told_before_any_is_decoded(files, tmp_path, monkeypatch, capsys):
    argv, out = decode_three(files, tmp_path, "q" * 9999)
    monkeypatch.setattr(decode, "generate", None)
    assert "qqq' has 10" in fails(decode, argv, monkeypatch, capsys)
    assert not out.exists()


def test_answers_before_an_interrupt_are_not_lost(files, tmp_path, monkeypatch, capsys):
    """decode.py --json holds them."""
    argv, out = decode_three(files, tmp_path)
    real, calls = decode.generate, []

    def generate(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(decode, "generate", generate)
    monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        data.cli(decode.main)
    assert stop.value.code == 130
    [result] = json.loads(out.read_text())["results"]
    assert result["prompt"] == "p" and result["steps"] > 0


def test_answers_are_not_lost_where_nobody_reads_them(files, tmp_path, monkeypatch, capsys):
    """A terminal that was closed takes no output any more, not even the last of the live view."""
    argv, out = decode_three(files, tmp_path)

    def write(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(decode.View, "write", write)
    assert "Input/output error" in fails(decode, argv, monkeypatch, capsys)
    assert len(json.loads(out.read_text())["results"]) == 1


def test_answers_are_not_lost_behind_a_pipe_that_ends(files, tmp_path):
    """As `| head -1` does. The exit code is that of SIGPIPE in a shell."""
    argv, out = decode_three(files, tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, ROOT / "decode.py", *map(str, argv)], stdout=writing, stderr=subprocess.PIPE,
                          timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(writing)
    assert done.returncode == 141 and b"Broken" not in done.stderr
    assert len(json.loads(out.read_text())["results"]) == 1


def test_the_picture_of_aspd_py_may_be_cut_by_a_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, ROOT / "aspd.py"], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_with_the_file(files, tmp_path, monkeypatch, capsys):
    argv, out = decode_three(files, tmp_path)
    argv[argv.index(out)] = "/dev/full"
    assert "cannot write /dev/full: " in fails(decode, argv, monkeypatch, capsys)
    assert "cannot write /dev/full: " in fails(data, [files / "good.jsonl", "--out", "/dev/full"], monkeypatch, capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_like_an_interrupt(number):
    """Unless, as under nohup, they are ignored."""
    code = ("import data, os, signal\n"
            "def main():\n    try:\n        os.kill(os.getpid(), {0})\n    finally:\n        print('kept')\n"
            "{1}data.cli(main)").format(int(number), "{}")
    for handler, expected in (("SIG_DFL", 130), ("SIG_IGN", 0)):
        setting = f"signal.signal({int(number)}, signal.{handler})\n"  # whatever this process was started with
        done = subprocess.run([sys.executable, "-c", code.format(setting)], cwd=ROOT, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (expected, b"kept\n", b"")


def run(*argv):
    return subprocess.run([sys.executable, ROOT / argv[0], *map(str, argv[1:])], capture_output=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})


def test_errors_leave_a_real_process_with_code_2_and_no_traceback(tmp_path):
    for argv in [("data.py", tmp_path / "missing.jsonl")]:
        done = run(*argv)
        error, = done.stderr.decode().splitlines()
        assert done.returncode == 2 and done.stdout == b"" and error.startswith("error: ") and str(tmp_path) in error
