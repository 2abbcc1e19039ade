"""From answers to batches: extraction of parallel parts, rows, loading, tokenizers, the corpus.

    python data.py                                # what is parallel in the built-in corpus
    python data.py FILE --show 3 --out OUT.jsonl  # in a file of answers; shows three, writes all
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch.nn import functional as F
from tqdm import tqdm

from aspd import (IGNORE, MAX_BRANCHES, BadInput, Block, Branch, Tags, branch_mask, check, join,
                  layout, naming, plain, steps, tokenize)

# ---- extraction: the outline of an answer -------------------------------------
# Some lines open a part: a heading, a bold label, a list item. Parts of one level that follow each
# other are a run of siblings. From the top down, a run becomes a block, or a rule says why it must
# not: a branch may rely on the question, on the text before its block and on all titles, but not on
# what a sibling says. Then the parts of the refused run are looked into in the same way.

NUMBER = r"(?:\d{1,9}|[IVX]{1,5})[.)](?!\d)"  # "3.", "12)", "IV."; not "1.5"
LEVELS = [re.compile(pattern, re.M) for pattern in [
    # What opens a part, the outermost level first. A pattern sees a line and the line below it.
    # "# Body" above a blank line (\Z is the end of the two lines) or above "## Head". Right above
    # any other line "# x" is rather a comment in code without a fence.
    r"#[ \t]+\S.*$\s*(?:\Z|##)",
    *["#" * n + r"[ \t]+\S" for n in range(2, 7)],                 # "## Body", "### Body", ...
    r"\w.*\n---+[ \t\r]*$",                                       # "Body" above "----"
    r"\*\*[^*\s][^*\n]*\*\*[:：]?[ \t\r]*$",                       # "**Body**" alone on its line
    r"\*\*[^*\s][^*\n]*(?:[:：]\*\*|\*\*[:：])",                   # "**Body:** Walk daily."
    r"(?:One|Another) |(?:First|Second|Third|Fourth|Fifth)(?:ly)?,",  # "One way is ...", "First, "
    r"[ \t]*(?:\*\*)?" + NUMBER,                                   # "2. Walk daily."
    r"[ \t]*[-*+•][ \t]+\S",                                       # "- Walk daily."
]]
OPAQUE = [(re.compile(opening), closing) for opening, closing in [
    # What is never cut: how its first line begins, and what ends it. (?!...): not on the same line.
    (rf"\s*(?:(?:[-*+•]|{NUMBER})\s*)?`{{3,}}[^`]*$", r"^\s*`{3,}\s*$"),  # code, also in an item
    (r"\s*<pre\b(?!.*</pre>)", r"</pre>"),
    (r"(?i)\s*#\+begin_", r"(?i)#\+end_"),          # code in Org mode
    (r"\s*<think>(?!.*</think>)", r"</think>"),     # reasoning
    (r"\s*\$\$(?!.*\$\$)", r"\$\$"),               # formulas
    (r"\s*\\\[(?!.*\\\])", r"\\\]"),
    (r"\s*\\begin\{(?!.*\\end\{)", r"\\end\{"),
]]
MARKER = re.compile(rf"\W*(?:{NUMBER})?\W*")  # what a part opens with: "- ", "2. **"
# A part or paragraph that needs the ones before it, for it sums them up or works on them.
CONCLUSION = re.compile(
    r"(?i)(?:In )?(?:Summary|Conclusion)|(?:Key )?Takeaway|Bottom Line|In (?:short|essence),"
    r"|(?:Overall|Therefore|Ultimately)\b|Verse \d|Chorus|总结|综上|总之"
    # These only where the title ends: "Steps:", "Steps to Sew It:", not "Steps of the temple:".
    r"|(?:(?:Step-by-Step )?Instructions|Directions|Method|Procedure|Steps(?: to .{,60})?"
    r"|(?:What|How) to (?:Do|Make)(?: It)?|Explanation|Solution|Comparison|Total|Output|Answer"
    r"|Results?|Critique|Pass [2-9]"
    r"|(?:Final|Revised|Corrected|Edited|Shortened|Refactored)(?: \w+)?)[ \t\r]*[:*\n(]")


class Mark(NamedTuple):
    """What a line is in the outline. Siblings have equal Marks."""
    what: str  # part (it opens one), text, conclusion (a part or text that sums up: "## Summary",
    #            "Overall, ..."), blank, end
    rank: tuple = (99,)  # (depth of indentation, level): the smaller, the further out; 99: no part


END = Mark("end", ())  # () is smaller than any rank: further out than any part


def bare(text):
    """A part without its marker."""
    return text[MARKER.match(text).end():]


def hide_opaque(lines):
    """The lines, but "" for each line of an opaque region below the one that opens it. A region
    that nothing ends lasts to the end of the text."""
    # All up to </think> is reasoning: its <think> may stand in the prompt.
    closing = "</think>" if any("</think>" in line for line in lines) else None
    shown = []
    for line in lines:
        shown.append("" if closing else line)
        if closing:
            closing = None if re.search(closing, line) else closing
        else:
            closing = next((end for opening, end in OPAQUE if opening.match(line)), None)
    return shown


def read_mark(line, below):
    """The Mark of a line. below: the line below it."""
    if not line.strip("-=*_ \t\r\n"):  # a rule of dashes is blank, too
        return Mark("blank")
    concludes = CONCLUSION.match(bare(line))
    indent = line[:len(line) - len(line.lstrip())].expandtabs(4)  # two columns are one depth
    for level, pattern in enumerate(LEVELS):
        if pattern.match(line + below):
            return Mark("conclusion" if concludes else "part", (len(indent) // 2, level))
    return Mark("conclusion" if concludes else "text")


def is_heading(mark):
    """Of a line that opens a part: is it of any level but the last two, those of list items?"""
    return mark.rank[1] < len(LEVELS) - 2


def paragraphs(marks, start, end):
    """The lines where the paragraphs of a part start: text below a blank line."""
    text = (Mark("text"), Mark("conclusion"))  # not "## Summary", whose rank is a heading's
    return [k for k in range(start + 1, end) if marks[k - 1].what == "blank" and marks[k] in text]


def find_run(marks, first):
    """The run of siblings that opens at a line: the lines where its parts start, and the line
    behind the last one.

    Where does a part end, if no sibling opens? A guess that is nearly always right: none has more
    paragraphs than the first one, except below a heading, where one is always allowed. The first
    item of "- Walk.\\n- Sleep.\\n\\nGood luck!" has none, so "Good luck!" is not the second one's.
    """
    run = [first, part_end(marks, first, math.inf)]  # no limit for the first part
    at_least = 1 if is_heading(marks[first]) else 0
    most = max(len(paragraphs(marks, first, run[1])), at_least)
    while marks[run[-1]] == marks[first]:
        run.append(part_end(marks, run[-1], most))
    return run


def part_end(marks, start, most):
    """The line behind the part that opens at line `start`: where the next of its level opens, or
    one further out. An item or a last section ends before a conclusion, and after `most`
    paragraphs."""
    end = next(k for k in itertools.count(start + 1) if marks[k].rank <= marks[start].rank)
    if is_heading(marks[start]) and marks[end] == marks[start]:
        return end  # it is not the last section
    for n, k in enumerate(paragraphs(marks, start, end)):
        if n >= most or marks[k].what == "conclusion":
            return k
    return end


# ---- extraction: titles and rules ---------------------------------------------

TOKEN_LIKE = re.compile(r"[一-鿿ぁ-ヿ]|[^\s:：*一-鿿ぁ-ヿ]+")  # a CJK sign or a word


def make_titles(parts):
    """A title for each part: the fewest words of its first line that are its own.

    "1. Ripe red apples", "2. Ripe green apples" -> "1. Ripe red", "2. Ripe green"
    """
    openings = []  # of each part: its first line up to the first word, up to the second, ...
    for part in parts:
        line = part[:80].split("\n")[0].rstrip()
        words = list(TOKEN_LIKE.finditer(line, MARKER.match(line).end()))[:16]
        openings.append([line[:word.end()] for word in words] or [line])
    count = Counter(bare(opening).lower() for some in openings for opening in some)
    titles = []
    for candidates in openings:
        own = [opening for opening in candidates if count[bare(opening).lower()] == 1]
        titles.append(own[0] if own else candidates[-1])
    return titles


def make_block(parts, titles):
    """The Block of parts that follow each other. White space between two parts opens the title of
    the second one; that behind the last part is not in the block."""
    size = math.ceil(len(parts) / MAX_BRANCHES)  # neighbours that share a branch and its title
    block = Block()
    space = ""
    for i in range(0, len(parts), size):
        text = "".join(parts[i:i + size])
        end = len(text.rstrip())
        block.append(Branch(space + titles[i], text[len(titles[i]):end]))
        space = text[end:]
    return block


POINTS = re.compile(  # "As a result, ..." goes on from a sibling; "go back to step 1" names it
    r"\A(?:However|Thus|Then|These|Those|As a result|If (?:yes|no|so))\b|\A(?:Next|Also),"
    r"|[a-z,(] [Ss]teps? \d|\bprevious step")
# An instruction of a chain: "Step 1: ...", "1. **Peel the apples**: ...", or without a label, "1.
# Preheat the oven.", but not "1. Heat the oven: ..." or, one way of several, "1. Using the train".
INSTRUCTION = re.compile(
    rf"\W*Step \d|[\s#*]*{NUMBER} +(?:\*\*[A-Z][a-z]+ [Tt]he "
    r"|(?:Bring|[A-Z][a-z]+(?<!ing)) (?:(?:in|to|up) )*(?:the|an?|your) (?![^.\n]*: ))")
# A numbered part that leaves a thing to the next one or takes it from the last: "Set it aside.",
# "Pour the egg mixture into the pan."; and what is only said in such a chain, "Rinse the rice."
HANDED_ON = re.compile(rf"\W*{NUMBER}[\s\S]*\b(?:[Tt]he (?:\w+ )?mixture\b|[Ss]et (?:\w+ )?aside"
                       r"[.,]|(?:Preheat|Knead|Rinse|Simmer) )")
CHAIN = "is a chain of instructions"
# "What You Need: ...", with a sibling that has steps, "1. ...", to use it.
NEEDS = re.compile(r"(?i)(?:Ingredients|Materials|Supplies|Prerequisites|What You.{,9} Need)\b")
MIN_SAVED = 6                                       # fewer passes saved are not worth a block
LABEL = re.compile(r"[^:：\d\n]{1,40}[:：]")          # "Ann:"
VALUE = r"\d[\d,.]*\d"                              # two digits or more: one may be by chance
# "= 142" or "= **142**"; of "= 142 + 1" neither 142 nor its 14
RESULT = rf"[=≈][ *]*\$?({VALUE})(?![\d,.]*\d)(?! *[-+/]| \*)"
NAME = r"\b(?:[a-z]+_|[a-z]{2,}[A-Z])[a-z]\w*"      # user_name, jobStart; not iPhone
# "Week 2", "Case B"
COUNTED = r"\b(?i:case|day|week|phase|part|section|lemma|example|method|option) (?:\d+|[A-HJ-Z]\b)"
THINGS = [  # a reason to refuse; what one part brings in, and how a later one takes it up
    ("uses a value worked out in a sibling", RESULT, VALUE),
    ("uses a name of a sibling", NAME, NAME),
    ("names a sibling by its number", COUNTED, COUNTED),
]


def take_turns(texts):
    """Does one of several labels come again? "Ann: ...", "Ben: ...", "Ann: ..." is a dialogue."""
    labels = Counter(m[0] for m in map(LABEL.match, texts) if m)
    return len(labels) > 1 and max(labels.values()) > 1


def things(pattern, text):
    """What a pattern finds in a text, a set. "Week 2" is "week 2", too."""
    return {thing.lower() for thing in re.findall(pattern, text)}


def taken_up(parts, titles, above):
    """Why the parts must not become a block: one brings in a thing that a later one takes up. None
    if there is no such thing. above: the prompt, and the answer up to the first part; what it names
    may be used by all.

    "1. The room has 4 * 6 = 24 square metres.", "2. For 24 square metres, buy paint."
    """
    for reason, brings, takes in THINGS:
        known = things(takes, above)
        brought = set()
        for part, title in zip(parts, titles):
            taken = things(takes, part[len(title):])  # in its title a part may name itself
            if taken & (brought - known):
                return reason
            brought |= things(brings, part)
    return None


def refusal(parts, titles, block, above):
    """Why the parts must not become this block; None if nothing speaks against it. above: see
    taken_up()."""
    words = tokenize([block], TOKEN_LIKE.findall)  # in place of tokens
    if len(plain(words)) - steps(words) < MIN_SAVED:
        return "saves too few steps"
    if len({bare(title).lower() for title in titles} - {""}) < len(titles):
        return "titles are not distinct"
    texts = [bare(part) for part in parts]
    if any(POINTS.search(text) for text in texts):
        return "points at a sibling"
    others = [text for text in texts if not NEEDS.match(text)]  # siblings of a list of things
    if len(others) < len(texts) and any(re.search(r"\n\W{,9}1[.)] ", text) for text in others):
        return "uses what a sibling lists"
    if take_turns(texts):
        return "is a dialogue"
    instructions = [part for part in parts if INSTRUCTION.match(part)]
    if 2 * len(instructions) >= len(parts) or any(map(HANDED_ON.match, parts)):
        return CHAIN
    return taken_up(parts, titles, above)


def extract(text, prompt=""):
    """An answer -> its segments (str or Block), and the refused runs as (reason, first character).
    Joined, the segments are the text, whatever it is; none is empty."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    shown = hide_opaque(lines)
    marks = [*map(read_mark, shown, [*shown[1:], ""]), END]
    start = [0, *itertools.accumulate(map(len, lines))]  # of each line in the text
    segments = []
    refusals = []
    done = 0  # characters that are in segments
    for i in range(len(lines)):
        if marks[i].what != "part" or start[i] < done:
            continue
        run = find_run(marks, i)
        if len(run) < 3:  # fewer than two parts
            continue
        bounds = [start[line] for line in run]
        parts = [text[a:b] for a, b in zip(bounds, bounds[1:])]
        titles = make_titles(parts)
        block = make_block(parts, titles)
        reason = refusal(parts, titles, block, prompt + "\n" + text[:bounds[0]])
        if reason:
            refusals.append((reason, bounds[0]))
            # These lines open no part any more, but still end those inside of the part before.
            # Inside of a chain of instructions no line opens one, either: lists there are chains.
            closed = range(i, run[-1]) if reason == CHAIN else run[:-1]
            for line in closed:
                marks[line] = END
        else:
            segments += [text[done:bounds[0]], block]
            done = bounds[0] + len(join([block]))
    segments.append(text[done:])
    return [segment for segment in segments if segment], refusals


