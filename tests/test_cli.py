"""
The command lines, tried as a new user would: every bad input gives exit code 2 and one clear line with the value and the
place, and leaves nothing half-written; good input goes through.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import decode
import train
from helpers import TOKENIZER, fails, publish, published_config, save_tiny, tiny_model, write_answers

ROOT = Path(__file__).parent.parent
GOOD = '{"prompt": "p", "response": "r"}\n'


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with good and bad files for the table's {names}."""
    folder = tmp_path_factory.mktemp("files")
    write_answers(folder / "good.jsonl", 40)
    for name, content in {
        "empty.jsonl": b"", "broken.jsonl": GOOD.encode() * 2 + b'{"prompt": "p", \n', "no-answer.jsonl": b'{"prompt": "p"}\n',
        "unusable.jsonl": b'{"conversations": [{"from": "human", "value": "hi"}]}\n', "latin1.jsonl": b'{"prompt": "caf\xe9"}\n',
        "other-names.jsonl": b'{"question": "q", "reply": "r"}\n', "long-line.jsonl": b'{"prompt": "' + b"p" * 2**20 + b'"}\n',
        "two.jsonl": GOOD.encode() * 2,
    }.items():
        (folder / name).write_bytes(content)
    save_tiny(folder / "ckpt")
    for name in ("cut-off", "garbage", "emptied"):
        save_tiny(folder / name)
        whole = (folder / name / "ckpt.pt").read_bytes()
        (folder / name / "ckpt.pt").write_bytes({"cut-off": whole[:-200], "garbage": b"hello\n" * 99, "emptied": b""}[name])
    torch.save({"weights": 1}, (folder / "foreign").mkdir() or folder / "foreign" / "ckpt.pt")
    save_tiny(folder / "untagged", tokenizer={**TOKENIZER.settings, "special": None})
    publish(folder / "published", published_config("llama", True))
    publish(folder / "scaled", {**published_config("llama", True), "rope_scaling": {"rope_type": "yarn"}})
    return folder


ANSWERS = {  # what data.py FILE and train.py --data FILE must say about it
    "missing.jsonl": "missing.jsonl", "empty.jsonl": "empty.jsonl: no usable answers", "broken.jsonl": "broken.jsonl, line 3",
    "no-answer.jsonl": "no-answer.jsonl, line 1: no response", "unusable.jsonl": "unusable.jsonl: no usable answers",
    "latin1.jsonl": "latin1.jsonl, line 1: .*(utf|UTF)-8", "other-names.jsonl": "question, reply",
    "long-line.jsonl": "line 1: longer than",
}
BAD = [
    *[(data, "{files}/" + name, named) for name, named in ANSWERS.items()],
    (data, "{files}", "files"),
    (data, "{files}/good.jsonl --tokenizer klingon", "klingon"),
    (data, "{files}/good.jsonl --tokenizer {files}/ckpt", "tokenizer.json"),
    (data, "{files}/good.jsonl --out {files}/nowhere/out.jsonl", "nowhere"),
    (data, "{files}/good.jsonl --show many", "many"),
    *[(train, "--data {files}/" + name, named) for name, named in ANSWERS.items()],
    (train, "--data {files}/two.jsonl", "two.jsonl"),
    (train, "--data {files}/good.jsonl --block-size 8", "8 tokens"),
    (train, "--positions sideways", "sideways"),
    (train, "--mode parallel", "parallel"),
    (train, "--device cuda", "CUDA"),
    (train, "--compile", "compile.*cpu"),
    (train, "--data {files}/good.jsonl --device abacus", "abacus"),
    (train, "--tokenizer klingon --data {files}/good.jsonl", "klingon"),
    (train, "--data {files}/good.jsonl --steps 0", "steps.*0"),
    (train, "--data {files}/good.jsonl --steps -5", "steps.*-5"),
    (train, "--data {files}/good.jsonl --batch-size 0", "batch-size.*0"),
    (train, "--data {files}/good.jsonl --block-size 0", "block-size.*0"),
    (train, "--data {files}/good.jsonl --lr -1", "lr.*-1"),
    (train, "--init-from {files}/nowhere", "nowhere"),
    (train, "--init-from {files}/published", "tokenizer.json"),
    (train, "--init-from {files}/scaled", "rope_type.*yarn"),
    (train, "--resume --out-dir {files}/nowhere", "nowhere"),
    (train, "--resume --out-dir {files}/cut-off", "cut-off"),
    (train, "--resume --out-dir {files}/foreign", "foreign"),
    (decode, "", "--prompt"),
    (decode, "--prompt p --ckpt {files}/nowhere", "nowhere.*python train.py"),
    (decode, "--prompt p --ckpt {files}/cut-off", "cut-off"),
    (decode, "--prompt p --ckpt {files}/garbage", "garbage"),
    (decode, "--prompt p --ckpt {files}/emptied", "emptied"),
    (decode, "--prompt p --ckpt {files}/foreign", "foreign.*not a checkpoint"),
    (decode, "--prompt p --ckpt {files}/published", "tokenizer.json"),
    (decode, "--prompt p --ckpt {files}/scaled", "rope_type.*yarn"),
    (decode, "--prompt p --ckpt {files}/untagged --mode adaptive", "adaptive"),
    (decode, "--prompt p --mode parallel", "parallel"),
    (decode, "--prompt {empty}", "empty"),
    (decode, "--prompt {blank}", "empty"),
    (decode, "--prompt {long}", "256"),
    (decode, "--prompt p --temperature -1", "temperature.*-1"),
    (decode, "--prompt p --temperature nan", "temperature.*nan"),
    (decode, "--prompt p --max-new-tokens 0", "max-new-tokens.*0"),
    (decode, "--prompt p --max-new-tokens -3", "max-new-tokens.*-3"),
    (decode, "--prompt p --max-new-tokens few", "few"),
    (decode, "--prompt p --top-k -1", "top-k.*-1"),
    (decode, "--prompt p --top-p 0", "top-p.*0"),
    (decode, "--prompt p --top-p 1.5", "top-p.*1.5"),
    (decode, "--prompt p --max-branches 1", "max-branches.*1"),
    (decode, "--prompt p --max-branches 99", "max-branches.*99"),
    (decode, "--prompt p --device cuda", "CUDA"),
    (decode, "--prompt p --device abacus", "abacus"),
    (decode, "--prompt p --json {files}/nowhere/out.json", "nowhere"),
    (decode, "--prompts {files}/missing.jsonl", "missing.jsonl"),
    (decode, "--prompts {files}/empty.jsonl", "empty.jsonl"),
    (decode, "--prompts {files}/broken.jsonl", "broken.jsonl, line 3"),
    (decode, "--prompts {files}/other-names.jsonl", "line 1.*question, reply"),
    (decode, "--prompts {files}/long-line.jsonl", "line 1: longer than"),
]


