"""The bench on tiny random models: what it replays, counts and averages can be known beforehand;
times only exist."""
import json
import sys
from types import SimpleNamespace

import bench
import pytest
import torch

from aspd import Block, Branch, plain, steps, tokenize
from data import corpus
from decode import generate
from model import read_checkpoint, save_checkpoint


def encode(text):
    return list(text.encode())


ANSWERS = [
    tokenize(segments, encode) for segments in (
        ["no block at all"],
        ["Two:\n", Block([Branch("1. A", ": x"), Branch("\n2. B", ": much longer than it")]), "!"],
        [Block(Branch(f"{i}.", "y" * i) for i in range(1, 9)), "and",
         Block([Branch("a", ""), Branch("b", "z")])])]


@pytest.fixture(scope="module")
def args():
    return bench.parse_args(["--shape", "tiny", "--device", "cpu"])


@pytest.fixture(scope="module")
def lm(args):
    torch.manual_seed(0)
    return bench.get_lm(args, ["few words"])


def write_records(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def save_tiny(out_dir, lm):
    out_dir.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out_dir, config=vars(lm.model.config), model=lm.model.state_dict(),
                    tokenizer=lm.tokenizer.settings)
    return out_dir


def run(tmp_path, capsys, *argv):
    """Runs the command line -> its JSON, having checked that what it printed fits 100 columns."""
    bench.main([*map(str, argv), "--device", "cpu", "--json", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("command")) <= 100
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["summary"]["machine"] and out["summary"]["torch"] == torch.__version__
    return out


# ---- replay -----------------------------------------------------------------

@pytest.mark.parametrize("ids", ANSWERS)
def test_replay_gives_the_answer_back_in_the_steps_that_aspd_predicts(lm, args, ids):
    record = {"ids": ids, "prompt": "write this", "budget": 2000}
    for mode, expected in (("adaptive", ids), ("serial", [plain(ids)])):
        answer = bench.replay(lm, record, mode, args)
        assert answer.segments == expected
        assert answer.text == lm.tokenizer.decode(plain(ids))
        assert answer.steps == steps(expected)
        assert answer.tokens == len(plain(ids))
        blocks = [s for s in expected if isinstance(s, Block)]
        assert answer.blocks == [[len(t + r) for t, r in block] for block in blocks]


def test_replay_refuses_an_answer_that_the_engine_had_to_cut(lm, args):
    record = {"ids": ANSWERS[1], "prompt": "write this", "budget": 60}
    with pytest.raises(ValueError, match="steps"):
        bench.replay(lm, record, "adaptive", args)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 3, 3, 200)])
def test_replay_has_room_for_a_short_block_and_for_its_longest_branch(
        lm, args, monkeypatch, lengths):
    """A budget as small as to_replay()'s lets the engine open the block and end every branch."""
    block = Block(Branch(f"{i}. ", "x" * n) for i, n in enumerate(lengths, start=1))
    monkeypatch.setattr(bench, "extract", lambda text, prompt: ([block], []))
    record, = bench.to_replay([{"prompt": "List them.", "response": ""}], lm)
    assert record["ids"] == tokenize([block], lm.tokenizer.encode)
    bench.replay(lm, record, "adaptive", args)  # raises where the engine had to cut


def test_replay_works_through_the_compiled_step_too(lm, args):
    """What stands in for a compiled step gets the passes of one token a branch, padded to a power
    of two; nothing is left to compile after the warm-up."""
    widths = set()
    eager = lm.step

    def counting(model, feed, *more):
        widths.add((feed.size(1), torch.is_grad_enabled(), more[-1]))
        return eager(model, feed, *more)

    lm.compiled_step = counting
    try:
        bench.warm_up(lm, 512, args)
        warm = set(widths)
        assert warm == {(width, False, 512) for width in bench.WIDTHS}
        found = bench.compiled_against_eager(
            lm, {"ids": ANSWERS[2], "prompt": "write this", "budget": 480}, args)
    finally:
        lm.compiled_step = None
    assert widths == warm
    assert found["compiled_difference"] < 1e-4 and found["compiled_same"] == 1