# ---- rows and batches -------------------------------------------------------

def split_held_out(records):
    """-> (train, held out): the answers to every 50th prompt, in alphabetical order. At least one
    prompt is held out where there are two, none where there is one."""
    held = set(sorted({r["prompt"] for r in records})[1::50])
    train = [r for r in records if r["prompt"] not in held]
    return train, [r for r in records if r["prompt"] in held]


def make_rows(records, tokenizer, config):
    """Answers -> a list of Rows, without those whose tagged row exceeds the context. Where
    config.positions is None, the rows are those of the plain answers; the same are left out, so
    that the two models can be compared."""
    positions = config.positions or "aspd"
    rows = []
    for r in tqdm(records, desc="tokenizing", leave=False, disable=None):
        prompt = tokenizer.prompt(r["prompt"])
        segments, _ = extract(r["response"], r["prompt"])
        ids = tokenize(segments, tokenizer.encode)
        row = layout(prompt, ids, tokenizer.eos, tokenizer.tags, positions)
        if len(row.token) > config.block_size:
            continue
        if config.positions is None:
            row = layout(prompt, [tokenizer.encode(r["response"])], tokenizer.eos)
        rows.append(row)
    return rows


def batches(rows, batch_size, seed):
    """Endlessly yields batches, lists of rows, in a new seeded order every epoch. Rows of a batch
    are of like length, so that little is padded, but not always the same ones."""
    for epoch in itertools.count():
        rng = random.Random(f"{seed} {epoch}")
        order = sorted(rows, key=lambda row: len(row.token) * rng.uniform(1.0, 1.2))
        chunks = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(chunks)
        yield from chunks


