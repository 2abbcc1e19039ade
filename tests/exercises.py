"""Functions to write again, from easy to hard, and questions that are open.

    python tests/exercises.py               # lists them
    python tests/exercises.py 4             # empties the function of exercise 4
    python -m pytest -k exercise_4          # marks what you wrote in its place
    python tests/exercises.py 4 --solution  # puts the function back

An emptied function keeps its signature and its docstring, which says what goes in and what comes
out. Its file must have no uncommitted changes; nothing else in it is touched, neither now nor by
--solution, which takes the function from the last commit, and keeps yours in out-exercises/.
"""
import argparse
import ast
import difflib
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Exercise(NamedTuple):
    """A function to write again."""
    name: str    # module.function, or module.Class.method
    line: str    # what it is about
    hints: str   # what to think about
    marks: list  # the tests that mark it


EXERCISES = [
    Exercise("aspd.branch_mask", "who sees whom in a row (the paper's section 3.2)", """
        A column compared with a row is a matrix: no loop is needed. Serial tokens have block 0 and
        branch 0. What does branch 2 of a block see of branch 1 of the same block, and what of
        branch 1 of an earlier one? Keep leading dimensions: a batch of rows has one.
        """, ["test_branch_mask_equals_its_definition", "test_branch_mask_takes_a_batch"]),
    Exercise("aspd.cache_mask", "the same rule in the KV cache (section 3.4)", """
        Slots are in the order of feeding, and the branches of a block alternate in it. The row
        needs two numbers a token, block and branch. Why is one a slot enough here, and what must
        happen to it when a block ends?
        """, ["test_cache_mask_equals_its_definition", "test_the_two_masks_are_the_same_rule"]),
    Exercise("aspd.steps", "how many forward passes an answer takes (section 4.1)", """
        Count passes, not tokens. Which tags take a pass of their own, what goes into one pass
        together, and for whom does everybody wait? The engine is held to exactly your number.
        """, ["test_steps_of_the_worked_example", "test_steps_are_what_the_row_shows"]),
    Exercise("decode.grammar", "what may come next, in each of six states", """
        Even an untrained model must write a well-formed answer. No title is empty; end-of-text may
        end a branch but not a title; no text stands between two titles. A checkpoint may have no
        tags: then TEXT_ONLY is the one state it needs. A padded vocabulary has ids without a token.
        That a block has two titles at least is the engine's business: AFTER_TITLE is one state.
        The ids are in tokenizer.bytes (of text), tokenizer.stop and tokenizer.tags.
        """, ["test_grammar_allows_exactly_what_the_design_says"]),
    Exercise("decode.quota", "how branches share what is left of the budget", """
        It is asked after the titles, before <|para|> is fed. First take off what will be fed
        whatever the branches write: which tags, and which tokens a second time? Why is the rest
        divided beforehand? Think of branches that took from it as they go, in two different orders.
        """, ["test_quota_does_not_depend_on_siblings",
              "test_block_opens_as_soon_as_every_branch_is_sure_of_its_tokens"]),
    Exercise("data.collate", "rows of different lengths as one batch", """
        With padding on the right, which real token could ever see a padded one? So the mask needs
        no column for it. But what must the target of a padded token be? Its softmax must not be
        NaN either: whom does it see? And when is there no need of a mask at all?
        """, ["test_collated_rows_equal_rows_alone"]),
    Exercise("data.taken_up", "validation: does a part take up what another brings in?", """
        "2 x 15 = 30" in one part, and "30 + 40" in a later one: whoever writes the second has to
        know the first. THINGS has, for each reason, a pattern of what a part brings in, and one of
        how it is taken up. Go through the parts in their order. What of a thing that the question,
        the text above or the part's own title names? And one that is only found in its own part?
        """, ["test_dependent_parts_stay_serial_and_the_reason_is_given",
              "test_a_branch_may_rely_on_the_question_the_lead_and_the_titles",
              "test_refused_sections_may_hold_lists_that_are_independent"]),
    Exercise("train.held_out_loss", "a loss that a tagged model and its serial twin can share", """
        The two can only be compared over the same tokens: each plain token once, no tag, no
        end-of-text. Which targets of a row are these? A title stands there twice; where is it
        chosen? And the mean over all answers is not the mean of the answers' means.
        """, ["test_held_out_loss_counts_the_plain_tokens_that_the_model_chooses"]),
    Exercise("decode.sample", "a token from its logits, by one random number", """
        Go along the cumulative probabilities until they reach u. top_k comes first, then top_p:
        the fewest of the best that together reach it, one at least. Why not torch.multinomial? With
        it, what a branch draws would depend on how many branches drew before. u is over 0: mind
        tokens of probability 0 all the same, and a temperature so small that logits / temperature
        overflows in float32. And without top_k and top_p nothing needs to be sorted.
        """, ["test_sample_draws_with_the_right_frequencies",
              "test_each_row_is_sampled_with_its_own_number",
              "test_greedy_is_the_best_token_and_the_limit_of_a_low_temperature",
              "test_limit_of_a_high_temperature_is_any_allowed_token_alike"]),
    Exercise("data.make_titles", "the fewest words that tell a branch what it is about", """
        Every title token is a step in which nothing else is written. A title is how a part starts,
        its marker included, so that the branch can go on from it: take the fewest words with which
        no other part starts. The first line alone counts, and of it 80 characters.
        """, ["test_title_is_the_fewest_words_that_tell_the_part_apart",
              "test_titles_are_short"]),
    Exercise("aspd.layout", "one row for training and decoding (sections 3.2 and 3.3)", """
        Keep what `python aspd.py` prints before you start. List the tokens that the engine forces:
        they are never a target. Every other token of the answer is the target of the one before
        it. Why is that one always of the same stream? A loop over pieces is enough, none over
        tokens. Where does each branch start, and where does the text behind them go on?
        """, ["test_layout_is_the_table_of_the_design", "test_layout_equals_a_loop_over_tokens",
              "test_layout_of_adjacent_blocks_and_of_a_bare_block",
              "test_serial_row_needs_no_tags_and_is_the_tokens_one_after_the_other"]),
    Exercise("decode.Engine.branches", "all branches of a block, a token of each a pass", """
        One pass feeds <|para|> and all prefixes, and chooses a token for every branch; then each
        pass feeds one token of every live branch. <|/branch|> is fed like any other token, and what
        is chosen after it counts for nothing. In mode branchwise one branch follows the other, and
        nothing else may differ. Afterwards: whose are the slots, where does the serial stream go
        on, and what is left of the budget?
        """, ["test_engine_asks_in_the_state_of_the_grammar",
              "test_end_of_text_in_a_branch_ends_that_branch_alone",
              "test_quota_does_not_depend_on_siblings", "test_forced_tokens"]),
]