def test_padding_leaves_few_shapes(lm, args):
    """Of the passes that are never compiled. Padded they have powers of two of tokens and choices,
    and all slots; without padding nearly every answer brings new ones."""
    records = bench.to_replay(corpus(35, split="val"), lm)
    lm.model.owner = None
    bench.warm_up(lm, max(r["row_tokens"] for r in records) + 1, args)
    assert bench.count_shapes(lm, records, args, padded=False) > 25
    assert 2 <= bench.count_shapes(lm, records, args, padded=True) <= 12
    block = Block([Branch([1], [2]), Branch([3], [4])])
    record = {"ids": [[5], block, [6], block], "prompt": "p", "budget": 500}
    shapes = [bench.count_shapes(lm, [record] * 3, args, padded) for padded in (False, True)]
    assert shapes == [3, 2], "a prefill, and two blocks alike but for their place in the cache"


def test_replay_of_a_file(tmp_path, capsys):
    records = corpus(10, split="val")
    path = write_records(tmp_path / "answers.jsonl", records)
    out = run(tmp_path, capsys, "--replay", path, "--shape", "tiny", "--limit", 3)
    results, summary = out["results"], out["summary"]
    texts = {r["prompt"]: r["response"] for r in records}
    assert len(results) + summary["left_out"] == 3 and len(results) >= 2
    for r in results:
        assert r["aspd"]["text"] == r["serial"]["text"] == texts[r["prompt"]]
        assert r["serial"]["steps"] == r["serial"]["tokens"] == r["aspd"]["tokens"]

    def total(side, key):
        return sum(r[side][key] for r in results)

    everything = summary["all"]
    assert everything["ideal"] == everything["fewer_steps"] > 1
    assert everything["ideal"] == pytest.approx(total("aspd", "tokens") / total("aspd", "steps"))
    speedup = total("serial", "seconds") / total("aspd", "seconds")
    assert everything["speedup"] == pytest.approx(speedup)
    assert everything["realised"] == pytest.approx(speedup / everything["ideal"])
    assert summary["uncut"] == everything and summary["memory_gb"] > 0
    assert summary["shapes"] >= summary["shapes_padded"] > 0


# ---- figures ----------------------------------------------------------------

def result(category, aspd, serial, **more):
    """aspd, serial: (tokens, steps, seconds, tokens of the branches, finish)"""
    r = {"category": category, "prompt": ""}
    for side, values in (("aspd", aspd), ("serial", serial)):
        r[side] = dict(zip(("tokens", "steps", "seconds", "blocks", "finish"), values))
        r[side] |= {"ttft": 0.1, "text": "", "pace": values[2] / values[0]} | more
    return r


RESULTS = [
    result("lists", (100, 40, 1, [[30, 40]], "stop"), (80, 80, 2, [], "stop"),
           right=3, facts=4, duplicates=[True]),
    result("lists", (50, 20, 1, [[9, 9, 9, 9]], "stop"), (50, 50, 2, [], "length"),
           right=4, facts=4, duplicates=[False]),
    result("prose", (10, 10, 1, [], "stop"), (10, 10, 1, [], "stop"),
           right=2, facts=2, duplicates=[])]


def test_report_of_figures_worked_out_by_hand(capsys):
    summary = bench.report(RESULTS, [True, False, False], ("answers", "speedup", "facts"))
    lists = summary["kinds"]["lists"]
    assert (lists["answers"], lists["parallel"], lists["ideal"]) == (2, 1.0, 2.5)
    assert lists["fewer_steps"] == pytest.approx(130 / 60)
    assert lists["speedup"] == pytest.approx((4 / 130) / (2 / 150))
    assert lists["average"] == pytest.approx((2.5 + 2) / 2)
    assert (lists["low"], lists["high"]) == pytest.approx((2, 2.5)), "two answers: all there is"
    assert lists["best"] == pytest.approx(2.5)
    assert (lists["facts"], lists["duplicates"], lists["tokens_baseline"]) == (7 / 8, 0.5, 65)
    assert (lists["cut"], lists["cut_baseline"]) == (0, 0.5)
    assert summary["uncut"]["answers"] == 2, "neither side was cut"
    assert summary["uncut"]["average"] == pytest.approx((2.5 + 1) / 2)
    assert summary["distinct"]["answers"] == 2, "without the answer whose branches repeat"
    assert (summary["serial_opened"], summary["serial_speed"], summary["facts"]) == (0.0, 1.0, 0.9)
    assert summary["parallel_speedup"] == lists["speedup"] and summary["parallel_ideal"] == 2.5
    assert "= parallel" in capsys.readouterr().out


