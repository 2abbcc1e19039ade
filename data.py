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
import zlib
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
# Some lines open a part: a heading, a label, a list item. Parts of one kind that follow each other
# are a run of siblings. From the top down, a run becomes a block, or a rule says why it must not: a
# branch may rely on the question, on the text before its block and on all titles, but not on what a
# sibling says. Then the parts of the refused run are looked into in the same way.

# "3.", "b)", "iv)", "三、"; not "1.5" (a digit follows) nor "e.g." (letter, dot, letter).
NUMBER = (r"(?:\d{1,9}|[一二三四五六七八九十]{1,3}|[ivxIVX]{1,6}|[^\W\d_])"
          r"(?:[.)）．]{1,2}(?!\d|(?<=[A-Za-z].)[A-Za-z])|、)")
BOLD = r"(\*\*|__)(?![\s*_])(?:(?!\*\*|__).){1,99}"  # its start; who uses it closes it with \1
# A label is a name of up to ten words, all but two of them capitalised or short ("Risks of It:").
# One alone on its line is of another kind: it may only introduce what stands below it ("For
# example:").
NAME = (r"[^\W\d_a-z][^\s:：.!?]{0,30}(?: (?:[a-z]{1,3}|[^\sa-z:：.!?,][^\s:：.!?,]{0,30})){0,7}"
        r"(?: [^\s:：.!?,]{1,30}){0,2}")
# What opens a sentence or an e-mail is no label.
SENTENCE = "(?:Here|Note|Subject|Dear|Sure|And|Now|So|To|I|You|We|He|She|It|They|There|My|Our)\\b"
LIST = 10  # the rank of list items; headings, labels and ordinals, further out, have a smaller one
LEVELS = [(name, rank, re.compile(pattern, re.M)) for name, rank, pattern in [
    # Name, rank (the smaller, the further out), pattern of a line; the first that matches counts.
    # Group 1 of the pattern is the notation that siblings have in common.
    ("heading", 0, r"(#{1,6})[ \t]+\S"),  # its rank is the number of #
    ("bold line", 7, BOLD + r"\1[:：]?[ \t\r]*$"),
    ("ordinal", 9, r"(\*\*|__|)(?:(?:First|Second|Third|Fourth|Fifth|Sixth)(?:ly)?\1[,:]"
                   r"|(?:One|Another) |(?:Additional|Further|More)\w+,)"),
    ("number", LIST, r"((?:\*\*|__)?[(（]?)(?=\d)" + NUMBER),
    ("letter", LIST, r"((?:\*\*|__)?[(（]?)" + NUMBER),
    # Bullets rank behind numbers, for they often stand below one without being indented.
    ("bullet", LIST + 0.5, r"([-*+–](?=[ \t]+\S)|[•‣◦▪●・](?=[ \t]*\S))"),
    ("bold label", 8, BOLD + r"(?:[:：]\1|\1[:：])"),
    ("lone label", 8, rf"()(?!{SENTENCE}){NAME}[:：][ \t\r]*$"),  # its text stands below it
    ("label", 8, rf"()(?!{SENTENCE}){NAME}(?::(?=\s|$)|：)"),
]]
OPAQUE = re.compile(r"""(?mx)  # what is never cut; if it is not closed, it lasts to the end
    \A (?: [\s\S]* </think> | \s* <think> [\s\S]* )          # reasoning
    | ^[ \t]* (?: (?:[-*+•] | \d+[.)]) [ \t]+ )?  # a fence, which a list item may open with
      (?: (`{3,}) (?!`) [^`\n]* | (~{3,}) (?!~) .* )$
      [\s\S]*? (?: ^[ \t]* (?: \1`* | \2~* ) [ \t\r]*$ | \Z )
    | ^[ \t]*\$\$ (?! .*\$\$ ) [\s\S]*? (?: \$\$ | \Z )      # $$ formula $$
    | ^ .*\\\[ (?! .*\\\] ) [\s\S]*? (?: \\\] | \Z )  # \[ formula \]
    | ^[ \t]* (?: \| | \$\$ | \\\[ ) .*                      # a row of a table; a short formula
    """)
