"""Text in and out: layouts of files and what is wrong with files, rows and batches, the corpus, the terminal."""
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from aspd import IGNORE, Block, branch_mask, layout, plain, steps, tokenize
from data import (batches, collate, corpus, extract, learn_tokenizer, make_rows, printable,
                  read_objects, read_records, split_held_out)
from helpers import TOKENIZER, fails, random_ids, tiny_model, write_answers
from model import GPTConfig

DATA_PY = Path(data.__file__)


def as_lines(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def chat(*turns, **fields):
    """A ShareGPT record; a turn: (role, text)."""
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


@pytest.fixture
def read(tmp_path, capsys):
    """Writes records (or bytes) to a file and reads it -> ([(prompt, response)], what was said on stderr)."""

    def read(*records):
        path = tmp_path / "answers.jsonl"
        content = records[0] if isinstance(records[0], bytes) else as_lines(records).encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        pairs = [(r["prompt"], r["response"]) for r in read_records(path)]
        return pairs, capsys.readouterr().err
    return read


# -----------------------------------------------------------------------------
# layouts

PAIRS = [("How?", "So: 1 + 1 = 2.\n"), ("Why\n\nnot? \u2028", "Because.\r\n\r\nNext \U0001f600"),
         ("\u6f22", "\u5b57 {x}")]
LAYOUTS = {
    "prompt": lambda p, r: {"prompt": p, "response": r},
    "alpaca": lambda p, r: {"instruction": p, "input": "", "output": r},
    "sharegpt": lambda p, r: chat(("human", p), ("gpt", r)),
    "messages": lambda p, r: {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]},
    "mixed": lambda p, r: {"conversations": [{"role": "user", "content": p}, {"from": "gpt", "value": r}]},
    "one table of several layouts": lambda p, r: {
        "prompt": None, "instruction": float("nan"), "conversations": None, "messages": [
            {"role": "user", "content": p, "from": None, "value": None}, {"role": "assistant", "content": r}]},
}


@pytest.mark.parametrize("head", ["", "\ufeff", "\n  ", "\ufeff\n \r\n" + " \n" * 90, " " * 999, "\n" * 70 + " \t"],
                         ids=["bare", "BOM", "blank", "BOM and blank lines", "many blanks", "many blank lines"])
@pytest.mark.parametrize("write", [json.dumps, as_lines, lambda records: json.dumps(records, indent=2)],
                         ids=["array", "JSON Lines", "indented array"])
def test_all_layouts_give_the_same_records(read, write, head):
    """Prompts and answers arrive character for character, whatever the layout and what stands before them."""
    for name, wrap in LAYOUTS.items():
        pairs, said = read((head + write([wrap(*pair) for pair in PAIRS])).encode())
        assert pairs == PAIRS, name
        assert said == ""


def test_every_answer_of_a_conversation_has_the_user_turn_before_it(read):
    turns = [("system", "Be brief."), ("human", "a"), ("gpt", "A"), ("human", "b"), ("gpt", "B")]
    assert read(chat(*turns)) == ([("a", "A"), ("b", "B")], "")


def test_answers_have_the_id_of_their_record_or_its_number(tmp_path):
    path = tmp_path / "answers.jsonl"
    turns = [("human", "a"), ("gpt", "A"), ("human", "b"), ("gpt", "B")]
    path.write_text(as_lines([chat(*turns, id="x"), chat(*turns), chat(*turns[:2], id="y"), chat(*turns[:2])]))
    assert [r["id"] for r in read_records(path)] == ["x", "x", 1, 1, "y", 3]