@pytest.mark.parametrize("module,line,named", BAD, ids=[f"{m.__name__} {line}".replace("{files}/", "") for m, line, _ in BAD])
def test_bad_command_line_is_refused_in_one_line(files, tmp_path, monkeypatch, capsys, module, line, named):
    monkeypatch.setattr(data, "MAX_LINE", 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    before = sorted(files.rglob("*"))
    words = {"{empty}": "", "{blank}": " \n", "{long}": "p" * 300}
    argv = [words.get(word, word.replace("{files}", str(files))) for word in line.split()]
    if module is decode:
        argv += ["--ckpt", str(files / "ckpt")] * ("--ckpt" not in line) + ["--device", "cpu"] * ("--device" not in line)
    if module is train:
        argv += ["--device", "cpu"] * ("--device" not in line) + "--n-layer 1 --n-head 1 --epochs 0.1".split()
    message = fails(module, argv, monkeypatch, capsys)
    assert re.search(named, message), message
    assert not list(tmp_path.iterdir()) and sorted(files.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize("old", [None, "old\n"])
def test_output_that_fails_midway_leaves_what_was_there(tmp_path, monkeypatch, capsys, old):
    """data.py --out stops at a broken line far into the file, decode.py --json at a prompt that is too long."""
    out = tmp_path / "out.jsonl"
    save_tiny(tmp_path / "ckpt")
    (tmp_path / "late.jsonl").write_text(GOOD * 2100 + "{\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n{"prompt": "%s"}\n' % ("p" * 300))
    if old:
        out.write_text(old)
    before = sorted(tmp_path.iterdir())
    assert "line 2101" in fails(data, [tmp_path / "late.jsonl", "--out", out], monkeypatch, capsys)
    assert "256" in fails(decode, ["--prompts", tmp_path / "prompts.jsonl", "--ckpt", tmp_path / "ckpt", "--json", out,
                                     "--device", "cpu", "--max-new-tokens", 5], monkeypatch, capsys)
    assert sorted(tmp_path.iterdir()) == before and (old is None or out.read_text() == old)


def test_output_to_a_link_or_a_device_leaves_them_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    data.write_whole(tmp_path / "link", ["a line"])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "a line\n"
    master, slave = os.openpty()
    data.write_whole(os.ttyname(slave), ["a line"])
    assert os.read(master, 99).split() == [b"a", b"line"] and os.isatty(slave)


def test_tuned_checkpoint_in_a_published_folder_is_the_one_that_is_loaded(tmp_path):
    """train.py --init-from DIR --out-dir DIR, then decode.py --ckpt DIR."""
    (tmp_path / "config.json").write_text("{}")
    save_tiny(tmp_path)
    assert decode.load(tmp_path).tokenizer.special


def run(*argv):
    return subprocess.run([sys.executable, ROOT / argv[0], *map(str, argv[1:])], capture_output=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})


def test_errors_leave_a_real_process_with_code_2_and_no_traceback(tmp_path):
    for argv in (("data.py", tmp_path / "missing.jsonl"), ("decode.py", "--prompt", "p", "--ckpt", tmp_path)):
        done = run(*argv)
        error, = done.stderr.decode().splitlines()
        assert done.returncode == 2 and done.stdout == b"" and error.startswith("error: ") and str(tmp_path) in error


def test_piped_output_is_the_plain_text_alone(tmp_path):
    """Of an answer with a block, to a prompt that contains tags; the figures go to stderr and --json."""
    model, out = tiny_model(block_size=1024, tied=False), tmp_path / "answers.json"
    model.lm_head.weight.data *= 20
    model.lm_head.weight.data[list(TOKENIZER.special[:6])] *= 3  # so that this untrained model writes a block
    prompt, ckpt = "Say <|branch|> and <|/para|>.", save_tiny(tmp_path / "ckpt", model)
    done = run("decode.py", "--prompt", prompt, "--ckpt", ckpt, "--device", "cpu", "--dtype", "float64", "--temperature", 1,
               "--seed", 2, "--max-new-tokens", 300, "--json", out)
    assert done.returncode == 0, done.stderr
    answer = decode.generate(decode.load(ckpt, dtype="float64"), prompt, temperature=1.0, seed=2, max_new_tokens=300)
    assert answer.blocks and done.stdout.decode() == answer.text + "\n"
    assert f"{answer.steps} steps" in done.stderr.decode()
    result, = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert result.keys() >= {"prompt", "category", "text", "mode", "tokens", "steps", "seconds", "ttft", "blocks", "finish"}
    for key in ("prompt", "text", "mode", "tokens", "steps", "blocks", "finish"):
        assert result[key] == getattr(answer, key)
    assert result["category"] is None and result["seconds"] >= result["ttft"] > 0


def test_every_prompt_of_a_file_is_answered(tmp_path, monkeypatch, capsys):
    """In order, with its category; text that UTF-8 cannot write, a byte order mark and blank lines are no obstacle."""
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.json"
    file.write_text('\ufeff{"prompt": "a", "category": "x"}\n\n{"prompt": "b \\ud83d"}\n', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["decode.py", "--prompts", str(file), "--ckpt", str(save_tiny(tmp_path / "ckpt")), "--device",
                                      "cpu", "--max-new-tokens", "5", "--json", str(out), "--mode", "serial"])
    decode.main()
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [(r["prompt"], r["category"], r["mode"]) for r in results] == [("a", "x", "serial"), ("b \ud83d", None, "serial")]
    said = capsys.readouterr().out
    assert 0 <= said.find(results[0]["text"]) <= said.rfind(results[1]["text"])


def test_extraction_writes_every_answer(tmp_path, monkeypatch, capsys):
    """A line an answer; the segments' texts join to the response, a text starts with its title, small fields are kept."""
    file, out = write_answers(tmp_path / "answers.jsonl", 40), tmp_path / "out.jsonl"
    with open(file, "a") as f:
        f.write('{"id": "n", "category": null, "prompt": "p", "response": "r"}\n')
        f.write('{"id": "s", "category": "c", "model": "m", "prompt": "p", "response": "half \\ud83d a character"}\n')
    monkeypatch.setattr(sys, "argv", ["data.py", str(file), "--out", str(out), "--show", "99"])
    data.cli(data.main)
    records, lines = list(data.read_records(file)), [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(records) == 42 and not list(tmp_path.glob("*.tmp"))
    blocks = 0
    for r, line in zip(records, lines):
        text = ""
        for s in line["segments"]:
            text += s if isinstance(s, str) else "".join(b["text"] for b in s["branches"])
            blocks += not isinstance(s, str)
            assert isinstance(s, str) or all(b["title"] and b["text"].startswith(b["title"]) for b in s["branches"])
        assert text == r["response"] and line["prompt"] == r["prompt"] and line["id"] == r["id"]
    assert lines[-1]["category"] == "c" and lines[-1]["model"] == "m"
    said = capsys.readouterr().out
    assert blocks >= 20 and all(word in said for word in ("PPD", "ABN", "APD", "APE", "speedup", "refused"))