HIDDEN = "\0"  # replaces what is opaque, line breaks aside; so all else keeps its place
MARKER = re.compile(rf"\W*(?:{NUMBER})?\W*")  # what a part opens with: "- ", "2. **"
CONCLUSION = (  # a part or paragraph that needs the parts before it: sums them up, or works on them
    r"(?i)(?:In )?Summary|(?:Key )?Takeaway|Bottom Line|In (?:short|essence|conclusion),|Overall"
    r"|Therefore|Ultimately|Final Answer|Calculating|总结|综上|总之|(?:Explanation|Solution|Comparison"
    r"|Instructions|Directions|Total|Output|Answer|Results?)[ \t]*[:*\n(]")


class Mark(NamedTuple):
    """What a line is in the outline."""
    level: str        # of LEVELS, or conclusion, paragraph (starts), text, blank, opaque, done, end
    rank: float = 99
    kind: tuple = ()  # level, rank, notation: what siblings have in common; empty if there are none


def bare(text):
    """A part without its marker."""
    return text[MARKER.match(text).end():]


def read_mark(line, above):
    """The Mark of a line. above: the level of the line above."""
    content = line.strip().strip("-=*_ \t")  # nothing, where it is a rule of dashes
    if not content:
        return Mark("blank")
    if content[0] == HIDDEN:
        return Mark("opaque")
    depth = len(re.match(r"[ \t]*", line)[0].expandtabs(4)) // 2  # in steps of two columns
    for level, rank, pattern in LEVELS:
        m = pattern.match(line.lstrip())
        if m and (depth < 2 or rank >= LIST):  # far indented, only list items count
            rank = rank or len(m[1])           # 0 is a heading's
            if rank >= LIST:
                rank += depth
            elif re.match(CONCLUSION, bare(line)):
                return Mark("conclusion", rank - 0.5)  # further out: it ends a run of its rank
            return Mark(level, rank, (level, rank, m[1]))
    return Mark("paragraph" if above in ("blank", "opaque") else "text")


def read_marks(text):
    """-> the lines of a text, what is OPAQUE hidden, and their Marks; the last Mark is the end."""
    hidden = OPAQUE.sub(lambda m: re.sub(r"[^\n]", HIDDEN, m[0]), text)
    lines = re.findall(r"[^\n]*\n|[^\n]+", hidden)
    names = Counter(re.split("[:：]", line)[0] for line in lines)
    marks = []
    for line in lines:
        above = marks[-1].level if marks else "blank"
        mark = read_mark(line, above)
        if mark.level.endswith("label"):
            repeated = names[re.split("[:：]", line)[0]] > 1  # a field of several items
            if repeated or above not in ("blank", "bullet"):  # a field of what stands above it
                mark = Mark("text")
        marks.append(mark)
    return lines, [*marks, Mark("end", 0)]


def find_run(lines, marks, first):
    """The run of siblings that opens at a line: the lines where its parts start, and the line
    behind the last one. Where no part starts, it is the line alone."""
    _, rank, kind = marks[first]
    run = [first]
    usual = 1 if rank < LIST else 0  # paragraphs in a part; then, as many as the fullest so far
    while kind and marks[run[-1]].kind == kind:
        below = run[-1] + 1
        end = next(k for k in itertools.count(below)
                   if marks[k].rank < rank or marks[k].kind == kind)
        paragraphs = [k for k in range(below, end) if marks[k].level == "paragraph"]
        # A conclusion, or a paragraph more than usual, is no longer the part's: the answer goes on.
        # ("- a / - b / And so on." ends a list.) But the first part may hold any number, and so may
        # what stands below a heading, if another heading follows.
        beyond = [k for n, k in enumerate(paragraphs)
                  if n >= usual or re.match(CONCLUSION, bare(lines[k]))]
        is_last = marks[end].kind != kind
        if beyond and len(run) > 1 and (is_last or rank >= LIST):
            end = beyond[0]
        usual = max(usual, len(paragraphs))
        run.append(end)
    return run