def test_the_interval_is_the_bootstraps_and_always_the_same():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double().numpy()
    low, high = bench.interval(values)
    half = 1.96 * values.std() / 400 ** 0.5  # what theory says of a mean
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.01)
    assert bench.interval(values) == [low, high]


def test_sides_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or name for name in "abc"}
    seconds, results = bench.in_turn(runs, 2, "cpu", first=1)
    assert "".join(calls) == "bcacab" and results == {"a": "a", "b": "b", "c": "c"}
    assert all(s >= 0 for s in seconds.values())


def test_texts_that_repeat_each_other():
    green = "eat more green food every day"
    assert bench.alike([green, "walk", "Eat more green food, every day!"])
    assert not bench.alike([green, "sleep eight hours in a dark room", "", ""])


# ---- extraction -------------------------------------------------------------

def test_the_figures_of_the_paper_by_hand():
    """PPD over all answers, ABN over blocks, APD and APE over parallel answers."""
    # Of 20 tokens, 3 of titles; of 7 tokens, 3 of titles.
    block = Block([Branch([1, 1], [2] * 8), Branch([1], [2] * 9)])
    three = Block([Branch([1], [2]), Branch([1], [2]), Branch([1], [2, 2])])
    answers = [[[5] * 10], [[5] * 20, block], [three, [5] * 3, three]]
    speedups = [len(plain(ids)) / steps(ids) for ids in answers]
    assert bench.paper_figures(answers) == pytest.approx({
        "answers": 3, "PPD": 2 / 3, "ABN": (2 + 3 + 3) / 3, "APD": (20 / 40 + 14 / 17) / 2,
        "APE": (17 / 20 + 8 / 14) / 2, "speedup": sum(speedups) / 3, "best": max(speedups)})


def test_the_figures_of_the_paper_do_not_depend_on_order_or_number():
    """The same answers a hundred times have the same figures; of nothing, they are zeros, and a
    model may end at once, with no tokens in no steps."""
    parallel = [[5], Block([Branch([1], [0] * 40), Branch([2], [0] * 50)])]
    serial = [[1, 2, 3]]
    few = bench.paper_figures([serial, parallel, serial])
    many = bench.paper_figures([parallel, serial, serial] * 100)
    assert many == pytest.approx(few | {"answers": 300})
    assert few["best"] == len(plain(parallel)) / steps(parallel)
    assert not any(bench.paper_figures([]).values())
    empty = bench.paper_figures([[]])
    assert empty["answers"] == 1 and empty["speedup"] == empty["PPD"] == 0


def test_what_is_parallel_in_a_file(tmp_path, capsys, lm):
    """By category and over all, in the tokens of a checkpoint or of the file itself; and why the
    rest was refused."""
    records = corpus(14)
    path = write_records(tmp_path / "answers.jsonl", records)
    for folder in (tmp_path / "none", save_tiny(tmp_path / "out", lm)):
        bench.main(["--extract", str(path), "--ckpt", str(folder), "--device", "cpu"])
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("PPD", "ABN", "APD", "APE", "speedup", "best"))
        out = run(tmp_path, capsys, "--extract", path, "--ckpt", folder)
        summary = out["summary"]
        assert ("learnt" in summary["counted_in"]) == (folder.name == "none")
        assert set(summary["kinds"]) == {r["category"] for r in records}
        assert summary["all"]["answers"] == len(out["results"]) == 14
        assert summary["kinds"]["prose"]["PPD"] == 0 < summary["kinds"]["numbered"]["PPD"]
        parallel = [r for r in out["results"] if r["blocks"]]
        assert summary["all"]["PPD"] == len(parallel) / 14
        widths = [n for r in parallel for n in r["blocks"]]
        assert summary["all"]["ABN"] == pytest.approx(sum(widths) / len(widths))
        assert summary["all"]["best"] == max(r["tokens"] / r["steps"] for r in parallel)
        assert summary["refused"] and sum(summary["refused"].values()) > 0
        assert all(reason in printed for reason in summary["refused"])
    tokens = sum(len(lm.tokenizer.encode(r["response"])) for r in records)
    assert sum(r["tokens"] for r in out["results"]) >= tokens, "pieces are encoded apart"


# ---- the command line -------------------------------------------------------