def test_alpaca_input_joins_the_prompt_and_all_fields_are_kept(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    record = {"instruction": "Sort.", "input": "b a", "output": "a b", "id": 7, "category": "c", "facts": ["f"]}
    path.write_text(json.dumps(record))
    assert list(read_records(path)) == [{"prompt": "Sort.\n\nb a", "response": "a b", **record}]


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_null_and_nan_mean_not_given(tmp_path, nothing):
    """In any optional field, of a record or of a prompt."""
    path = tmp_path / "answers.jsonl"
    fields = dict.fromkeys(("id", "category", "model", "facts", "input", "conversations", "messages"), nothing)
    path.write_text(as_lines([{"instruction": "i", "output": "o", **fields}]))
    assert list(read_records(path)) == [
        {"id": 0, "prompt": "i", "response": "o", "instruction": "i", "output": "o"}]
    path.write_text(as_lines([{"prompt": "p", "category": nothing}]))
    assert list(read_objects(path)) == [{"prompt": "p"}]


# -----------------------------------------------------------------------------
# roles: known users and assistants, nobody else

@pytest.mark.parametrize("user", ["human", "user", "User", " HUMAN\n"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "Assistant ", "chatgpt", "ChatGPT", "model"])
def test_roles_are_compared_stripped_and_in_lower_case(read, user, assistant):
    assert read(chat((user, "a"), (assistant, "A"))) == ([("a", "A")], "")


@pytest.mark.parametrize("role", ["observation", "function_call", "tool", "narrator", "", 3, None])
def test_a_turn_of_anyone_else_is_left_out_and_counted_by_its_role(read, role):
    """And with it the answer that follows it, which may rely on it."""
    pairs, said = read(chat(("human", "a"), (role, "x"), ("gpt", "A"), ("human", "b"), ("gpt", "B"), (role, "x")))
    assert pairs == [("b", "B")]
    assert f"2 x {str(role or None).lower()} turn out of place" in said and "1 x gpt turn out of place" in said


def test_turns_of_a_user_in_a_row_are_one_prompt_and_a_second_answer_is_left_out(read):
    """Never an answer to half a prompt, nor two rival ones."""
    turns = [("human", "a"), ("human", "b\n"), ("gpt", "A"), ("gpt", "B"), ("human", "c"), ("gpt", "C")]
    pairs, said = read(chat(*turns))
    assert pairs == [("a\n\nb\n", "A"), ("c", "C")] and "1 x gpt turn out of place" in said


def test_a_system_turn_is_not_used_and_not_counted(read):
    assert read(chat(("system", "Be brief."), ("human", "a"), ("gpt", "A"))) == ([("a", "A")], "")


# -----------------------------------------------------------------------------
# nothing silently left out

LEFT_OUT = {  # records without an answer, and what is said about them
    "no answer": ({"prompt": "p"}, r"1 x record that ends without an answer \(prompt\)"),
    "null answer": ({"prompt": "p", "response": None}, r"1 x record that ends without an answer \(prompt\)"),
    "blank answer": ({"prompt": "p", "response": " \n"}, "1 x assistant turn without text"),
    "answer is no text": ({"prompt": "p", "response": 3}, "1 x assistant turn without text"),
    "answer is a list of parts": ({"messages": [{"role": "user", "content": "p"}, {
        "role": "assistant", "content": [{"type": "text", "text": "A"}]}]}, "1 x assistant turn without text"),
    "no prompt": ({"prompt": "", "response": "r"}, "1 x user turn without text"),
    "prompt is no text": ({"prompt": 5, "response": "r"}, "1 x user turn without text"),
    "part of the prompt is no text": ({"instruction": "Double.", "input": 5, "output": "10"}, "1 x user turn without text"),
    "other field names": ({"question": "q", "reply": "r"}, r"1 x record that ends without an answer \(question, reply\)"),
    "no fields": ({}, "1 x record that ends without an answer"),
    "Alpaca without an output": ({"instruction": "i", "input": ""}, "without an answer .instruction, input"),
    "Alpaca with an empty output": ({"instruction": "i", "input": "", "output": ""}, "1 x assistant turn without text"),
    "no turns": ({"conversations": []}, "without an answer .conversations"),
    "turns without text": (chat(("human", "a"), ("gpt", None)), "1 x gpt turn without text"),
    "an answer to a turn without text": (chat(("human", None), ("gpt", "A")), "1 x human turn without text"),
    "a prompt alone": (chat(("human", "a")), "1 x record that ends without an answer"),
    "an answer alone": (chat(("gpt", "A")), "1 x gpt turn out of place"),
    "nobody known": (chat(("narrator", "a"), ("critic", "A")), "1 x narrator turn out of place, 1 x critic turn out of"),
    "turns before the prompt": ({"instruction": "i", "output": "o", "history": [["p", "r"]]}, "1 x record that is not to be learnt"),
    "a system text alone": (chat(("system", "Be brief.")), "1 x record that ends without an answer"),
    "an answer that calls a tool": ({"messages": [{"role": "user", "content": "p"}, {
        "role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "look"}]}]}, "1 x assistant .not to be learnt. turn"),
    **{f"a record with {mark} {value}": ({"prompt": "p", "response": "r", mark: value}, "1 x record that is not to be learnt")
       for mark, value in [("weight", 0), ("label", False), ("kto_tag", False), ("train", False), ("loss", 0.0)]},
    **{f"a turn with {mark} {value}": ({"messages": [
        {"role": "user", "content": "p"}, {"role": "assistant", "content": "A", mark: value}]}, "1 x assistant .not to be learnt. turn")
       for mark, value in [("weight", 0), ("train", False), ("channel", "analysis")]},
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_yields_no_answer_is_left_out_and_counted(read, name):
    record, reason = LEFT_OUT[name]
    pairs, said = read({"prompt": "p", "response": "r"}, record, {"prompt": "q", "response": "s"})
    assert pairs == [("p", "r"), ("q", "s")]
    assert re.search(reason, said) and "answers.jsonl: left out" in said and said.count("\n") == 1, said
    with pytest.raises(ValueError) as e:
        read(record)
    message = str(e.value)
    assert "\n" not in message and "answers.jsonl: no usable answers" in message and re.search(reason, message), message
    for field in ("prompt", "response", "instruction", "output", "conversations", "from", "messages", "role"):
        assert f'"{field}"' in message, "it names the layouts"


def test_an_input_that_is_blank_is_none(read):
    assert read({"instruction": "p", "input": " ", "output": "r"}) == ([("p", "r")], "")


def test_a_conversation_may_begin_with_an_answer(read):
    """It is left out: a third of ShareGPT's conversations are cut off in front."""
    pairs, said = read(chat(("gpt", "A"), ("human", "b"), ("gpt", "B")))
    assert pairs == [("b", "B")] and "1 x gpt turn out of place" in said


def test_a_turn_without_text_keeps_its_place(read):
    """The answer after it is no answer to the prompt before it."""
    turns = [("human", "a"), ("gpt", ""), ("human", "b"), ("gpt", "B"), ("human", None), ("gpt", "C")]
    pairs, said = read(chat(*turns))
    assert pairs == [("b", "B")]
    assert "1 x gpt turn without text" in said and "1 x human turn without text" in said


def test_marks_that_say_yes_leave_nothing_out(read):
    """A weight over 0, a label that is true, an empty history or list of calls; and what is marked of a user's turn is not learnt anyway."""
    turns = [{"role": "user", "content": "p", "train": False}, {"role": "assistant", "content": "r", "weight": 1, "channel": None, "tool_calls": []}]
    assert read({"messages": turns, "label": True, "history": None}) == ([("p", "r")], "")
    assert read({"instruction": "p", "output": "r", "history": []}) == ([("p", "r")], "")


def test_an_empty_file_is_an_error(read):
    for content in (b" ", b"\n\n", b"[]", b"\xef\xbb\xbf\n [ ]\n"):
        with pytest.raises(ValueError, match="no usable answers"):
            read(content)


# -----------------------------------------------------------------------------
# what is no JSON

GOOD = b'{"prompt": "p", "response": "r"}\n'
INDENTED = json.dumps({"prompt": "p", "response": "r"}, indent=2).encode() + b"\n"
BAD_FILES = {  # content, what the message must name
    "broken line": (GOOD * 2 + b'{"prompt": "p", "resp\n' + GOOD, "record 3.*JSON"),
    "bare text": (b"hello\n", "record 1.*JSON"),
    "broken array": (b'[{"prompt": "p"', "answers.jsonl"),
    "not an object": (GOOD + b"[1]\n", "record 2.*list"),
    "not an object in an array": (b'[{"prompt": "p", "response": "r"}, 3]', "record 2.*int"),
    "one indented object": (INDENTED, "record 1.*JSON Lines has one object a line"),
    "several indented objects": (b"\n" + INDENTED * 3, "record 1.*JSON Lines has one object a line"),
    "Latin-1": (GOOD + '{"prompt": "caf\u00e9", "response": "r"}\n'.encode("latin-1"), "utf-8"),
    "UTF-16": ('{"prompt": "p"}\n'.encode("utf-16"), "utf-8"),
    "deeply nested": (b"[" * 100_000, "recursion"),
    "deeply nested in a line": (GOOD + b'{"a":' * 100_000, "record 2.*recursion"),
    "turns that are no list": (GOOD + b'{"conversations": "hello"}\n', "record 2.*'str'"),
    "turns that are no objects": (GOOD + b'{"messages": [{"role": "user"}, null]}\n', "record 2.*NoneType"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_and_place(read, name):
    content, named = BAD_FILES[name]
    with pytest.raises(ValueError) as e:
        read(content)
    message = str(e.value)
    assert "\n" not in message and "answers.jsonl" in message and re.search(named, message, re.I), message


def test_lone_surrogates_are_no_obstacle(read):
    """In prompts, answers, roles and names of fields: raw they are not UTF-8, escaped they are read."""
    assert read(b'{"prompt": "p \\ud83d", "response": "\\udc00 r"}')[0] == [("p \ud83d", "\udc00 r")]
    pairs, said = read(GOOD + b'{"\\ud83d": 1}\n{"conversations": [{"from": "\\ud83d", "value": "x"}]}\n')
    assert len(pairs) == 1 and r"\ud83d turn out of place" in said
    with pytest.raises(ValueError, match="utf-8"):
        read('{"prompt": "\ud83d", "response": "r"}'.encode("utf-8", "surrogatepass"))


# -----------------------------------------------------------------------------
# rows and batches

def test_held_out_prompts_are_never_trained_on():
    """All answers to a prompt fall on one side, the same in every run and every order: those of 2% of the prompts."""
    records = [{"prompt": f"prompt {i % 500}", "response": str(i)} for i in range(2000)]
    train, held_out = split_held_out(records)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert len(train) + len(held_out) == 2000 and len(held_out) == 40
    assert split_held_out(records[::-1])[1] == held_out[::-1]
    program = "import data; print(data.split_held_out([{'prompt': f'prompt {i % 500}'} for i in range(2000)])[1])"
    other = subprocess.run([sys.executable, "-c", program], cwd=DATA_PY.parent, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": "1"})
    assert other.stdout == f"{[{'prompt': r['prompt']} for r in held_out]}\n"


@pytest.mark.parametrize("n", range(1, 32))
def test_a_handful_of_answers_can_be_split(n):
    """One prompt at least is held out where there are two, none where there is one, and one is left to train on."""
    train, held_out = split_held_out([{"prompt": str(i), "response": "r"} for i in range(n)])
    assert len(train) + len(held_out) == n and len(held_out) == (n > 1)
    same = [{"prompt": "same \ud83d", "response": str(i)} for i in range(n)]
    assert split_held_out(same) == (same, [])


def test_serial_twins_leave_out_the_same_answers():
    """Both train on the same answers; a serial row holds its answer's ids and nothing else."""
    records = corpus(40) + [{"prompt": "p", "response": "word " * 500}]
    config = GPTConfig(block_size=1200)
    tagged = make_rows(records, TOKENIZER, config)
    assert 0 < len(tagged) < len(records) and max(len(r.token) for r in tagged) <= 1200
    assert any(r.block.any() for r in tagged)
    serial = make_rows(records, TOKENIZER, GPTConfig(block_size=1200, positions=None))
    assert len(serial) == len(tagged) and not any(r.block.any() for r in serial)
    texts = [TOKENIZER.decode(r.target[r.target >= 0].tolist()) for r in serial]
    assert set(texts) < {r["response"] for r in records}


def test_batches_depend_on_the_seed_alone_and_miss_nothing():
    rows = [layout([0] * (i % 50 + 1), [], i) for i in range(203)]
    per_epoch = -(-203 // 8)

    def take(seed, n):
        taken = itertools.islice(batches(rows, 8, seed), n)
        return [[row.target[-1].item() for row in batch] for batch in taken]

    first, second = take(1, 2 * per_epoch)[:per_epoch], take(1, 2 * per_epoch)[per_epoch:]
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(203)), "every index once an epoch"
        assert max(map(len, epoch)) == 8
    assert first != second and take(1, 9) == take(1, 9) and take(1, 9) != take(2, 9)
    together = [set(batch) for epoch in (first, second) for batch in epoch if 0 in batch]
    assert together[0] != together[1], "in other company every epoch"
    assert next(batches(rows[:1], 8, 0)) == rows[:1]


@pytest.mark.parametrize("size", [4, 16])
def test_less_than_a_tenth_of_what_is_fed_is_padding(size):
    tokenizer = learn_tokenizer(r["response"] for r in corpus(100))
    rows = make_rows(corpus(640), tokenizer, GPTConfig())
    fed = 0
    for batch in itertools.islice(batches(rows, size, 0), len(rows) // size):
        fed += collate(batch)[0].numel()
    assert 1 - sum(len(r.token) for r in rows) / fed < 0.10


def test_collated_rows_equal_rows_alone():
    """In a batch of rows of different lengths, with and without blocks, a model sees each row as if it were alone."""
    rows = [layout([1, 2], random_ids(seed, blocks=seed % 3, branches=2 + seed, long=20), TOKENIZER.eos, TOKENIZER.tags)
            for seed in range(4)]
    model = tiny_model(block_size=512, n_layer=2).double().requires_grad_(False)
    plain = rows[3]._replace(block=rows[3].block * 0, branch=rows[3].branch * 0)
    for group in (rows, [rows[1]], [rows[0], plain]):
        idx, position, mask, target = collate(group)
        assert idx.shape == position.shape == target.shape and idx.size(1) % 16 == 0
        assert mask.shape == (len(group), 1, idx.size(1), idx.size(1))
        logits = model(idx, position, mask)
        assert logits.isfinite().all()
        for i, row in enumerate(group):
            T = len(row.token)
            alone = model(row.token[None], row.position[None], branch_mask(row.block, row.branch)[None, None])
            assert torch.allclose(logits[i, :T], alone[0], rtol=1e-10, atol=1e-12)
            assert target[i, :T].equal(row.target) and (target[i, T:] == IGNORE).all()


# -----------------------------------------------------------------------------
# the built-in corpus

PARALLEL = ("numbered", "bulleted", "headed", "nested")
CORPUS = corpus(1200)
SEGMENTS = [extract(r["response"], r["prompt"])[0] for r in CORPUS]


def test_the_kinds_that_can_be_parallel_are_and_the_others_are_not():
    """One block with a branch for each thing, and the conclusion outside it; running sums and prose stay serial."""
    assert {r["category"] for r in CORPUS} == {*PARALLEL, "sums", "prose"}
    for r, segments in zip(CORPUS, SEGMENTS):
        blocks = [s for s in segments if isinstance(s, Block)]
        assert len(blocks) == (r["category"] in PARALLEL), r["response"]
        if blocks:
            assert len(blocks[0]) == r["response"].count(" weigh about ") and segments[-1].strip() == r["facts"][-1]


def test_its_parallel_kinds_promise_enough_steps_fewer():
    """2.4 times fewer are asked for, over all; on the answers that decoding is measured with."""
    tokenizer = learn_tokenizer(r["response"] for r in CORPUS)
    tokens, passes = 0, 0
    for r in corpus(400, split="val"):
        if r["category"] in PARALLEL:
            ids = tokenize(extract(r["response"], r["prompt"])[0], tokenizer.encode)
            tokens += len(plain(ids))
            passes += steps(ids)
    assert tokens / passes > 2.5


def test_its_facts_are_what_its_answers_say():
    """Every sentence once, two for each thing, and a conclusion that only all branches together can tell."""
    for r in CORPUS:
        at = [r["response"].index(fact) for fact in r["facts"]]
        assert at == sorted(at) and len(set(r["facts"])) == len(r["facts"])
        if r["category"] == "sums":
            km, days = map(int, re.findall(r"\d+", r["prompt"]))
            assert r["facts"] == [f"Day {i} of {days} makes {km * i - km} + {km} = {km * i} km." for i in range(1, days + 1)] \
                + [f"In all, that is {km * days} km."]
            continue
        weights = {name.lower(): int(kg) for name, kg in re.findall(r"([A-Z]\w+) weigh about (\d+) kg", r["response"])}
        light, heavy = min(weights, key=weights.get), max(weights, key=weights.get)
        assert r["facts"][-1] == f"Overall, {light} are the lightest and {heavy} the heaviest."
        assert len(r["facts"]) == 2 * len(weights) + 1 and 2 <= len(weights) <= 8
        named = re.findall(r"\w+", r["prompt"])
        assert [name for name in named if name in weights] == list(weights), "in the order of the prompt"


def test_held_out_answers_are_of_a_kind_that_had_never_these_things():
    def combinations(records):
        return {(r["category"], *re.findall(r"\w+(?=,| and|[.?]$)|\d+", r["prompt"])) for r in records}

    train, val = combinations(corpus()), combinations(corpus(200, split="val"))
    assert len(val) > 60 and not train & val
    assert len({r["prompt"].split()[0] for r in CORPUS}) == 3, "phrasings"
    assert corpus(99) == corpus(99) != corpus(99, seed=1)


# -----------------------------------------------------------------------------
# the terminal

HOSTILE = "red \x1b[31m title \x1b]0;owned\x07 \r overwritten \x08\x7f \x9b2J \x00 tab\t end"


def test_control_characters_are_shown_escaped():
    shown = printable(HOSTILE + "\n\u00e9\u6f22\U0001f600\u2028")
    assert shown.startswith(r"red \x1b[31m title \x1b]0;owned\x07 \r overwritten \x08\x7f \x9b2J \x00 tab" + "\t")
    assert shown.endswith("\n\u00e9\u6f22\U0001f600\u2028"), "all other text stays"
    every = printable("".join(map(chr, range(0x10000))))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", every) and r"\ud83d" in every


def run(*argv, **kwargs):
    """data.py in a real process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    kwargs = {"capture_output": True, "timeout": 60, "env": env} | kwargs
    return subprocess.run([sys.executable, str(DATA_PY), *map(str, argv)], **kwargs)


def test_nothing_of_a_file_reaches_the_terminal_raw(tmp_path, monkeypatch, capsys):
    """In --show, reasons, categories, errors; --out keeps it exactly."""
    path, out = tmp_path / "hostile.jsonl", tmp_path / "out.jsonl"
    lists = f"Two:\n\n1. **{HOSTILE}**: {'a word ' * 20}\n2. **Other**: {HOSTILE} {'a word ' * 20}\n"
    records = [{"id": HOSTILE, "category": HOSTILE, "prompt": HOSTILE, "response": text} for text in (lists, HOSTILE)]
    path.write_text(as_lines([*records, chat((HOSTILE, "x")), {HOSTILE: 1}]))
    done = run(path, "--show", 9, "--out", out)
    assert done.returncode == 0, done.stderr
    for said in (done.stdout.decode(), done.stderr.decode()):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)
    assert r"\x1b[31m" in done.stdout.decode()
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in written] == [HOSTILE] * 2 and written[1]["segments"] == [HOSTILE]
    path.write_text(as_lines([{HOSTILE: 1}]))
    assert r"\x1b[31m" in fails(data, [path], monkeypatch, capsys)


def bash(command, tail, folder):
    """Runs data.py's command line with a tail, a pipe or redirections, in bash -> (its exit code, what is on stderr)."""
    line = f"{sys.executable} {DATA_PY} {command} {tail}; echo ${{PIPESTATUS[0]}} > {folder}/code"
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    code = int(Path(folder, "code").read_text())
    Path(folder, "code").unlink()
    return code, done.stderr.decode()


@pytest.mark.parametrize("pipe", ["| head -n 1", "| true", "2>&1 | head -n 1"])
def test_nobody_reading_on_is_a_quiet_end(tmp_path, pipe):
    """By SIGPIPE, of which the shell makes 141."""
    answers = write_answers(tmp_path / "answers.jsonl", 600)
    assert bash(f"{answers} --show 600", pipe, tmp_path) == (141, "")


def test_nobody_reading_the_help_is_a_quiet_end(tmp_path):
    assert bash("--help", "| true", tmp_path) in [(141, ""), (0, "")]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_encoding_of_the_terminal_takes_any_answer(tmp_path, encoding):
    """What it lacks is escaped."""
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "caf\u00e9 \u6f22 \U0001f600 \ud83d"}))
    done = run(path, "--show", 1, env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    shown = "caf\u00e9 \u6f22 \U0001f600 \ud83d".encode(encoding, "backslashreplace")
    assert shown in done.stdout and b"\\ud83d" in done.stdout


def test_an_interrupt_is_a_quiet_end(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        data.cli(interrupted)
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


def test_an_error_that_is_not_bad_input_is_not_hidden():
    def bug():
        raise RuntimeError("shapes do not match")

    def bug_of_a_value():
        raise ValueError("too many values to unpack")

    with pytest.raises(RuntimeError, match="shapes"):
        data.cli(bug)
    with pytest.raises(ValueError, match="too many"):
        data.cli(bug_of_a_value)


# -----------------------------------------------------------------------------
# what data.py writes

def test_extraction_writes_every_answer(tmp_path, monkeypatch, capsys):
    """A line an answer; the segments' texts join to the response, a text starts with its title."""
    file, out = write_answers(tmp_path / "answers.jsonl", 40), tmp_path / "out.jsonl"
    with open(file, "a") as f:
        f.write('{"id": "n", "category": null, "prompt": "p", "response": "r"}\n{"prompt": "p"}\n')
        f.write('{"id": "s", "category": "c", "model": "m", "prompt": "p", "response": "half \\ud83d a \\\\"}\n')
    monkeypatch.setattr(sys, "argv", ["data.py", str(file), "--out", str(out), "--show", "99"])
    data.cli(data.main)
    said = capsys.readouterr()
    records = list(read_records(file))
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(records) == 42 and not list(tmp_path.glob("*.tmp"))
    blocks = 0
    for r, line in zip(records, lines):
        text = ""
        for s in line["segments"]:
            text += s if isinstance(s, str) else "".join(b["text"] for b in s["branches"])
            blocks += not isinstance(s, str)
            assert isinstance(s, str) or all(b["title"] and b["text"].startswith(b["title"]) for b in s["branches"])
        assert text == r["response"] and all(line[name] == r[name] for name in ("id", "prompt"))
        assert line["category"] == r.get("category")
    assert blocks >= 20 and "1 x record that ends without an answer" in said.err
    assert "\n| [1. **Part alpha]**: " in said.out
    assert re.search(r"30 of 42 answers have a block.*Ideal speedup.*: 1\.\d\d in the mean, \d\.\d\d at best", said.out)


def test_input_and_output_may_be_pipes():
    """The file is read once, and written to as it is."""
    done = run("/dev/stdin", "--out", "/dev/stdout", input=GOOD * 3)
    assert done.returncode == 0 and b"0 of 3 answers" in done.stdout, done.stderr
    assert done.stdout.count(b'"segments": ["r"]') == 3