# ---- extraction: titles and rules ---------------------------------------------

LABEL_WORDS = 2  # a longer label is cut to the fewest words that tell its part apart
LABEL_END = re.compile(r"[:：]|\*\*|__| [-–—](?: |$)")
TOKEN_LIKE = re.compile(r"[一-鿿ぁ-ヿ]|[^\s:：*一-鿿ぁ-ヿ]+")


def make_titles(parts):
    """A title for each part: its label if short, else the fewest words that are its own."""
    openings = []  # of each part: its first line up to the first word, up to the second, ...
    for part in parts:
        line = part[:80].split("\n")[0].rstrip()  # few titles then exceed decode.TITLE_CAP
        after_marker = len(line) - len(bare(line))
        words = list(TOKEN_LIKE.finditer(line, after_marker))[:16]
        openings.append([line[:word.end()] for word in words] or [line])
    count = Counter(bare(opening).lower() for some in openings for opening in some)
    titles = []
    for candidates in openings:
        label_words = sum(not LABEL_END.search(bare(opening)) for opening in candidates)
        if 0 < label_words <= LABEL_WORDS:
            candidates = candidates[label_words - 1:]
        own = [opening for opening in candidates if count[bare(opening).lower()] == 1]
        titles.append(own[0] if own else candidates[-1])
    return titles


def make_block(parts, titles):
    """The Block of parts that follow each other. A branch opens with the white space behind the one
    before it, and the title of its first part."""
    size = math.ceil(len(parts) / MAX_BRANCHES)  # neighbours that share a branch
    block = Block()
    space = ""
    for i in range(0, len(parts), size):
        text = "".join(parts[i:i + size])
        rest = text[len(titles[i]):].rstrip()
        block.append(Branch(space + titles[i], rest))
        space = text[len(titles[i] + rest):]
    return block


class Siblings(NamedTuple):
    """A run, as the rules see it."""
    parts: list       # texts
    titles: list
    block: Block      # what the run would become
    above: str        # the prompt, and the answer up to the first part

    def say(self, pattern):
        """Does a part, its marker aside, match?"""
        return any(re.search(pattern, bare(part)) for part in self.parts)

    def taken_up(self, brings, takes):
        """Counts the things that one part brings in and a later one takes up; a thing counts once
        in each later part, and not at all if the text above or the prompt names it. brings, takes:
        patterns."""
        n = 0
        brought = set()
        for part, title in zip(self.parts, self.titles):
            own = set(re.findall(brings, part))
            taken = brought.intersection(re.findall(takes, part[len(title):]))
            if brings != takes:  # else all that is taken would be its own
                taken -= own     # "a fox ... the fox" in one part
            n += sum(not re.search(rf"\b{re.escape(word)}\b", self.above) for word in taken)
            brought |= own
        return n


# A rule is true of siblings that must not become a block; its docstring is the reason it gives.

def saves_too_little(siblings):
    """saves too few steps"""
    ids = tokenize([siblings.block], TOKEN_LIKE.findall)
    return len(plain(ids)) - steps(ids) < 6  # so little is not worth a block


def repeats_a_title(siblings):
    """titles are not distinct"""
    return len(set(map(bare, siblings.titles))) < len(siblings.titles)


def skips_a_number(siblings):
    """its numbers skip one that a line inside a part starts with"""
    line_number = re.compile(r"(?m)^[^\w\n]*(?:[A-Z][a-z]+ )?(\d{0,9})")  # "Step 2", or nothing
    numbers = [[int(n or 0) for n in line_number.findall(part)] for part in siblings.parts]
    for (low, *inside), (high, *_) in zip(numbers, numbers[1:]):
        if low > 0 and any(low < number < high for number in inside):
            return True
    return False