QUESTIONS = """
Open questions: there is no right answer, but a measurement that judges yours.

Longer titles. A title token is a serial step, but a branch that does not know what it is about
    goes wrong. Let make_titles in data.py take whole labels, up to their colon. Judge: the ideal
    speedup of `python data.py FILE`; then, trained anew on answers of a chat model, the held-out
    loss in later branches: `python tests/bench.py --held-out FILE --baseline base`.

Another language. The patterns that read words (CONCLUSION, POINTS, INSTRUCTION, HANDED_ON) know
    English, and a little Chinese. Label the blocks of a hundred answers in yours, and write the
    patterns on one half. Judge: precision and recall on the other half.

When a block pays. From `steps` alone: n branches have titles of t tokens and r tokens after them.
    From which r on does their block take fewer passes than it has plain tokens? Why does t not
    matter, and why should titles be short all the same? Judge your formula for n = 4, t = 1, r = 9:
    `python -c "from aspd import *; print(steps([Block(4 * [Branch([0], 9 * [0])])]))"`

Positions. Siblings share theirs, and the text behind a block goes on after their sum. Add a third
    entry to POSITIONS, say min. Which positions of a row change, and does a token now
    share one with another that it sees? The engine needs no change: `python -m pytest -k
    test_cached_parallel` must pass. Judge: the held-out loss of `python train.py --positions NAME`
    and of `--positions longest`, three seeds each, and the facts in `python tests/bench.py`. Are
    the differences larger than those between seeds?

Another chain. Running sums look like a list, but each line needs the one before. Add a kind like
    that to FORMS in data.py which has no sums in it: a route, a recipe, a family tree. Judge: does
    a rule refuse it in `python data.py --show 12`, and which one? Trained anew, does the model keep
    it serial: the column `par.` of `python tests/bench.py`?

No repeated title. A branch begins with its title once more, though the title stands before the
    block. Let <|branch|> alone be the prefix, in layout, steps and Engine. What must then tell a
    branch which one it is, since all of them start at one position and see the same? Judge:
    `python -m pytest -k one_masked_forward`; then, trained anew, the passes and the facts in
    `python tests/bench.py --baseline base`, beside those of the repeated titles.

Two answers in one cache. `owner` hides branches from each other: let it hide two whole answers,
    one slot after the other in turn, so that every pass feeds a token of each. What is shared
    between them, where do their positions start, and what must `owner` be in a block of one of
    them? Judge: each is, token for token, what `python decode.py --mode serial --dtype float64
    --prompt TEXT` says to its prompt alone, and both together take the passes of the longer one.

Several answers at once. Give the cache and the engine a batch dimension: while one answer is
    serial, another is in a block. Judge: in float64 every answer is, token for token, the one
    decoded alone; tokens a second of 1, 2, 4 and 8 answers together, beside the same batch in mode
    serial. From how many answers on do branches gain nothing?

Nested blocks. Let a list inside an item become a block within its branch: in extract, layout, both
    masks and the engine. Judge: the ideal speedup of `python data.py FILE`, and two tests of
    tests/test_engine.py, carried over to trees: decoding equals one masked forward pass, and
    adaptive equals branchwise.

Branches that see what their siblings have written so far, as in Group Think and Hogwild! Inference.
    What must change in branch_mask (which tokens of a sibling were there first?), in cache_mask (is
    a smaller slot still an earlier step?) and in the positions, which siblings share? One of two
    tests must fall: decoding equals one masked forward pass, or adaptive equals branchwise?
    Judge: the other one, which must hold; then, trained anew with `THINGS = []` in data.py, so that
    the running sums are blocks, the facts in them.

No validation. Accept every list, whether or not its parts rely on each other: in data.py, let
    `THINGS = []`, and let refusal() know its first two reasons alone. Train again. Judge: the facts
    in tests/bench.py, kind by kind, beside those of a model trained with all the rules. Are the
    running sums all that suffers?
"""