def collate(rows, device="cpu"):
    """Rows -> (token, position, mask, target), padded on the right to a multiple of 16, so that few
    shapes occur: torch sets kernels up for each.

    token, position, target: (B, T). mask: (B, 1, T, T) bool."""
    T = math.ceil(max(len(row.token) for row in rows) / 16) * 16

    def padded(name, fill=0):
        columns = [F.pad(getattr(r, name), (0, T - len(r.token)), value=fill) for r in rows]
        return torch.stack(columns).to(device)

    mask = branch_mask(padded("block"), padded("branch"))
    return padded("token"), padded("position"), mask[:, None], padded("target", IGNORE)


# ---- loading ----------------------------------------------------------------

LAYOUTS = ('{"prompt", "response"}, {"instruction", "input", "output"}, '
           '{"conversations": [{"from", "value"}]}, {"messages": [{"role", "content"}]}')
USERS = ("user", "human")
ASSISTANTS = ("assistant", "gpt", "chatgpt", "model")
MORE = ("history", "tool_calls", "function_call")  # what none of the LAYOUTS has a place for
FLAGS = ("weight", "loss", "train", "label", "kto_tag")  # of other trainers; 0: not to be learnt


def read_objects(path):
    """Yields the records of JSON Lines or of a JSON array, as dicts. BadInput with the place."""
    with naming(path):
        text = Path(path).read_text("utf-8-sig")
        is_array = text.lstrip().startswith("[")
        parts = json.loads(text) if is_array else filter(str.strip, text.split("\n"))
    for n, part in enumerate(parts, start=1):
        with naming(f"{path}, record {n} (JSON Lines has one object a line)"):
            record = part if is_array else json.loads(part)
            check(isinstance(record, dict), f"expected an object, not {type(record).__name__}")
        # null and NaN, which tables write, mean "not given"
        yield {name: v for name, v in record.items() if v is not None and v == v}