def concludes(siblings):
    """works on what its siblings say"""
    return re.match(CONCLUSION, bare(siblings.parts[-1]))


PERFORMED = (  # "Verse 2", "FADE OUT" on a line; "Ann (smiling):", "Ann: (whispering)"
    r"(?m)^[^\w\n]{0,9}(?:Verse|(?:Pre-)?Chorus|Outro|Scene|Act|FADE)\b[^a-z\n]{0,40}$"
    r"|\A[^\n:]{1,40}(?:\([a-z]+(?:ly|ing|ed)\)\**:|:\W{1,4}\([a-z]+(?:ly|ing|ed)\))")


def is_performed(siblings):
    """is a song or a play"""
    return siblings.say(PERFORMED)


GOES_ON = (r"\A(?:(?:However|Thus|As a result|Then|Meanwhile|Now|If (?:yes|no|so))\b|(?:Next|Also),"
           r"|然后|接着|因此|所以|但是)")


def goes_on(siblings):
    """goes on from a sibling"""
    return siblings.say(GOES_ON)


POINTS = (  # "Repeat this process", "as said above", "from step 2", "the previous section"
    r"\A[A-Z]\w+ th(?:is|ese) [a-z]|\bas \w+ (?:above|earlier)\b|(?<=[a-z,(] )[Ss]teps? \d"
    r"|\b[Rr]epeat (?:the|steps?)\b|\bthe (?:\w+ )?above\b"
    r"|[上前]一[个個]?(?:步|项|节|節|部分|题|題|阶段)|[上前]述|如上|上記"
    r"|\b(?:above|previous|preceding|the last) (?:step|section|item|part|day)\b")


def points_at_sibling(siblings):
    """points at a sibling"""
    return siblings.say(POINTS)


VALUE = r"\d[\d,.]*\d"  # two digits or more: one may be there by chance
RESULT = rf"[=≈][^\w\n]{{0,6}}({VALUE})(?!\S{{0,9}} *[-+*/])"  # "= 42", not "= 42 + 1"


def uses_sibling_value(siblings):
    """uses a value worked out in a sibling"""
    return siblings.taken_up(RESULT, VALUE) > 0


IDENTIFIER = (  # user_name, jobStart, JobStartTime, "#day-list", "'Wedding'"
    r"\b[a-z](?=\w*(?:_\w|[a-z][A-Z][a-z]))\w+|\b(?:[A-Z][a-z]+){3}\w*"
    r"|(?<=[\"'#/])[a-z]\w*(?:-\w+)+|(?<=[\"'])[A-Z]\w{3,}(?=[\"'])")


def uses_sibling_name(siblings):
    """uses a name of a sibling"""
    return siblings.taken_up(IDENTIFIER, IDENTIFIER) > 0


NOUN = (  # after up to two words, and before what is not part of its phrase: "old grey fox jumps"
    r"(?:[a-z'-]+ ){0,2}?([a-z'-]{3,}?)s?(?='s\b|[^\w '-]"
    r"| (?:and|or|of|to|in|on|for|with|by|from|at|is|are|that|who|which)\b)")
A_THING = rf"\b(?:[Aa]n?|one|some) {NOUN}"                  # "a deep hole,"
THE_THING = rf"\b[Tt]he {NOUN}(?! (?:of|that|wh))"          # "the hole.", not "the hole that"
SOMEBODY = r"\b[Aa]n? (?:[a-z-]+ ){0,2}?([a-z]{3,}?)s? who\b"  # "a captain who"


def takes_up_things(siblings):
    """takes up things of a sibling"""
    things = siblings.taken_up(A_THING, THE_THING)  # one may be chance
    return things > 1 or siblings.taken_up(SOMEBODY, THE_THING) > 0


EPISODE = r"\W*(?:Day|Week|Chapter|Episode|Part|Act|Panel|Scene|Page) [\dIV]"
PERSON = r"(?<=[a-z,] )[A-Z][a-z]{3,}"