# ---- a function in its file -------------------------------------------------

def check(ok, message):
    """As in aspd.py, which may be what is being written."""
    if not ok:
        raise ValueError(message)


def find_function(lines, name):
    """-> where a function (or Class.method) starts in a file's lines, and the line after its last.
    By indentation, for what a student has written need not be Python yet."""
    start = -1
    margin = -4
    for part in name.split("."):
        margin += 4
        opening = re.compile(rf" {{{margin}}}(def|class) {part}\b")
        found = [i for i in range(start + 1, len(lines)) if opening.match(lines[i])]
        check(found, f"{name} is not there any more: see git diff")
        start = found[0]
    end = start + 1
    for i in range(end, len(lines)):
        text = lines[i].lstrip()
        if len(lines[i]) - len(text) > margin and text:
            end = i + 1
        elif text and text[0] not in "#)":  # the ) of a signature
            break
    while lines[start - 1].startswith(" " * margin + "@"):
        start -= 1
    return start, end


def emptied(source, name):
    """A file's text with `return None`, and not an error, for the body of a function: the tests
    shall look at what it gives."""
    lines = source.split("\n")
    start, end = find_function(lines, name)
    function = ast.parse(textwrap.dedent("\n".join(lines[start:end]))).body[0]
    docstring = function.body[0]
    margin = re.match(" *", lines[start])[0]
    body = start + docstring.end_lineno
    lines[body:end] = [margin + "    return None"]
    return "\n".join(lines)


