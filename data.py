"""From answers to batches: extraction of parallel parts, rows, loading, tokenizers, the corpus.

    python data.py                                # what is parallel in the built-in corpus
    python data.py FILE --show 3 --out OUT.jsonl  # in a file of answers; shows three, writes all
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch.nn import functional as F
from tqdm import tqdm

from aspd import (IGNORE, MAX_BRANCHES, BadInput, Block, Branch, Tags, branch_mask, check, join,
                  layout, metrics, naming, stats, tokenize)
from model import map_file, read_json

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
    s = stats(tokenize([siblings.block], TOKEN_LIKE.findall))
    return s.tokens - s.steps < 6  # so little is not worth a block


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
    shuffled = sorted(prompts, key=lambda prompt: (zlib.crc32(repr(prompt).encode()), prompt))
    held = {*shuffled[:min(max(len(prompts) // 50, 1), len(prompts) - 1)]}
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
        in_order = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(in_order)
        yield from in_order


def collate(rows, device="cpu"):
    """Rows -> (token, position, mask, target), padded on the right to a multiple of 16, so that few
    shapes occur: torch sets kernels up for each, or compiles.

    token, position, target: (B, T). mask: (B, 1, T, T) bool."""
    T = math.ceil(max(len(row.token) for row in rows) / 16) * 16
    padded = []
    for tensors, fill in zip(zip(*rows), (0, 0, 0, 0, IGNORE)):
        tensors = [F.pad(tensor, (0, T - len(tensor)), value=fill) for tensor in tensors]
        padded.append(torch.stack(tensors).to(device))
    token, block, branch, position, target = padded
    return token, position, branch_mask(block, branch)[:, None], target


# ---- loading ----------------------------------------------------------------

LAYOUTS = ('{"prompt", "response"}, {"instruction", "input", "output"}, '
           '{"conversations": [{"from", "value"}]}, {"messages": [{"role", "content"}]}')
USERS = {"user", "human", "prompter"}
ASSISTANTS = {"assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"}


def read_objects(path):
    """Yields (place, dict) for every record of a JSON array or of JSON Lines. ValueError with the
    place."""
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # the byte order mark
    is_array = data.lstrip().startswith(b"[")
    with naming(f"{path}: not JSON"):
        records = json.loads(data.decode()) if is_array else data.split(b"\n")
    for n, r in enumerate(records, start=1):
        where = f"{path}, record {n}" if is_array else f"{path}, line {n}"
        if is_array or r.strip():
            with naming(f"{where}: not JSON (JSON Lines has one object a line)"):
                r = r if is_array else json.loads(r.decode())
            check(isinstance(r, dict), f"{where}: expected an object, not {type(r).__name__}")
            # null and NaN, which tables write, mean "not given"
            yield where, {name: v for name, v in r.items() if v is not None and v == v}


def read_turns(record):
    """The turns of a record as [(role, text)]; none where it is in none of the LAYOUTS."""
    match record:
        case {"prompt": prompt, "response": response}:
            return [("user", prompt), ("assistant", response)]
        case {"instruction": prompt, "output": response}:
            return [("user", prompt), ("user", record.get("input", "")), ("assistant", response)]
        case {"conversations": [_, *_] as turns} | {"messages": [_, *_] as turns}:
            turns = [t if isinstance(t, dict) else {} for t in turns]
            return [(t.get("from") or t.get("role"), t.get("value") or t.get("content") or "")
                    for t in turns]
    return []


def read_answers(record, left_out):
    """Yields (prompt, answer) for every answer of a record, with the user's turn before it as its
    prompt ("" where the record begins with an answer). Turns of one role in a row are one. Counts
    in left_out, by reason, what yields no answer."""
    turns = []
    for role, text in read_turns(record):
        name = str(role).strip().lower()
        if name in USERS | ASSISTANTS:
            turns.append((name in USERS, text))
        elif name != "system":
            left_out[f"turn of {role!r:.40}"] += 1
    if not turns or turns[-1][0]:
        left_out[f"record that ends without an answer ({', '.join(record):.80})"] += 1
    prompt = ""
    for is_user, group in itertools.groupby(turns, key=lambda turn: turn[0]):
        texts = [text for _, text in group]
        is_text = all(isinstance(text, str) for text in texts)
        text = "\n\n".join(filter(str.strip, texts)) if is_text else ""
        if is_user:
            prompt = text or None
        elif text and prompt is not None:
            yield prompt, text
        else:
            left_out["answer without a prompt" if text else "answer without text"] += 1


def read_records(path):
    """The {"id", "prompt", "response", ...} of every answer of a file, a list; says on stderr what
    was left out. ValueError for a file without an answer, and for what is not JSON."""
    records = []
    left_out = Counter()
    for n, (_, r) in enumerate(read_objects(path)):
        kept = {name: r[name] for name in ("category", "model", "facts") if name in r}
        pairs = list(read_answers(r, left_out))
        for k, (prompt, response) in enumerate(pairs):
            own_id = r.get("id", n) if len(pairs) == 1 else f"{r.get('id', n)}-{k}"
            records.append({"id": own_id, "prompt": prompt, "response": response, **kept})
    reasons = ", ".join(f"{n} x {reason}" for reason, n in left_out.most_common(10))
    check(records, f"{path}: no usable answers ({reasons or 'no records'}); read are {LAYOUTS}")
    if left_out:
        tqdm.write(printable(f"{path}: left out: {reasons}"), file=sys.stderr)
    return records


def read_prompts(path):
    """The {"category", "prompt"} of a file, a list. ValueError for a record without a prompt."""
    prompts = []
    for where, r in read_objects(path):
        usable = isinstance(r.get("prompt"), str) and r["prompt"].strip()
        check(usable, f"{where}: no prompt in a record with the fields {', '.join(r)}")
        prompts.append({"category": r.get("category"), "prompt": r["prompt"]})
    check(prompts, f"{path}: no prompts")
    return prompts


def write_whole(path, lines):
    """Writes lines to a file whole or not at all; a link or a device stays what it is."""
    path = Path(path)
    # a lone surrogate is written as JSON escapes it, \ud83d
    data = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
    if path.is_file() or not path.exists():
        temporary = Path(f"{path.resolve()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path.resolve())
    else:
        path.write_bytes(data)


def printable(text):
    """Text for a terminal: control characters, which could steer it, and surrogates escaped."""
    unsafe = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(unsafe, lambda c: c[0].encode("unicode_escape").decode(), text)


def cli(main):
    """Runs a command line's main(). Bad input: one clear line on stderr and exit code 2. Ctrl-C:
    130. Nobody reads on, as behind `| head`: a quiet end, 141."""
    try:
        sys.stdout = sys.stdout or open(os.devnull, "w")  # where it was closed before the start
        sys.stderr = sys.stderr or open(os.devnull, "w")
        main()
        sys.stdout.flush()  # fails here, if it fails, and not when Python ends
    except BrokenPipeError:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.exit(128 + 13)  # as if ended by SIGPIPE
    except (BadInput, OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "compiler" not in str(e):  # --compile found none
            raise
        print("error:", printable(" ".join(str(e).split("\n\n")[0].split())), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- the tokenizer: byte-level BPE, computed by tiktoken --------------------

# Cuts text into words, which are encoded apart; for `re` in learn_bpe and for tiktoken alike.
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
PLAIN_FORM = [["{system}\n"], ["User: {prompt}\nAssistant:\n"]]


class Tokenizer:
    """Text <-> ids; no text ever becomes a special token.

    pattern: cuts text into words. ranks: {a token's bytes: its id, also its merge priority}. eos:
    the id that ends an answer; stop: more that do. tags: the six ids of TAG_NAMES, or None.
    chat: the forms of a system text and of a prompt, lists of text and special ids. system: the
    default system text. nfc: normalise text? added: {text: id}, matched before all else. taken: ids
    that tags must not get."""

    def __init__(self, pattern, ranks, eos, tags=None, stop=(), chat=PLAIN_FORM, system="",
                 nfc=False, added={}, taken=()):
        self.settings = dict(locals())  # first of all: plain values, for a checkpoint
        del self.settings["self"]
        self.eos = eos
        self.tags = tags and Tags(*tags)
        self.stop = {eos, *stop}
        # To tiktoken the added tokens are special, so it matches them first; to us they are text.
        self.bpe = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens=added)
        self.bytes = {i: token for token, i in ranks.items()}
        self.bytes |= {i: text.encode() for text, i in added.items()}
        self.vocab_size = max(*self.bytes, *self.stop, *taken, *(tags or ())) + 1
        self.lacking = {b for b in range(256) if bytes([b]) not in ranks}  # in some published ones

    def encode(self, text):
        """str -> list of ids. What UTF-8 cannot write and what has a lacking byte become U+FFFD."""
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        if self.settings["nfc"]:
            text = unicodedata.normalize("NFC", text)
        if self.lacking:
            text = "".join(c if self.lacking.isdisjoint(c.encode()) else "\ufffd" for c in text)
        return self.bpe.encode(text, allowed_special="all", disallowed_special=())

    def decode(self, ids):
        """List of ids -> str; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

    def prompt(self, text, system=None):
        """A user's text in the model's own chat form -> list of ids."""
        system = self.settings["system"] if system is None else system
        system_form, prompt_form = self.settings["chat"]
        ids = []
        for part in system_form * bool(system) + prompt_form:
            is_id = isinstance(part, int)
            ids += [part] if is_id else self.encode(part.format(system=system, prompt=text))
        return ids

    def add_tags(self):
        """Gives the tags the ids after all others -> a new Tokenizer."""
        first = self.vocab_size
        return Tokenizer(**self.settings | {"tags": tuple(range(first, first + 6))})


def learn_bpe(text, vocab_size=2048):
    """Byte pair encoding learnt from text -> ranks. Works on the commonest words and their counts;
    a word is a str with one character, chr(id), for each of its tokens."""
    words = Counter(re.findall(PATTERN, text)).most_common(4000)
    words = [(word.encode("utf-8", "replace").decode("latin-1"), n) for word, n in words]
    tokens = {chr(b): bytes([b]) for b in range(256)}
    for new in map(chr, range(256, vocab_size)):
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = max(pairs, key=pairs.get, default=None)
        if pairs[best] < 2:
            break
        tokens[new] = tokens[best[0]] + tokens[best[1]]
        words = [(word.replace("".join(best), new), n) for word, n in words]
    return {token: i for i, token in enumerate(tokens.values())}


def make_tokenizer(name, texts):
    """A Tokenizer without tags. name: "bpe", which is learnt from the texts, or a published
    folder."""
    if name != "bpe":
        return published_tokenizer(name)
    ranks = learn_bpe("".join(itertools.islice(texts, 2000)))
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
        print(f"    refused, {reason}: {record['response'][start:start + 60]!r}")


def as_json(segment):
    """A segment as the file of --out has it."""
    if isinstance(segment, Block):
        return {"branches": [{"title": b.title, "text": b.title + b.rest} for b in segment]}
    return segment


def main():
    """The command line: what extract() finds in a file."""
    p = argparse.ArgumentParser(description="Finds the independent parts of answers.")
    p.add_argument("file", nargs="?", help=f"JSON (Lines) of {LAYOUTS}; none: the built-in corpus")
    p.add_argument("--out", metavar="OUT.jsonl", help="write the segments of every answer here")
    p.add_argument("--show", type=int, default=0, metavar="N",
                   help="print the first N answers; a branch as | [title] rest")
    p.add_argument("--tokenizer", default="bpe", help="to count in: bpe (learnt here) or a folder")
    args = p.parse_args()

    records = read_records(args.file) if args.file else corpus()
    tokenizer = make_tokenizer(args.tokenizer, (r["response"] for r in records))
    counted = defaultdict(list)  # {category: the Stats of its answers}
    refused = Counter()          # {reason: how often}
    lines = []
    for n, r in enumerate(tqdm(records, desc="answers", disable=None)):
        segments, refusals = extract(r["response"], r["prompt"])
        check(join(segments) == r["response"], f"answer {r['id']} does not join back")
        if n < args.show:
            show(r, segments, refusals)
        s = stats(tokenize(segments, tokenizer.encode))
        for category in {str(r.get("category") or "all"), "all"}:
            counted[category].append(s)
        refused.update(reason for reason, _, _ in refusals)
        line = r | {"segments": list(map(as_json, segments))}
        del line["response"]
        lines.append(json.dumps(line, ensure_ascii=False))
    if args.out:
        write_whole(args.out, lines)

    print("\ncategory         answers    PPD    ABN    APD    APE  speedup   best")
    row = "{:16}{answers:>8}{PPD:>7.0%}{ABN:>7.2f}{APD:>7.0%}{APE:>7.0%}{speedup:>9.2f}{best:>7.2f}"
    for category in sorted(counted, key=lambda name: name == "all"):
        print(row.format(printable(category), **metrics(counted[category])))
    print("PPD: answers with a block. ABN: branches a block. APD: tokens in branches, APE: of\n"
          "these those after the titles. Speedup: ideally, tokens / passes; see aspd.metrics.")
    print("\nblocks refused:" if refused else "\nno block was refused")
    for reason, n in refused.most_common():
        print(f"{n:>8}  {reason}")


# ---- published tokenizers ---------------------------------------------------

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after digits have been split off, one by one, as in SmolLM2.
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")
# Vocabularies write a byte as the character of that number or, if that is not visible, as one from
# 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in VISIBLE]
TO_BYTE = {chr(b): b for b in VISIBLE} | {chr(256 + n): b for n, b in enumerate(OTHERS)}
CHATML = {  # SHA-256 (its start) of the known chat templates -> the system text they default to
    "872be49dbb638044": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "793202280c0910ab": "You are a helpful assistant.",  # Qwen2
    "44d5f08f3f72b837": "You are a helpful assistant.",  # Qwen2.5
    "cd8e9439f0570856": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "153280e3ff55d19d": "",                              # plain ChatML
}


def published_tokenizer(path):
    """The tokenizer of a published folder, without tags: same ids, same prompts. ValueError, by
    name, for what would change them and is not implemented."""
    t = read_json(Path(path, "tokenizer.json"))
    with naming(f"{path}/tokenizer.json"):
        tokens = t["added_tokens"]
        special = {a["content"]: a["id"] for a in tokens if a["special"]}
        added = {a["content"]: a["id"] for a in tokens if not a["special"]}  # text, matched first
        odd = [a["content"] for a in tokens if a["single_word"] or a["lstrip"] or a["rstrip"]]
        odd += [a for a in added for b in special | added if a != b and a in b]
        odd += special.keys() & added.keys()
        check(not odd, f"added tokens that take blanks away or are part of others: {odd}")
        ranks = read_ranks(t["model"], special | added)
        pattern = word_pattern(t["pre_tokenizer"])
        normalizer = (t["normalizer"] or {}).get("type")
        check(normalizer in (None, "NFC"), f"the normalizer {normalizer} is not supported")
        adds = re.search("'(SpecialToken|sep)'", str(t["post_processor"]))
        check(not adds, "a token before or after all text is not supported")
    config = read_json(Path(path, "tokenizer_config.json"))
    with naming(f"{path}/tokenizer_config.json"):
        eos = config["eos_token"]
        eos = special[eos["content"] if isinstance(eos, dict) else eos]
        chat, system = chat_form(path, config, special)
        return Tokenizer(pattern, ranks, eos, None, more_ends(path), chat, system,
                         normalizer == "NFC", added, taken=list(special.values()))


def read_ranks(model, added):
    """The BPE model of a tokenizer.json -> ranks. added: the tokens that are not of the BPE.

    tiktoken joins the neighbours that make a token, the one with the lowest id first. That is what
    the merges say if ids are in their order and every token comes out of its own merges."""
    names = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    odd = {name: model[name] for name in names if model.get(name)}
    check(model["type"] == "BPE" and not odd, f"a {model['type']} with {odd} is not supported")
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    ids = {*model["vocab"].values(), *added.values()}
    check(len(ids) == len(vocab) + len(added), "two tokens have one id, or one token has two")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    for merge in merges:
        known = len(merge) == 2 and {*merge, "".join(merge)} <= vocab.keys()
        check(known, f"the merge {merge} does not make a token of two tokens")
    merged = [vocab[a + b] for a, b in merges]
    check(merged == sorted(merged), "ids in another order than the merges are not supported")
    order = {merge: n for n, merge in enumerate(merges)}
    for token in vocab:
        parts = list(token)
        while len(parts) > 1:  # byte pair encoding by the book
            pairs = list(zip(parts, parts[1:]))
            first = min(pairs, key=lambda pair: order.get(pair, len(order)))
            check(first in order, f"the token {token!r} does not come out of its merges")
            i = pairs.index(first)
            parts[i:i + 2] = ["".join(first)]
    return {bytes(TO_BYTE[c] for c in token): i for token, i in vocab.items()}


def word_pattern(pre):
    """The pre_tokenizer of a tokenizer.json cuts text into words -> a pattern that does it."""
    match pre:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return GPT2
        case {"pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]}:
            return DIGITS
        case {"pretokenizers": [
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated"},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]}:
            return words
    raise BadInput(f"the pre_tokenizer {pre} is not supported")


def more_ends(path):
    """The ids that end an answer, besides the one that ends it in training."""
    ids = []
    for file in Path(path).glob("*config.json"):
        more = read_json(file).get("eos_token_id")
        ids += more if isinstance(more, list) else [more]
    ids = [i for i in ids if i is not None]
    check(all(type(i) is int and i >= 0 for i in ids), f"eos_token_id: {ids} are not all ids")
    return ids


def chat_form(path, config, special):
    """-> the forms of a system text and of a prompt, and the default system text."""
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each with its name
        template = {named["name"]: named["template"] for named in template}["default"]
    file = Path(path, "chat_template.jinja")
    if file.exists():
        template = map_file(file)[:].decode()
    if not template:
        return [["{system}\n"], ["{prompt}\n"]], ""
    digest = hashlib.sha256(str(template).encode()).hexdigest()[:16]
    check(digest in CHATML, f"its chat template, of SHA-256 {digest}, is not supported")
    start = special["<|im_start|>"]
    end = special["<|im_end|>"]
    prompt_form = [start, "user\n{prompt}", end, "\n", start, "assistant\n"]
    return [[start, "system\n{system}", end, "\n"], prompt_form], CHATML[digest]


if __name__ == "__main__":
    cli(main)
