"""The bench on tiny random models: what it replays, counts and averages can be known beforehand; times only exist."""
import json

import bench
import pytest
import torch

from aspd import is_block, plain, stats
from data import corpus
from helpers import save_tiny, tiny_model, write_answers


def encode(*segments):
    """Segments of text -> of byte ids; a block is a list of (title, rest)."""
    ids = lambda text: list(text.encode())
    return [ids(s) if isinstance(s, str) else [(ids(title), ids(rest)) for title, rest in s] for s in segments]


ANSWERS = [encode("no block at all"),
           encode("Two:\n", [("1. A", ": x\n"), ("2. B", ": far longer than its sibling, and then some\n")], "End."),
           encode([(f"{i}.", "y" * i) for i in range(1, 9)], "and", [("a", ""), ("b", "z")])]


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return bench.get_lm(bench.parse_args(["--shape", "tiny", "--device", "cpu"]), ["few words"])


@pytest.mark.parametrize("ids", ANSWERS)
def test_replay_gives_the_answer_back_in_the_steps_that_stats_predicts(lm, ids):
    record = {"ids": ids, "prompt": "write this", "budget": 2000}
    for mode, expected in (("adaptive", ids), ("serial", [plain(ids)])):
        answer = bench.replay(lm, record, mode, {})
        assert answer.segments == expected and answer.text == lm.tokenizer.decode(plain(ids))
        assert answer.steps == stats(expected).steps and answer.tokens == len(plain(ids))
        assert answer.blocks == [[len(t + r) for t, r in s] for s in expected if is_block(s)]


def test_replay_refuses_an_answer_that_the_engine_had_to_cut(lm):
    with pytest.raises(ValueError, match="steps"):
        bench.replay(lm, {"ids": ANSWERS[1], "prompt": "write this", "budget": 60}, "adaptive", {})