def is_to_learn(fields):
    """Of a record or a turn. No, if a flag says so (a class that is called "label" passes for one),
    if it is in another channel than the final one (reasoning, for one), or has MORE than text."""
    is_answer = fields.get("channel") in (None, "final") and not any(map(fields.get, MORE))
    return is_answer and 0 not in [fields.get(flag, 1) for flag in FLAGS]


def read_turns(record):
    """The turns of a record as [(role, text)]; none where it is in none of the LAYOUTS."""
    match record:
        case {"prompt": prompt, "response": answer}:
            return [("user", prompt), ("assistant", answer)]
        case {"instruction": prompt, "output": answer}:
            more = [("user", record["input"])] if str(record.get("input", "")).strip() else []
            return [("user", prompt), *more, ("assistant", answer)]
    turns = []
    for turn in record.get("conversations") or record.get("messages") or []:
        role = str(turn.get("from") or turn.get("role")).strip().lower()
        if role in ASSISTANTS and not is_to_learn(turn):
            role += " (not to be learnt)"  # unknown to read_answers(), which so counts it
        turns.append((role, turn.get("value") or turn.get("content")))
    return turns


def read_answers(record, left_out):
    """Yields (prompt, answer) for every answer that follows a user's turn. The prompt is what the
    user has said since the last answer, without what was before that. Counts in left_out, by
    reason, what yields none."""
    if not is_to_learn(record):
        left_out["record that is not to be learnt"] += 1
        return
    turns = read_turns(record)
    prompt = ""
    for role, text in turns:
        has_text = isinstance(text, str) and text.strip()
        if role in USERS and has_text:
            prompt = f"{prompt}\n\n{text}" if prompt else text
        elif role in ASSISTANTS and has_text and prompt:
            yield prompt, text
            prompt = ""
        elif role != "system":
            prompt = ""
            left_out[f"{role:.40} turn {'out of place' if has_text else 'without text'}"] += 1
    if prompt or all(role == "system" for role, _ in turns):
        left_out[f"record that ends without an answer ({', '.join(record):.80})"] += 1