def tells_on(siblings):
    """goes on with a sibling's story"""
    return re.match(EPISODE, siblings.titles[0]) and siblings.taken_up(PERSON, PERSON) > 3


RULES = [saves_too_little, repeats_a_title, skips_a_number, concludes, is_performed, goes_on,
         points_at_sibling, uses_sibling_value, uses_sibling_name, takes_up_things, tells_on]


def extract(text, prompt=""):
    """An answer -> its segments (str or Block), and the refused runs as (reason, start, end), in
    characters of the text.

    Joined, the segments are the text, whatever it is; none is empty. White space between two parts
    opens the title of the second one; what stands below the last one is serial.
    """
    lines, marks = read_marks(text)
    start = [0, *itertools.accumulate(map(len, lines))]  # of each line in the text
    segments = []
    refusals = []
    done = 0  # characters that are in segments
    for i in range(len(lines)):
        run = find_run(lines, marks, i)
        if len(run) < 3:  # fewer than two parts
            continue
        bounds = [start[line] for line in run]
        parts = [text[a:b] for a, b in zip(bounds, bounds[1:])]
        titles = make_titles(parts)
        block = make_block(parts, titles)
        siblings = Siblings(parts, titles, block, prompt + "\n" + text[:bounds[0]])
        reasons = (rule.__doc__ or rule.__name__ for rule in RULES if rule(siblings))
        reason = next(reasons, None)
        if reason:
            refusals.append((reason, bounds[0], bounds[-1]))
            for line in run[:-1]:
                marks[line] = Mark("done", 0)  # it still ends runs inside the part before
        else:
            segments += [text[done:bounds[0]], block]
            done = bounds[0] + len(join([block]))
            marks[run[0]:run[-1]] = [Mark("done")] * (run[-1] - run[0])
    segments.append(text[done:])
    return [segment for segment in segments if segment], refusals


# ---- rows and batches -------------------------------------------------------