def run(tmp_path, capsys, *argv):
    """Runs the command line -> its JSON, having checked that what it printed fits 120 columns."""
    bench.main([*map(str, argv), "--device", "cpu", "--json", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("command")) <= 120
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["summary"]["machine"] and out["summary"]["torch"] == torch.__version__
    return out


def test_replay_of_a_file(tmp_path, capsys):
    records = corpus(20, split="val")
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out = run(tmp_path, capsys, "--replay", tmp_path / "answers.jsonl", "--shape", "tiny", "--limit", 5)
    results, summary = out["results"], out["summary"]
    texts = {r["prompt"]: r["response"] for r in records}
    assert len(results) + summary["left_out"] == 5 and len(results) >= 3
    for r in results:
        assert r["aspd"]["text"] == r["serial"]["text"] == texts[r["prompt"]]
        assert r["serial"]["steps"] == r["serial"]["tokens"] == r["aspd"]["tokens"]
    total = lambda side, key: sum(r[side][key] for r in results)
    everything = summary["all"]
    assert everything["ideal"] == everything["fewer_steps"]
    assert everything["ideal"] == pytest.approx(total("aspd", "tokens") / total("aspd", "steps"))
    assert everything["speedup"] == pytest.approx(total("serial", "seconds") / total("aspd", "seconds"))
    assert everything["realised"] == pytest.approx(everything["speedup"] / everything["ideal"])
    assert everything["ideal"] > 1 and summary["memory_gb"] > 0


def result(category, aspd, serial, **more):
    """aspd, serial: (tokens, steps, seconds, tokens of the branches)"""
    names, same = ("tokens", "steps", "seconds", "blocks"), {"ttft": 0.1, "finish": "stop", "text": ""} | more
    side = lambda values: dict(zip(names, values)) | same
    return {"category": category, "prompt": "", "aspd": side(aspd), "serial": side(serial)}


def test_report_of_figures_worked_out_by_hand(capsys):
    results = [result("lists", (100, 40, 1, [[30, 40]]), (80, 80, 2, []), right=3, facts=4, exact=False, duplicates=[True]),
               result("lists", (50, 20, 1, [[9, 9, 9, 9]]), (50, 50, 2, []), right=4, facts=4, exact=True, duplicates=[False]),
               result("prose", (10, 10, 1, []), (10, 10, 1, []), right=2, facts=2, exact=True, duplicates=[])]
    summary = bench.report(results, lambda kind: kind == "lists", ())
    lists = summary["kinds"]["lists"]
    assert (lists["answers"], lists["parallel"], lists["branches"], lists["ideal"]) == (2, 1.0, 3.0, 2.5)
    assert lists["fewer_steps"] == pytest.approx(130 / 60)
    assert lists["speedup"] == pytest.approx((4 / 130) / (2 / 150))
    assert lists["average"] == pytest.approx((2.5 + 2) / 2) and lists["best"] == pytest.approx(2.5)
    assert (lists["facts"], lists["exact"], lists["duplicates"], lists["speedup_without"]) == (7 / 8, 0.5, 0.5, 2.0)
    assert (summary["serial_opened"], summary["serial_speed"], summary["facts"]) == (0.0, 1.0, 0.9)
    assert summary["parallel_speedup"] == lists["speedup"] and summary["parallel_ideal"] == 2.5
    assert "= parallel kinds" in capsys.readouterr().out


def test_branches_that_repeat_each_other():
    assert bench.alike(["eat more green food every day", "walk", "Eat more green food, every day!"])
    assert not bench.alike(["eat more green food every day", "sleep eight hours in a dark room", "", ""])


def test_steps_and_training(tmp_path, capsys):
    out = run(tmp_path, capsys, "--step", "--shape", "tiny", "--repeats", 1, "--context", 64, "--contexts", 32)
    assert out["summary"]["step_ratio"]["1"] == 1 and set(out["summary"]["step_ms"]) == set(map(str, bench.WIDTHS))
    assert [r["context"] for r in out["results"]] == [32, 64]
    out = run(tmp_path, capsys, "--train", "--shape", "tiny", "--repeats", 1, "--batches", 2, "--batch-size", 2)
    assert set(out["summary"]["tokens_s"]) == {"aspd", "serial", "bare", "untagged"}
    assert 0 < out["summary"]["extra_tokens"] < 1
    assert {r["batch"] for r in out["results"]} == {0, 1} and all(r["seconds"][0] > 0 for r in out["results"])


def test_held_out_loss_of_both_sides(tmp_path, capsys):
    """Random weights guess: both sides' loss is near log V, on the same answers; the tagged rows are longer."""
    path = write_answers(tmp_path / "answers.jsonl")
    save_tiny(tmp_path / "out", tiny_model(block_size=1024))
    out = run(tmp_path, capsys, "--held-out", path, "--ckpt", tmp_path / "out", "--baseline", tmp_path / "out")
    losses = out["summary"]["held_out_loss"]
    assert out["summary"]["answers"] > 0 and all(4 < losses[side] < 8 for side in ("aspd", "serial"))
    assert losses["aspd"] != losses["serial"]
    assert out["summary"]["of_serial"] == pytest.approx(losses["aspd"] / losses["serial"])
    places = {row["place"]: row for row in out["results"]}
    assert list(places) == ["outside", "titles", "first branches", "later branches"]
    assert places["later branches"]["tokens"] > places["first branches"]["tokens"] > 0
    of_all = lambda side: (sum(row[side] * row["tokens"] for row in places.values())
                           / sum(row["tokens"] for row in places.values()))
    assert of_all("aspd") == pytest.approx(losses["aspd"], rel=2e-3), "the same tokens, one answer at a time"
    assert sum(row["share"] for row in places.values()) == pytest.approx(1)
    assert places["outside"]["hidden"] is None and places["titles"]["hidden"] is None
    first, later = places["first branches"], places["later branches"]
    assert first["hidden"] == pytest.approx(first["serial"], rel=1e-5), "a first branch has no sibling before it"
    assert later["hidden"] != pytest.approx(later["serial"], rel=1e-5)