def read_records(path):
    """The {"id", "prompt", "response", ...} of every answer of a file, a list; the record's own id,
    or its number, from 0. Says on stderr what was left out. BadInput for a file without an answer,
    and for what is not JSON."""
    records = []
    left_out = Counter()
    for n, r in enumerate(read_objects(path)):
        with naming(f"{path}, record {n + 1}"):
            for prompt, response in read_answers(r, left_out):
                records.append({"id": n, **r, "prompt": prompt, "response": response})
    reasons = ", ".join(f"{n} x {reason}" for reason, n in left_out.most_common(10))
    check(records, f"{path}: no usable answers ({reasons or 'no records'}); read are {LAYOUTS}")
    if left_out:
        tqdm.write(printable(f"{path}: left out: {reasons}"), file=sys.stderr)
    return records


def write_text(path, text):
    """Writes a file; surrogates, which UTF-8 lacks, are escaped. BadInput with its name."""
    with naming(f"cannot write {path}"):
        Path(path).write_text(text, "utf-8", "backslashreplace")


def printable(text):
    """Text for a terminal: control characters, which could steer it, and surrogates escaped."""
    unsafe = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(unsafe, lambda c: c[0].encode("unicode_escape").decode(), text)


def cli(main):
    """Runs a command line's main(). Bad input: one clear line on stderr and exit code 2. Ctrl-C,
    SIGTERM and SIGHUP: what stands in main()'s `finally` is done; exit code 130."""
    if os.name == "posix":
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(141)  # a quiet end behind `| head`, as SIGPIPE would make it
    except (BadInput, OSError) as e:
        print("error:", printable(" ".join(str(e).split())), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- the tokenizer: byte-level BPE, computed by tiktoken --------------------

# Cuts text into words, which are encoded apart; for `re` and for tiktoken alike.
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
CHAT = ["User: {prompt}\nAssistant:\n"]


class Tokenizer:
    """Text <-> ids; no text ever becomes a special token.

    pattern: cuts text into words, which are encoded apart.
    ranks: {a token's bytes: its id, which is also its merge priority}.
    eos: the id that ends an answer. stop: more that do.
    tags: the six ids of TAG_NAMES.
    chat: what surrounds a prompt, a list of texts, one of them with {prompt}, and special ids."""

    def __init__(self, pattern, ranks, eos, tags, stop=(), chat=CHAT):
        self.settings = {"pattern": pattern, "ranks": ranks, "eos": eos, "tags": tags,
                         "stop": stop, "chat": chat}  # plain values, for a checkpoint
        self.eos = eos
        self.tags = Tags(*tags)
        self.stop = {eos, *stop}
        self.chat = chat
        self.bpe = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bytes = {i: token for token, i in ranks.items()}
        self.vocab_size = max(*self.bytes, *self.stop, *tags) + 1

    def encode(self, text):
        """str -> list of ids. What UTF-8 cannot write becomes U+FFFD."""
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):
        """List of ids -> str; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

    def prompt(self, text):
        """A user's text in the model's own chat form -> list of ids."""
        ids = []
        for part in self.chat:
            ids += [part] if isinstance(part, int) else self.encode(part.format(prompt=text))
        return ids


def learn_tokenizer(texts, vocab_size=2048):
    """A Tokenizer of the 256 bytes and the commonest words of the first 4,000 texts. No merges are
    learnt: tiktoken looks a word up whole first. An unknown one starts as bytes, and neighbours
    merge only where the result is itself a token."""
    texts = itertools.islice(texts, 4000)
    counts = Counter(itertools.chain.from_iterable(re.findall(PATTERN, text) for text in texts))
    words = [word.encode("utf-8", "replace") for word, _ in counts.most_common(vocab_size - 256)]
    tokens = dict.fromkeys([bytes([b]) for b in range(256)] + words)  # each once
    ranks = {token: i for i, token in enumerate(tokens)}
    eos, *tags = range(len(ranks), len(ranks) + 7)
    return Tokenizer(PATTERN, ranks, eos, tags)


# ---- the built-in corpus ----------------------------------------------------
# Chat answers from one small table of facts, to watch a model learn when to open a block, and to
# mark what it says. To "Write a numbered list of bears and goats.":
#
#     One by one:
#
#     1. **Bears**: Bears weigh about 300 kg and can live for ... Bears live in thick forests ...
#     2. **Goats**: Goats weigh about 60 kg and can live for ... Goats live on steep rocks ...
#
#     Overall, goats are the lightest and bears the heaviest.

ANIMALS = [line.split("|") for line in """\
Bears|300|25|in thick forests of the far north|berries, roots, fish and honey
Camels|600|40|in hot deserts with little water|dry grass, thorns and salty leaves
Elephants|5000|65|in open country near wide rivers|bark, fruit and a lot of grass
Foxes|6|5|in woods, fields and quiet gardens|mice, birds, eggs and fallen apples
Goats|60|15|on steep rocks high in the mountains|herbs, moss and very short grass
Hippos|1500|45|in slow rivers and muddy lakes|soft grass that they find at night
Lions|190|13|on warm plains with long yellow grass|zebras, antelopes and young giraffes
Wolves|40|8|in cold hills and snowy forests|deer, hares and now and then a sheep
""".splitlines()]
SIZE = "{0} weigh about {1} kg and can live for about {2} years in the wild."
LIFE = "{0} live {3}, where they eat {4}."
FORMS = {  # what a prompt calls it; how it opens; how each thing is told, for draw() to fill in
    "numbered": ("a numbered list of", "One by one:\n\n", f"{{i}}. **{{0}}**: {SIZE} {LIFE}\n"),
    "bulleted": ("bullet points on", "Facts:\n\n", f"- **{{0}}**: {SIZE} {LIFE}\n"),
    "headed": ("a guide to", "A short guide:\n\n", f"### {{0}}\n\n{SIZE} {LIFE}\n\n"),
    "nested": ("a fact sheet on", "In notes:\n\n", f"- **{{0}}**\n  - {SIZE}\n  - {LIFE}\n"),
    "prose": ("a paragraph about", "", f"{SIZE} {LIFE} "),
    "sums": ("a running sum of", "Day by day:\n\n", "- Day {i} of {0} makes {1} + {2} = {3} km.\n"),
}
ASKS = ("Write {} {}.", "Give me {} {}.", "Can you make {} {}?")


def draw(kind, rng):
    """-> (what an answer is about, how many things those are, the answer)."""
    _, opening, thing = FORMS[kind]
    if kind == "sums":  # every line needs the one before, so they must stay serial
        km = rng.randint(10, 20)
        days = rng.randint(3, 8)
        about = f"{km} km a day for {days} days"
        rows = [(days, km * day, km, km * (day + 1)) for day in range(days)]
        conclusion = f"In all, that is {km * days} km."
    else:
        rows = sorted(rng.sample(ANIMALS, rng.randint(2, 8)))
        names = [row[0].lower() for row in sorted(rows, key=lambda row: int(row[1]))]
        conclusion = f"Overall, {names[0]} are the lightest and {names[-1]} the heaviest."
        names.sort()
        about = ", ".join(names[:-1]) + " and " + names[-1]
    told = "".join(thing.format(*row, i=i) for i, row in enumerate(rows, start=1))
    return about, len(rows), opening + told.rstrip() + "\n\n" + conclusion


def corpus(n=3600, seed=1337, split="train"):
    """-> n records {"id", "category", "prompt", "response", "facts"}; facts: sentences to mark an
    answer by. One in eight subjects of a kind (a set of animals, a sum) is in "val", and never in
    "train". All that is about eight animals, or days, is in "train": so every fact that "val" asks
    for was told there, and in the form that it asks for."""
    rng = random.Random(f"{split} {seed}")
    kinds = [*FORMS, "sums"]  # sums twice: they are the hardest to learn
    records = []
    while len(records) < n:
        kind = kinds[len(records) % len(kinds)]
        about, size, response = draw(kind, rng)
        coin = random.Random(f"{kind} {about}").random()  # the same for every seed and split
        is_val = size < len(ANIMALS) and coin < 1 / 8
        if is_val == (split == "val"):
            prompt = rng.choice(ASKS).format(FORMS[kind][0], about)
            records.append({"id": len(records), "category": kind, "prompt": prompt,
                            "response": response,
                            "facts": re.findall(r"[A-Z][^\n.:*]*\.", response)})
    return records


# ---- command line -----------------------------------------------------------

def show(record, segments, refusals):
    """Prints an answer: branches behind a bar, their titles in brackets; and what was refused."""
    print(printable(f"\n--- {record['id']}: {record['prompt'][:80]!r}"))
    for segment in segments:
        if isinstance(segment, Block):
            branches = "".join(f"\n[{title.strip()}]{rest}" for title, rest in segment)
            segment = branches.replace("\n", "\n| ")
        print(printable(segment.strip("\n")))
    for reason, start in refusals:
        print(printable(f"    refused, {reason}: {record['response'][start:start + 60]!r}"))


def as_json(segment):
    """A segment as the file of --out has it."""
    if isinstance(segment, Block):
        return {"branches": [{"title": b.title, "text": b.title + b.rest} for b in segment]}
    return segment


def main():
    """The command line: what extract() finds in a file."""
    p = argparse.ArgumentParser(description="Finds the independent parts of answers.")
    p.add_argument("file", nargs="?", help=f"JSON (Lines) of {LAYOUTS}; none: the built-in corpus")
    p.add_argument("--show", type=int, default=0, metavar="N",
                   help="print the first N answers; a branch as | [title] rest")
    p.add_argument("--out", metavar="OUT.jsonl", help="write the segments of every answer here")
    args = p.parse_args()

    records = corpus() if args.file is None else read_records(args.file)
    tokenizer = learn_tokenizer(r["response"] for r in records)
    if args.out is not None:
        open(args.out, "a").close()  # fails now, if it fails, and not after the work
    found = []           # of each answer: a line of JSON
    speedups = []        # of each answer: plain tokens a pass
    n_parallel = 0
    refused = Counter()  # {reason: how often}
    for n, r in enumerate(tqdm(records, desc="answers", disable=None)):
        segments, refusals = extract(r["response"], r["prompt"])
        check(join(segments) == r["response"], f"answer {r['id']} does not join back")
        if n < args.show:
            show(r, segments, refusals)
        ids = tokenize(segments, tokenizer.encode)
        speedups.append(len(plain(ids)) / steps(ids))
        n_parallel += any(isinstance(segment, Block) for segment in segments)
        refused.update(reason for reason, _ in refusals)
        line = {"id": r["id"], "category": r.get("category"), "prompt": r["prompt"],
                "segments": [*map(as_json, segments)]}
        found.append(json.dumps(line, ensure_ascii=False) + "\n")
    if args.out:
        write_text(args.out, "".join(found))

    mean = sum(speedups) / len(speedups)
    print(f"\n{n_parallel} of {len(records)} answers have a block. Ideal speedup (tokens a pass): "
          f"{mean:.2f} in the mean, {max(speedups):.2f} at best.\nRefused:")
    for reason, n in refused.most_common():
        print(f"{n:>8}  {reason}")


if __name__ == "__main__":
    cli(main)