def split_held_out(records):
    """-> (train, held out): the answers to 2% of the prompts, the same in every run. At least one
    prompt is held out where there are two, none where there is one."""
    prompts = {r["prompt"] for r in records}
    n_held = min(max(len(prompts) // 50, 1), len(prompts) - 1)
    # in the order of their checksums: shuffled, but always alike
    shuffled = sorted(prompts, key=lambda prompt: (zlib.crc32(repr(prompt).encode()), prompt))
    held = set(shuffled[:n_held])
    train = [r for r in records if r["prompt"] not in held]
    return train, [r for r in records if r["prompt"] in held]


def make_rows(records, tokenizer, config, mode="aspd"):
    """Answers -> a list of Rows, without those whose tagged row exceeds the context.

    mode: "aspd" is tagged, "serial" the plain answer. Both leave out the same answers, so that
    their models can be compared."""
    tags = tokenizer.tags or Tags(*[tokenizer.eos] * 6)  # stand-ins, for the length
    rows = []
    for r in tqdm(records, desc="tokenizing", leave=False, disable=None):
        prompt = tokenizer.prompt(r["prompt"])
        segments, _ = extract(r["response"], r["prompt"])
        ids = tokenize(segments, tokenizer.encode)
        row = layout(prompt, ids, tokenizer.eos, tags, config.positions)
        if len(row.token) > config.block_size:
            continue
        if mode == "serial":
            row = layout(prompt, [tokenizer.encode(r["response"])], tokenizer.eos)
        rows.append(row)
    return rows


def batches(lengths, batch_size, seed):
    """Endlessly yields batches, lists of indices into lengths, in a new seeded order every epoch.
    Rows of a batch are of like length, so that little is padded, but not always the same ones."""
    for epoch in itertools.count():
        rng = random.Random(f"{seed} {epoch}")
        roughly = [length * rng.uniform(1.0, 1.2) for length in lengths]
        order = sorted(range(len(lengths)), key=roughly.__getitem__)
        chunks = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(chunks)
        yield from chunks


def collate(rows, device="cpu"):
    """Rows -> (token, position, mask, target), padded on the right to a multiple of 16, so that few
    shapes occur: torch sets kernels up for each.

    token, position, target: (B, T). mask: (B, 1, T, T) bool."""
    T = math.ceil(max(len(row.token) for row in rows) / 16) * 16

    def padded(name, fill=0):
        columns = [getattr(row, name) for row in rows]
        columns = [F.pad(column, (0, T - len(column)), value=fill) for column in columns]
        return torch.stack(columns).to(device)

    mask = branch_mask(padded("block"), padded("branch"))
    return padded("token"), padded("position"), mask[:, None], padded("target", IGNORE)


# ---- loading ----------------------------------------------------------------

LAYOUTS = ('{"prompt", "response"}, {"instruction", "input", "output"}, '
           '{"conversations": [{"from", "value"}]}, {"messages": [{"role", "content"}]}')
USERS = ("user", "human")
ASSISTANTS = ("assistant", "gpt", "chatgpt", "model")
MARKS = ("weight", "loss", "train", "label", "kto_tag")  # 0 or false: not to be learnt


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
    """Of a record or a turn: no, if it is marked so, is no final answer, or has its past apart."""
    is_final = fields.get("channel", "final") == "final" and not fields.get("history")
    return is_final and 0 not in [fields.get(mark, 1) for mark in MARKS]


def read_turns(record):
    """The turns of a record as [(role, text)]; none where it is in none of the LAYOUTS."""
    match record:
        case {"prompt": prompt, "response": answer}:
            return [("user", prompt), ("assistant", answer)]
        case {"instruction": prompt, "output": answer}:
            more = [("user", record["input"])] if record.get("input") else []
            return [("user", prompt), *more, ("assistant", answer)]
    turns = []
    for turn in record.get("conversations") or record.get("messages") or []:
        role = str(turn.get("from") or turn.get("role")).strip().lower()
        if role in ASSISTANTS and not is_to_learn(turn):
            role += " (not to be learnt)"
        turns.append((role, turn.get("value") or turn.get("content")))
    return turns


def read_answers(record, left_out):
    """Yields (prompt, answer) for every answer that follows a user's turn. Counts in left_out, by
    reason, what yields none."""
    turns = read_turns(record) if is_to_learn(record) else []
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
    if prompt or not turns:
        left_out[f"record that ends without an answer ({', '.join(record):.80})"] += 1


def read_records(path):
    """The {"id", "prompt", "response", ...} of every answer of a file, a list; says on stderr what
    was left out. BadInput for a file without an answer, and for what is not JSON."""
    records = []
    left_out = Counter()
    for n, r in enumerate(read_objects(path)):
        kept = {name: r[name] for name in ("category", "model", "facts") if name in r}
        with naming(f"{path}, record {n + 1}"):
            answers = list(read_answers(r, left_out))
        for k, (prompt, response) in enumerate(answers):
            own_id = f"{r.get('id', n)}-{k}" if k else r.get("id", n)
            records.append({"id": own_id, "prompt": prompt, "response": response, **kept})
    reasons = ", ".join(f"{n} x {reason}" for reason, n in left_out.most_common(10))
    check(records, f"{path}: no usable answers ({reasons or 'no records'}); read are {LAYOUTS}")
    if left_out:
        tqdm.write(printable(f"{path}: left out: {reasons}"), file=sys.stderr)
    return records


def check_writable(path):
    """BadInput unless a file can be written at path, later: so that no work is lost."""
    path = Path(path)
    is_place = path.parent.is_dir() and not path.is_dir()
    can_write = os.access(path if path.exists() else path.parent, os.W_OK)
    check(is_place and can_write, f"{path} cannot be written")


def printable(text):
    """Text for a terminal: control characters, which could steer it, and surrogates escaped."""
    unsafe = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(unsafe, lambda c: c[0].encode("unicode_escape").decode(), text)


def cli(main):
    """Runs a command line's main(). Bad input: one clear line on stderr and exit code 2. Ctrl-C,
    SIGTERM and SIGHUP: whatever main() does finally, and 130."""
    if os.name == "posix":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a quiet end behind `| head`
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks
    try:
        main()
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
    tags: the six ids of TAG_NAMES, or None.
    chat: what surrounds a prompt, a list of texts, one of them with {prompt}, and special ids."""

    def __init__(self, pattern, ranks, eos, tags=None, stop=(), chat=CHAT):
        self.settings = {"pattern": pattern, "ranks": ranks, "eos": eos, "tags": tags,
                         "stop": stop, "chat": chat}  # plain values, for a checkpoint
        self.eos = eos
        self.tags = tags and Tags(*tags)
        self.stop = {eos, *stop}
        self.chat = chat
        self.bpe = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bytes = {i: token for token, i in ranks.items()}
        self.vocab_size = max(*self.bytes, *self.stop, *(tags or ())) + 1

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

    def with_tags(self, first):
        """The same with the tags' ids, from `first` on -> a new Tokenizer."""
        return Tokenizer(**self.settings | {"tags": tuple(range(first, first + 6))})


def learn_tokenizer(texts, vocab_size=2048):
    """A Tokenizer without tags of the 256 bytes and the commonest words of the first 4,000 texts.
    tiktoken looks a whole word up before it joins bytes."""
    texts = itertools.islice(texts, 4000)
    counts = Counter(itertools.chain.from_iterable(re.findall(PATTERN, text) for text in texts))
    words = [word.encode("utf-8", "replace") for word, _ in counts.most_common(vocab_size - 256)]
    tokens = dict.fromkeys([bytes([b]) for b in range(256)] + words)  # each once
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(PATTERN, ranks, eos=len(ranks))


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
FORMS = {  # what a prompt calls it; how it opens; how each thing is told
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
    answer by. In "val" an answer is about what no answer of its kind in "train" is about. Lists of
    all animals are in "train", and with them every animal's facts."""
    rng = random.Random(f"{split} {seed}")
    kinds = [*FORMS, "sums"]  # sums twice: they are the hardest to learn
    records = []
    while len(records) < n:
        kind = kinds[len(records) % len(kinds)]
        about, size, response = draw(kind, rng)
        is_val = size < 8 and random.Random(f"{kind} {about}").random() < 1 / 8
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
    for reason, start, _ in refusals:
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
    if args.out:
        check_writable(args.out)

    found = []           # of each answer: a line of JSON
    speedups = []        # of each answer: words a pass
    n_parallel = 0
    refused = Counter()  # {reason: how often}
    records = read_records(args.file) if args.file else corpus()
    for n, r in enumerate(tqdm(records, desc="answers", disable=None)):
        segments, refusals = extract(r["response"], r["prompt"])
        check(join(segments) == r["response"], f"answer {r['id']} does not join back")
        if n < args.show:
            show(r, segments, refusals)
        words = tokenize(segments, re.compile(PATTERN).findall)
        speedups.append(len(plain(words)) / steps(words))
        n_parallel += any(isinstance(segment, Block) for segment in segments)
        refused.update(reason for reason, _, _ in refusals)
        line = {"id": r["id"], "category": r.get("category"), "prompt": r["prompt"],
                "segments": [*map(as_json, segments)]}
        found.append(json.dumps(line, ensure_ascii=False) + "\n")
    if args.out:
        Path(args.out).write_text("".join(found), "utf-8", "backslashreplace")

    mean = sum(speedups) / len(speedups)
    print(f"\n{n_parallel} of {len(records)} answers have a block. Ideal speedup (words a pass): "
          f"{mean:.2f} in the mean, {max(speedups):.2f} at best.\nRefused:")
    for reason, n in refused.most_common():
        print(f"{n:>8}  {reason}")


if __name__ == "__main__":
    cli(main)