def test_a_shape_takes_the_tokenizer_of_a_checkpoint(tmp_path, lm):
    """A model that never learnt to branch can be fed the tags all the same."""
    out_dir = save_tiny(tmp_path / "out", lm)
    argv = ["--shape", "tiny", "--tokenizer", str(out_dir), "--device", "cpu"]
    _, found = bench.get_model(bench.parse_args(argv), [])
    assert found.settings == lm.tokenizer.settings
    state = read_checkpoint(out_dir)
    state["config"]["positions"] = None
    save_checkpoint(out_dir, **state)
    model, _ = bench.get_model(bench.parse_args(["--ckpt", str(out_dir), "--device", "cpu"]), [])
    assert model.config.positions == "aspd"
    assert all(p.requires_grad for p in model.parameters()), "no LM has frozen it"


def test_prompts_and_corpus_of_a_checkpoint_that_guesses(tmp_path, capsys, lm):
    out_dir = save_tiny(tmp_path / "out", lm)
    settings = ("--ckpt", out_dir, "--max-new-tokens", 60)
    out = run(tmp_path, capsys, "--n", 6, *settings)
    assert bench.HEADLINES.keys() <= out["summary"].keys()
    assert out["summary"]["facts"] == out["summary"]["facts_baseline"] == 0
    assert set(out["summary"]["kinds"]) == {r["category"] for r in corpus(6, split="val")}
    for r in out["results"]:
        assert r["aspd"]["text"] == r["branchwise"]["text"]
        assert r["aspd"]["steps"] <= r["branchwise"]["steps"]
        assert r["serial"]["blocks"] == []

    path = write_records(tmp_path / "prompts.jsonl", [{"prompt": "Who?", "category": "x"}] * 3)
    out = run(tmp_path, capsys, "--prompts", path, *settings, "--limit", 2, "--baseline", out_dir)
    assert [r["category"] for r in out["results"]] == ["x", "x"]
    assert {"low", "high", "ttft", "cut_baseline", "repeats"} <= out["summary"]["all"].keys()


def test_beside_the_transformers_library(tmp_path, capsys, monkeypatch, lm):
    """Whose part our own decoding plays, of another checkpoint: so the texts are the same."""
    out_dir = save_tiny(tmp_path / "out", lm)

    class Theirs(torch.nn.Module):
        def from_pretrained(folder, dtype):
            assert (folder, dtype) == ("published", torch.float32)
            return Theirs()

        def generate(self, ids, max_new_tokens, **options):
            prompt = lm.tokenizer.decode(ids[0].tolist())[len("User: "):-len("\nAssistant:\n")]
            answer = generate(lm, prompt, "serial", max_new_tokens=max_new_tokens)
            return torch.cat([ids, torch.tensor([plain(answer.segments)])], dim=1)

    library = SimpleNamespace(AutoModelForCausalLM=Theirs)
    monkeypatch.setitem(sys.modules, "transformers", library)
    path = write_records(tmp_path / "prompts.jsonl", [{"prompt": "Who?"}, {"prompt": "And why?"}])
    argv = ["--transformers", path, "--ckpt", out_dir, "--max-new-tokens", 20]
    with pytest.raises(ValueError, match="add --published"):
        run(tmp_path, capsys, *argv)
    out = run(tmp_path, capsys, *argv, "--published", "published")
    assert out["summary"]["same_text"] == 1 and out["summary"]["ratio"] > 0
    assert [r["prompt"] for r in out["results"]] == ["Who?", "And why?"]


def test_steps(tmp_path, capsys):
    out = run(tmp_path, capsys, "--step", "--shape", "tiny", "--repeats", 1, "--contexts", 64, 32)
    widths = set(map(str, bench.WIDTHS))
    assert out["summary"]["step_ratio"]["1"] == 1
    for key in ("step_ms", "bandwidth_share"):
        assert set(out["summary"][key]) == widths
    assert {(r["context"], r["width"]) for r in out["results"]} == {
        (context, width) for context in (64, 32) for width in bench.WIDTHS}
    assert out["summary"]["step_ms"]["4"] == out["results"][2]["ms"]