def put_back(source, committed, name):
    """-> a file's text with a function as it was committed, and the difference in lines."""
    lines = source.split("\n")
    start, end = find_function(lines, name)
    old = committed.split("\n")
    solution = old[slice(*find_function(old, name))]
    difference = difflib.unified_diff(lines[start:end], solution, "yours", "solution", lineterm="")
    return "\n".join(lines[:start] + solution + lines[end:]), list(difference)


# ---- the command line -------------------------------------------------------

def git(*args):
    """What a git command prints. ValueError where it fails."""
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True)
    except FileNotFoundError:
        raise ValueError("the exercises need git") from None
    check(done.returncode == 0, f"git: {' '.join(done.stderr.decode().split())}")
    return done.stdout.decode()


def show_all():
    """Prints the list, at once, so that `| head` may close its end."""
    lines = ["Exercises, from easy to hard: `python tests/exercises.py N` empties the function.\n"]
    for n, exercise in enumerate(EXERCISES, start=1):
        module, function = exercise.name.split(".", 1)
        lines.append(f"{n:>3}  {function:<20}{module + '.py':<11}{exercise.line}")
    print("\n".join([*lines, QUESTIONS]), end="")


def show(n, exercise, where):
    """Prints what to do, once the function is empty."""
    hints = textwrap.dedent(exercise.hints).strip()
    print(f"Exercise {n}: {where}: {exercise.line}\n\n"
          f"Only its signature and its docstring are left: write it anew. Think about this.\n\n"
          f"{textwrap.indent(hints, '    ')}\n\n"
          f"Mark it:           python -m pytest -k exercise_{n}\n"
          f"Stuck? Its tests:  {(chr(10) + 19 * ' ').join(exercise.marks)}\n"
          f"Put it back:       python tests/exercises.py {n} --solution   # and compare with yours")


def main():
    """The command line. ValueError where it cannot be done."""
    p = argparse.ArgumentParser(description="Exercises: lists them, or empties a function.")
    p.add_argument("number", nargs="?", metavar="N", help="empty the function of this exercise")
    p.add_argument("--solution", action="store_true", help="put it back, as last committed")
    args = p.parse_args()
    if args.number is None and not args.solution:
        return show_all()
    numbers = {str(n): n for n in range(1, len(EXERCISES) + 1)}
    check(args.number in numbers, f"exercises are numbered 1 to {len(EXERCISES)}: which one?")
    n = numbers[args.number]
    exercise = EXERCISES[n - 1]
    module, name = exercise.name.split(".", 1)
    path = ROOT / f"{module}.py"
    source = path.read_bytes().decode()
    if args.solution:
        new, difference = put_back(source, git("show", f"HEAD:./{path.name}"), name)
        if difference:
            kept = ROOT / "out-exercises" / f"{n}.py"
            kept.parent.mkdir(exist_ok=True)
            lines = source.split("\n")
            yours = lines[slice(*find_function(lines, name))]
            kept.write_bytes("\n".join([*yours, ""]).encode())
            difference.append(f"\nYours is kept in out-exercises/{kept.name}.")
        path.write_bytes(new.encode())
        print("\n".join(difference or [f"{name} in {path.name} was as last committed."]))
        return
    check(not git("status", "--porcelain", "--", path.name),
          f"{path.name} has uncommitted changes: put back the exercise that is open (its number and "
          "--solution; what you wrote is kept), and commit edits of your own")
    new = emptied(source, name)
    check(new != source, f"{name} is empty in the last commit: nothing could put it back")
    path.write_bytes(new.encode())
    start, _ = find_function(new.split("\n"), name)
    show(n, exercise, f"{name} in {path.name}, line {start + 1}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, SyntaxError) as e:
        print("error:", e, file=sys.stderr)
        sys.exit(2)