def test_all_gpu_on_a_cpu(tmp_path, capsys):
    path = write_records(tmp_path / "answers.jsonl", corpus(12))
    out = run(tmp_path, capsys, "--all-gpu", path, "--shape", "tiny", "--limit", 1,
              "--contexts", 64, "--batches", 2, "--batch-size", 2)
    assert set(out["summary"]) >= {"tiny step", "tiny replay", "tiny train"}
    summary = out["summary"]["tiny train"]
    assert set(summary["tokens_s"]) == {"aspd", "serial", "bare", "untagged", "nanogpt"}
    assert 0 < summary["extra_tokens"] < 1 and summary["of_nanogpt"] > 0
    runs = [r for r in out["results"] if r["bench"] == "tiny train"]
    assert [r["batch"] for r in runs] == [0, 1]
    assert all(s > 0 for r in runs for s in r["seconds"].values())


def test_the_stand_in_for_nanogpt_is_of_equal_size_and_causal(lm):
    nano = bench.NanoGPT(lm.model)
    size = bench.count(nano) - nano.wpe.weight.numel()
    assert size == pytest.approx(bench.count(lm.model), rel=0.01)
    a = torch.arange(12)[None]
    b = torch.where(a < 6, a, a + 1)
    assert torch.allclose(nano(a)[:, :6], nano(b)[:, :6], atol=1e-6)
    assert not torch.allclose(nano(a)[:, 6:], nano(b)[:, 6:], atol=1e-3)


# ---- held-out loss ----------------------------------------------------------

def test_held_out_loss_of_both_sides(tmp_path, capsys, lm):
    """Random weights guess: both sides' loss is near log V, on the same answers."""
    path = write_records(tmp_path / "answers.jsonl", corpus(200))
    out_dir = save_tiny(tmp_path / "out", lm)
    out = run(tmp_path, capsys, "--held-out", path, "--ckpt", out_dir, "--baseline", out_dir,
              "--dtype", "float32", "--block-size", 4096)
    losses = out["summary"]["held_out_loss"]
    assert out["summary"]["answers"] > 0
    assert all(7 < losses[side] < 10 for side in ("aspd", "serial"))
    assert out["summary"]["of_serial"] == pytest.approx(losses["aspd"] / losses["serial"])
    found = {row["place"]: row for row in out["results"]}
    assert list(found) == ["outside", "titles", "first branches", "later branches", "all"]
    assert found["later branches"]["tokens"] > found["first branches"]["tokens"] > 0
    assert found["all"]["aspd"] == pytest.approx(losses["aspd"], rel=1e-5), "one answer at a time"
    parts = list(found.values())[:-1]
    assert found["all"]["tokens"] == sum(row["tokens"] for row in parts)
    assert found["outside"]["hidden"] is None and found["titles"]["hidden"] is None
    first, later = found["first branches"], found["later branches"]
    assert first["hidden"] == pytest.approx(first["serial"], rel=1e-5), "none before it to hide"
    assert later["hidden"] != pytest.approx(later["serial"], rel=1e-5)


def test_the_hidden_row_of_a_small_answer():
    ids = [[1], Block([Branch([2], [3, 4]), Branch([5], [6])]), [7]]
    row = bench.hidden_row([8, 9], ids, eos=0)
    assert row.token.tolist() == [8, 9, 1, 2, 3, 4, 5, 6, 7]
    assert row.block.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 0]
    assert row.branch.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 0]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 8]
    assert row.target.tolist() == [-100, 1, 2, 3, 4, 5, 6, 7, 0]
    assert bench.places(ids, tagged=False) == [
        "outside", "titles", "first branches", "first branches", "titles", "later branches",
        "outside"]
    assert bench.places(ids, tagged=True)[1:3] == ["titles", "titles"]


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="add --baseline"):
        bench.main(["--held-out", "x.jsonl", "--device", "cpu"])
    with pytest.raises(ValueError, match="float64"):
        bench.main(["--train", "--dtype", "float64", "--device", "cpu"])
    with pytest.raises(ValueError, match="--contexts must be 16 to"):
        bench.main(["--step", "--shape", "tiny", "--contexts", "8", "--device", "cpu"])
    path = write_records(tmp_path / "prompts.jsonl", [{"prompt": "Who?"}, {"prompt": " "}])
    with pytest.raises(ValueError, match="no prompt in the record"):
        bench.main(["--prompts", str(path), "--device", "cpu"])
    with pytest.raises(IsADirectoryError):
        bench.main(["--step", "--json", str(tmp_path), "--device", "cpu"])
