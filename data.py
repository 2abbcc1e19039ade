"""
Text in: loading, the extraction of parallel structure, the tokenizer, the built-in corpus and batches.

    python data.py                      # what the extractor finds in the built-in corpus
    python data.py FILE --show 3        # in your answers (JSON or JSON Lines), three of them in colour
    python data.py FILE --out OUT.jsonl # and write their segments

An answer enters as plain text. extract() cuts it into segments without losing a character, and validates that the
branches do not need each other; Tokenizer turns text into ids; batches() packs answers of like length together.
"""
import argparse
import itertools
import json
import os
import random
import re
import sys
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from aspd import IGNORE, Branch, Special, branch_mask, is_block, join, layout, stats, summary, tokenize

# -----------------------------------------------------------------------------
# loading: {"prompt", "response"}, Alpaca and ShareGPT, as JSON or JSON Lines

MAX_LINE = 64 * 2**20  # bytes


def read_records(path):
    """
    Yields {"id", "prompt", "response", ...} from a file, one line in memory at a time for JSON Lines.
    ValueError names the file and line of what is not a record. Conversations without an answer are passed over.
    """
    n = 0
    for where, record in read_objects(path):
        for answer in answers(record, where):
            yield {"id": n, **answer}
            n += 1
    if n == 0:
        raise ValueError(f"{path}: no usable answers")


def read_prompts(path):
    """The {"prompt", ...} records of a JSON or JSON Lines file, as a list."""
    prompts = [(where, r) for where, r in read_objects(path)]
    for where, r in prompts:
        if not isinstance(r.get("prompt"), str):
            raise ValueError(f"{where}: no prompt in a record with the fields {', '.join(r) or '(none)'}")
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return [r for _, r in prompts]


def read_objects(path):
    """Yields (place, object) of every record of a JSON array, or of a JSON Lines file, a line in memory at a time."""
    with open(path, "rb") as f:
        array = f.read(1) == b"["
    for where, record in (read_array if array else read_lines)(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
        yield where, record


def read_lines(path):
    """Yields (place, object) of every line of a JSON Lines file."""
    with open(path, "rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise ValueError(f"{where}: longer than {MAX_LINE // 2**20} MiB")
            if line.strip():
                yield where, parse_json(line, where)


def read_array(path):
    """Yields (place, object) of every element of a JSON array, which is read whole."""
    rows = parse_json(Path(path).read_bytes(), path)
    for number, row in enumerate(rows, start=1):
        yield f"{path}, record {number}", row


def parse_json(raw, where):
    """Bytes -> object. ValueError with the place for what is not UTF-8 or not JSON."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: not UTF-8: {e.reason} at byte {e.start}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not JSON: {e}") from None


def answers(record, where):
    """Every answer in a record, whatever its format, with the record's other small fields."""
    small = {k: v for k, v in record.items() if k in ("id", "category", "model", "facts")}
    if "conversations" in record:
        prompt = ""
        for k, turn in enumerate(record["conversations"]):
            who, text = turn.get("from"), turn.get("value")
            if who in ("human", "user"):
                prompt = text
            elif who != "system" and isinstance(text, str) and text.strip():
                yield {**small, "id": f"{record.get('id', '')}-{k}", "prompt": prompt, "response": text}
        return
    prompt, response = record.get("prompt"), record.get("response")
    if "instruction" in record:
        prompt, response = "\n\n".join(filter(None, (record["instruction"], record.get("input")))), record.get("output")
    for name, text in (("prompt", prompt), ("answer", response)):
        if not isinstance(text, str) or (name == "answer" and not text.strip()):
            raise ValueError(f"{where}: no {name} in a record with the fields {', '.join(record) or '(none)'}")
    yield {**small, "prompt": prompt, "response": response}


def cli(main):
    """Runs a command line's main(): bad input becomes one clear line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


from dataclasses import dataclass, field
from itertools import accumulate
# ---- extraction
MAX_BRANCHES = 16  # the engine's width
MIN_SAVED = 7      # steps; a smaller gain is not worth tags and titles
GROUP_OVER = 10    # longer lists may put several items into one branch
LABEL_WORDS = 8    # a longer label is cut down to the fewest words that tell it apart

# ---------------------------------------------------------------- structure: which lines open a part, and at what level
NUMERAL = r"(\d{1,3}(?:\.\d{1,2}){0,3}|[a-zA-Z]|[ivxIVX]{2,5}|[一二三四五六七八九十]{1,3})"
HEADING = re.compile(r"(#{1,6})[ \t]+(?=\S)")
BULLET = re.compile(r"([-*+•‣◦▪●–])[ \t]+(?=\S)")
NUMBER = re.compile(rf"(\*\*|__)?([(（]?){NUMERAL}(?:[.)）．](?=\s|\*\*|[一-鿿])|、|(?<=\.\d)(?=\s))[ \t]*")
STEP = re.compile(r"(\*\*|__)?([A-Z][a-z]{2,11}) (?:#|No\. ?)?(\d{1,3})(?=\s*(?:[:.)–—*-]|$))")
BOLD = re.compile(r"(?:\*\*|__)[^*_\n]{1,100}(?:\*\*|__)")
LABEL = re.compile(r"[^\W\d_a-z][^\s:.!?]{0,30}(?: [^\s:.!?]{1,30}){0,7}(?::(?=\s|$)|：)")
ORDINAL = re.compile(r"(First(?:ly)?,|One\b|首先)|(?:Second(?:ly)?,|Third(?:ly)?,|Fourth(?:ly)?,|Another\b|Finally,|Lastly,"
                     r"|Additionally,|In addition,|Furthermore,|Moreover,|其次|再次|最后)")
LEAD_IN = re.compile(r"(?:Here|Sure|Certainly|To|If|For example|Note|Example|However|In)\b")
CLOSING = re.compile(r"[*_# ]{0,6}(?:In (?:conclusion|summary|short)|Overall|To (?:sum|conclude|summarize)|Remember|By "
                     r"|I hope|Let me know|Please|Good luck|Thes?e |This |Ultimately|Keep in mind|Note|Feel free|总之|总的来说)")
SUMMARY = re.compile(r"[*_#\s]{0,8}(?:\d+[.)] )?[*_]{0,2}(?:(?:In |Final |Overall )?(?:Conclusion|Summary)|Key Takeaways?|Takeaways?|Final (?:Thoughts?|Answer|Words?|Estimat\w+|Results?|Notes?)|Overall|Bottom Line|TL;?DR|Recap|Wrap|总结|结论)\b", re.I)
FENCE = re.compile(r"[ \t]*(```|~~~)")
PIECE = re.compile(r"[一-鿿぀-ヿ가-힯]|[^\W一-鿿぀-ヿ가-힯]{1,12}|[^\w\s]{1,3}|\n+")


def numeral(s):
    """Family and value of a list number: '3' -> ('1', 3), 'iv' -> ('i', 4), 'b' -> ('a', 2)."""
    if s[0].isdigit():
        return "1" * (1 + s.count(".")), int(s.split(".")[-1])
    if s[0] in "一二三四五六七八九十":
        return "一", 0
    if set(s) <= set("ivxIVX"):
        values = [{"i": 1, "v": 5, "x": 10}[c] for c in s.lower()]
        return "iI"[s.isupper()], sum(v if v >= max(values[k:]) else -v for k, v in enumerate(values))
    return "aA"[s.isupper()], ord(s.lower()) - ord("a") + 1


def read_marker(line, fresh):
    """(level key, rank, number) of a line that opens a part, None of others. The smaller rank is further out."""
    body = line.strip()
    depth = len(line[:len(line) - len(line.lstrip())].expandtabs(4)) if line[0] in " \t" else 0
    bold = depth < 4 and BOLD.fullmatch(body.rstrip(":：")) is not None
    if depth < 4 and (m := HEADING.match(body)):
        return ("#", len(m[1])), len(m[1]), 0
    if m := NUMBER.match(body):
        family, value = numeral(m[3])
        return (("**", family), 7 if family in "1Ii一" else 7.5, value) if bold else (("1", family, m[2], m[1], depth), 10 + depth, value)
    if m := BULLET.match(body):
        return ("-", m[1], depth), 10 + depth, 0
    if depth == 0 and (m := STEP.match(body)):
        return ("step", m[2], m[1]), 7, int(m[3])
    if bold:
        return ("**", ""), 7, 0
    if depth == 0 and BOLD.match(body):
        m = BOLD.match(body)
        if m[0][-3] in ":：.-" or body[m.end():].lstrip()[:1] in tuple(":：-–—"):
            return ("**:",), 8, 0
    if depth == 0 and fresh and LABEL.match(body) and not LEAD_IN.match(body):
        return (":",), 8, 0
    if depth == 0 and fresh and (m := ORDINAL.match(body)):
        return ("first",), 9, 1 if m[1] else 2
    return None


@dataclass
class Run:
    """Sibling parts of one level, open until a line ends it."""
    key: tuple
    rank: int
    number: int = 0
    items: list = field(default_factory=list)                # first line of each part
    held: list = field(default_factory=lambda: [0, 0])       # paragraphs of the last part: before and after its sublevels
    allowed: list = field(default_factory=lambda: [0, 0])    # the most an earlier part held
    sublevels: set = field(default_factory=set)              # keys that open parts inside the parts
    nested: int = 0                                          # 1 once the last part holds a sublevel
    inside: list = field(default_factory=list)               # accepted blocks inside its parts

    def add(self, line, number):
        if self.items:
            self.allowed = [max(pair) for pair in zip(self.allowed, self.held)]
        self.items.append(line)
        self.number, self.held, self.nested = number, [0, 0], 0

    def continued_by(self, key, number):
        if self.key[0] == "**" and key == ("**", "") and self.rank == 7 and key not in self.sublevels:
            return True
        if key != self.key:
            return False
        if key[0] in ("1", "step", "first") or key[0] == "**" and key[1]:
            return self.number <= number <= self.number + (1 if key[0] != "step" else 3)
        return True


def parse(text, close):
    starts = [0] + [m.end() for m in re.finditer("\n", text)]
    if starts[-1] < len(text):
        starts.append(len(text))
    lines = [text[s:e] for s, e in zip(starts, starts[1:])]
    marks, fence, fresh = [], False, True
    for line in lines:
        mark = None
        if FENCE.match(line):
            fence, mark = not fence, "fence"
        elif fence or line.lstrip().startswith("|"):
            mark = "fence"
        elif line.strip() and line.strip(" \t\r\n-*_"):
            mark = read_marker(line, fresh) or "text"
        elif line.strip():
            mark = "rule"
        fresh = mark is None or mark == "rule" or isinstance(mark, tuple)
        marks.append(mark)
    follows, latest = {}, {}   # line -> does a later line continue its run?
    for i in range(len(marks) - 1, -1, -1):
        if isinstance(marks[i], tuple):
            key, rank, number = marks[i]
            j = latest.get(key)
            follows[i] = j if j is not None and (not number or number <= marks[j][2] <= number + (3 if key[0] == "step" else 1)) else -1
            latest[key] = i
    stack = [Run(("root",), -1)]

    def pop(end):
        run = stack.pop()
        stack[-1].inside += close(run, starts, end)

    rule_before = False
    for i, (line, mark) in enumerate(zip(lines, marks)):
        if isinstance(mark, tuple) and mark[1] < 10 and SUMMARY.match(line):
            while stack[-1].rank >= mark[1]:
                pop(i)
        elif isinstance(mark, tuple):
            key, rank, number = mark
            k = next((k for k in range(len(stack) - 1, 0, -1) if stack[k].continued_by(key, number)), 0)
            if k:
                while len(stack) > k + 1:
                    pop(i)
            else:
                while stack[-1].rank > rank or stack[-1].rank == rank < 8 or stack[-1].key == key:
                    top = stack[-1]
                    if top.key != key and rank > 6 and (key in top.sublevels or top.number and follows[top.items[-1]] > i):
                        break
                    pop(i)
                if key == ("first",) and number == 2:
                    continue
                stack[-1].sublevels.add(key)
                stack.append(Run(key, rank))
            for run in stack[1:-1]:
                run.nested = 1
            stack[-1].add(i, number)
            rule_before = False
        elif mark == "fence":
            for run in stack[1:]:
                run.nested = 1
        elif mark == "rule":
            rule_before = True
        elif mark == "text":
            depth = len(line) - len(line.lstrip())
            after_blank = i == 0 or marks[i - 1] in (None, "rule", "fence")
            while len(stack) > 1 and depth <= max(stack[-1].rank - 10, 0):
                run = stack[-1]
                run.held[run.nested] += 1
                more = follows[run.items[-1]] > i and (run.rank < 10 or run.number or run.held[run.nested] <= run.allowed[run.nested])
                allowed = max(run.allowed[run.nested], run.rank < 9 and not run.nested)
                over = run.held[run.nested] > allowed
                if more:
                    break
                if len(run.items) < 2:
                    if run.rank < 10 or not after_blank:
                        break
                elif not (over and (after_blank or not allowed) or after_blank and (CLOSING.match(line) or rule_before)):
                    break
                pop(i)
            rule_before = False
    while len(stack) > 1:
        pop(len(lines))
    return stack[0].inside


# ---------------------------------------------------------------- titles
LABEL_WORDS = 4
CLOSE_BOLD = True
PREFIX = re.compile(r"[ \t]*(?:#+[ \t]+)?(?:[-*+•‣◦▪●–][ \t]+)?(?:\*\*|__)?(?:[(（]?\w{1,6}[.)）．、](?=\s|\*|[一-鿿])[ \t]*)?(?:\*\*|__)?")
LABEL_END = re.compile(r"[:：]|\*\*|__| [-–—] |$")
WORD = re.compile(r"[一-鿿぀-ヿ가-힯]|[^\s一-鿿぀-ヿ가-힯]+")
STOP = frozenset("a an the of to in on for and or is are was be do does did what how why when which who can could you your i we it its "
                 "this that these those there any with by from as at one another use using".split())


def tokens(s):
    return len(PIECE.findall(s))


def title_ends(items):
    """Where each item's title ends: at its label, else after the fewest words that tell it apart."""
    ends, heads = [], []
    for item in items:
        line = item[:300].split("\n")[0].rstrip()
        start = PREFIX.match(line).end()
        m = LABEL_END.search(line, start)
        whole = m.start() < len(line) or line.lstrip()[:1] == "#"
        label = WORD.findall(line[start:m.start()])
        e = m.start()
        if CLOSE_BOLD:
            while line[e:e + 1] in tuple(":*_"): e += 1
        ends.append(e if whole and 0 < len(label) <= LABEL_WORDS else 0)
        heads.append([w for w in WORD.finditer(line, start)] or [re.match(".*", line)])
    for k in range(2, 17):
        prefixes = [" ".join(w[0].lower().strip("*:,.") for w in words[:k]) for words in heads]
        count = Counter(prefixes)
        for i, words in enumerate(heads):
            if ends[i] == 0 and words and (k >= len(words) or k == 16 or count[prefixes[i]] == 1 and
                                           words[k - 1][0].lower().strip("*:,.\"'") not in STOP):
                ends[i] = words[min(k, len(words)) - 1].end()
    return ends


# ---------------------------------------------------------------- validation
NAME = re.compile(r"[^\W_](?:[\w.,'-]*\w)?")
POINTER = re.compile(r"\b(?:as (?:mentioned|described|discussed|noted|shown|calculated|explained) (?:above|earlier|before|in)"
                     r"|(?:the|from) (?:above|previous|preceding|last) (?:step|section|item|part|day|answer|point|question)"
                     r"|repeat (?:the|steps?)|(?:[Ss]teps? |[Qq]uestion |#)\d|more of (?:the|[A-Z]))")
OPENER = re.compile(r"[\W\d]*(?:(?:However|Therefore|Thus|As a result|Consequently|Hence|Then|Otherwise|After that|Afterwards|Meanwhile"
                    r"|If (?:yes|no|so|not))\b|(?:Now|Next), (?:we|let|I)\b)")
WORKS_ON = re.compile(r"(?:(?:Explanation|Solution|Comparison|Instructions|Directions|Total|Results?|Answer|Output)$|Calculat(?:e|ing|ions?)\b)")
PHRASE = r"((?:[a-z'-]+[ ]){0,2}?[a-z'-]{3,})(?=[^\w '-]|[ ](?:and|or|of|to|in|on|for|with|by|from|at|as|is|are|was|were|that|which|who|so|until|into|over)\b)"
CARRIED = [  # reason, how a part brings something in, how another part takes it up, times it must, only for these levels
    ("uses a value worked out in a sibling", r"[=≈][^\w\n]{0,6}(?!(?:19|20)\d\d\b)(\d[\d,.]*\d)", r"(\d[\d,.]*\d)", 1, ()),
    ("uses a name that a sibling defines", r"(?m)(?:^[ \t]*|\b(?:def|class|function|const|let|var|[Ll]et)[ ])(\w{2,})(?=[ ]*=[^=]|\()", r"\b(\w{2,})\b", 1, ()),
    ("takes up a thing that a sibling brings in", r"\b(?:[Aa]n?|one|two|three|another|some) " + PHRASE, r"\b[Tt]he " + PHRASE + "(?! (?:of|that|which|who|where|for)\\b)", 2, ()),
    ("goes on with a sibling's story", r"(?<=[a-z,] )([A-Z][a-z]{3,})", r"(?<=[a-z,] )([A-Z][a-z]{3,})", 2, ("step",)),
]
CARRIED = [(reason, re.compile(bring), re.compile(take), times, levels) for reason, bring, take, times, levels in CARRIED]


def stem(word):
    word = word.lower().split()[-1]
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


def refuse(text, at, titles, level, first_seen, prompt_words):
    """Why the parts are not independent, '' if nothing says so."""
    labels = [title[PREFIX.match(title).end():].strip(" *:_") for title in titles]
    if len({label.lower() for label in labels}) < len(labels):
        return "titles are not distinct"
    if any(map(WORKS_ON.match, labels)):
        return "works on what its siblings say"
    bodies = [text[s:e] for s, e in zip(at, at[1:])]
    for body in bodies[1:]:
        if OPENER.match(body):
            return "opens by continuing"
        if POINTER.search(body):
            return "points at a sibling"
    visible = prompt_words | {stem(w) for t in titles for w in NAME.findall(t)}
    for reason, bring, take, times, levels in CARRIED:
        if levels and level not in levels:
            continue
        brought, hits = set(), set()
        for k, body in enumerate(bodies):
            own = {stem(w) for w in bring.findall(body)}
            used = {stem(w) for w in take.findall(body[len(titles[k]):])} if k else set()
            hits |= {(w, k) for w in used & brought - visible - (own if levels == () else set()) if first_seen.get(w, 0) >= at[0]}
            brought |= own
        if len(hits) >= times:
            return reason
    return ""


# ---------------------------------------------------------------- selection
def cheapest(text, at, titles):
    """(steps saved, branches) of n sibling parts: all in one block, or long lists in groups of neighbours."""
    best = 0, []
    for size in range(1, len(titles) // 4 + 1 if len(titles) > GROUP_OVER else 2):
        cuts = at[:-1:size] + at[-1:]
        branches = list(zip(cuts, cuts[1:], titles[::size]))
        if len(branches) > MAX_BRANCHES:
            continue
        rest = [tokens(text[s + len(title):e]) for s, e, title in branches]
        saved = sum(rest) - max(rest) - 3 - 2 * len(branches)
        if saved > best[0]:
            best = saved, branches
    return best


def extract(text, prompt=""):
    refusals = []
    first_seen, prompt_words = {}, set(map(stem, NAME.findall(prompt)))
    for m in NAME.finditer(text):
        first_seen.setdefault(stem(m[0]), m.start())

    def close(run, starts, end):
        if len(run.items) < 2:
            return run.inside
        at = [starts[i] for i in run.items] + [starts[end]]
        last = text[at[-2]:at[-1]]
        at[-1] = at[-2] + min(len(last.rstrip()) + 1 + (last[len(last.rstrip()):][:2] == "\r\n"), len(last))
        items = [text[s:e] for s, e in zip(at, at[1:])]
        cuts = title_ends(items)
        titles = [item[:c] for item, c in zip(items, cuts)]
        saved, branches = cheapest(text, at, titles)
        if saved <= max(MIN_SAVED, sum(block[0] for block in run.inside)):
            reason = "saves no steps"
        else:
            reason = refuse(text, at, titles, run.key[0], first_seen, prompt_words)
        if reason:
            refusals.append((reason, at[0], at[-1]))
            return run.inside
        return [(saved, branches)]

    segments, done = [], 0
    for _, branches in parse(text, close):
        if branches[0][0] > done:
            segments.append(text[done:branches[0][0]])
        segments.append([Branch(title, text[s:e]) for s, e, title in branches])
        done = branches[-1][1]
    if done < len(text):
        segments.append(text[done:])
    return segments, refusals


# -----------------------------------------------------------------------------
# the tokenizer: a tiktoken byte-level BPE, learnt here, known by name, or read from a published tokenizer.json

# Every digit stands alone. The pattern means the same to `re`, which learns, and to tiktoken, which encodes.
PATTERN = r" ?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
# GPT-2's pattern, twice: as published, and after a pre-tokenizer has split the digits off one by one.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")
USER_FORM = ["{system}User: {prompt}\nAssistant:\n"]


class Tokenizer:
    """
    Text <-> ids. Text never becomes a tag or another special token, whatever it contains.
    pattern: how text is cut into words; ranks: {a token's bytes: its id, which is also its merge priority}; eos: an id;
    special: the ids of the tags (Special), None for a published model that has none; chat: the form of a prompt, text
    and special ids in turn; system: the default system text; nfc: normalise first.
    """

    def __init__(self, pattern, ranks, eos, special=None, chat=USER_FORM, system="", nfc=False):
        self.pattern, self.ranks, self.eos, self.special = pattern, ranks, eos, special
        self.chat, self.system, self.nfc = chat, system, nfc
        self.encoding = tiktoken.Encoding("aspd", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bytes = {i: token for token, i in ranks.items()}
        self.lacking = {b for b in range(256) if bytes([b]) not in ranks}  # rare bytes that a published one may lack

    def encode(self, text):
        """str -> list of ids. What UTF-8 cannot write and characters with a lacking byte become U+FFFD."""
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.lacking and not self.lacking.isdisjoint(text.encode()):
            text = "".join(c if self.lacking.isdisjoint(c.encode()) else "\ufffd" for c in text)
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """List of ids -> str; tags and end-of-text are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

    def prompt(self, text, system=None):
        """A user's text in the model's own chat form -> list of ids."""
        system = self.system if system is None else system
        ids = [[p] if isinstance(p, int) else self.encode(p.format(system=system, prompt=text)) for p in self.chat]
        return [i for piece in ids for i in piece]

    def add_tags(self, used=()):
        """Gives the six tags the first ids that neither the tokenizer nor its added tokens (`used`) use."""
        first = max([*self.ranks.values(), self.eos, *used]) + 1
        self.special = Special(*range(first, first + 6), self.eos)
        return self

    @property
    def vocab_size(self):
        """One more than the highest id."""
        return max([*self.ranks.values(), self.eos, *(self.special or ())]) + 1

    def state(self):
        """Plain values for a checkpoint; Tokenizer.load(state) gives the tokenizer back."""
        ranks = {token.decode("latin-1"): i for token, i in self.ranks.items()}
        return dict(pattern=self.pattern, ranks=ranks, eos=self.eos, special=self.special and list(self.special),
                    chat=self.chat, system=self.system, nfc=self.nfc)

    @classmethod
    def load(cls, state):
        """From the dict that state() gave."""
        ranks = {token.encode("latin-1"): i for token, i in state["ranks"].items()}
        special = state["special"] and Special(*state["special"])
        return cls(**{**state, "ranks": ranks, "special": special})


def learn_bpe(text, vocab_size=2048):
    """
    Byte pair encoding learnt from text: {token bytes: id}. tiktoken's own trainer rescans the whole text at every
    merge (minutes for a megabyte); this one counts each distinct word once and revisits only words that change.
    """
    counts = Counter(re.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    pairs, where = Counter(), {}
    for i, (parts, n) in enumerate(words):
        for pair in zip(parts, parts[1:]):
            pairs[pair] += n
            where.setdefault(pair, set()).add(i)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        ranks[best[0] + best[1]] = len(ranks)
        for i in where.pop(best):
            parts, n = words[i]
            for pair in zip(parts, parts[1:]):
                pairs[pair] -= n
            merged = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            words[i] = (merged, n)
            for pair in zip(merged, merged[1:]):
                pairs[pair] += n
                where.setdefault(pair, set()).add(i)
        pairs.pop(best, None)
    return ranks


def make_tokenizer(name, texts):
    """
    "bpe": learnt from the texts; a folder: its tokenizer; else a tiktoken name, which tiktoken may have to download.
    With tags.
    """
    if name == "bpe":
        ranks = learn_bpe("".join(itertools.islice(texts, 2000)))
        return Tokenizer(PATTERN, ranks, eos=len(ranks)).add_tags()
    if Path(name).is_dir():
        tokenizer, used = published_tokenizer(name)
        return tokenizer.add_tags(used)
    encoding = tiktoken.get_encoding(name)
    return Tokenizer(encoding._pat_str, encoding._mergeable_ranks, encoding.eot_token).add_tags()


def published_tokenizer(path):
    """
    The byte-level BPE of a published folder as a Tokenizer with the same ids, without tags, and its added ids.
    ValueError naming a setting of tokenizer.json that would change ids and is not implemented.
    """
    read = lambda name: json.loads(Path(path, name).read_text(encoding="utf-8")) if Path(path, name).exists() else {}
    t, config = read("tokenizer.json"), read("tokenizer_config.json")
    if not t:
        raise ValueError(f"{path} has no tokenizer.json (a SentencePiece tokenizer is not supported)")
    model = t["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise ValueError(f"{path}/tokenizer.json: {model.get('type')} with byte fallback or dropout is not supported")
    normalizer = (t.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"{path}/tokenizer.json: the normalizer {normalizer} is not supported")
    added = {a["content"]: a["id"] for a in t["added_tokens"]}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes each byte as a visible character
    hidden = [b for b in range(256) if b not in visible]
    to_byte = {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}
    ranks = {bytes(to_byte[c] for c in token): i for token, i in model["vocab"].items() if token not in added}
    merged = [model["vocab"]["".join(m) if isinstance(m, list) else m.replace(" ", "")] for m in model["merges"]]
    if merged != sorted(merged):
        raise ValueError(f"{path}/tokenizer.json: ids that do not follow the order of the merges are not supported")
    template = config.get("chat_template") or ""
    if Path(path, "chat_template.jinja").exists():
        template = Path(path, "chat_template.jinja").read_text(encoding="utf-8")
    chat, system = chat_form(template, added, path)
    eos = config.get("eos_token")
    eos = added[eos["content"] if isinstance(eos, dict) else eos]
    pattern = split_pattern(t.get("pre_tokenizer") or {}, path)
    return Tokenizer(pattern, ranks, eos, None, chat, system, normalizer == "NFC"), list(added.values())


def split_pattern(pre, path):
    """The pre_tokenizer of a tokenizer.json -> one tiktoken pattern."""
    parts = pre.get("pretokenizers", [pre])
    shape = [p.get("type") for p in parts]
    if not any(p.get("add_prefix_space") for p in parts):
        if shape == ["ByteLevel"] and parts[0].get("use_regex", True):
            return GPT2
        if shape == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1].get("use_regex", True):
            return GPT2_DIGITS
        if shape == ["Split", "ByteLevel"] and parts[0]["behavior"] == "Isolated" and not parts[0].get("invert") \
                and not parts[1].get("use_regex", True):
            return parts[0]["pattern"]["Regex"]
    raise ValueError(f"{path}/tokenizer.json: the pre_tokenizer {json.dumps(pre)[:200]} is not supported")


def chat_form(template, added, path):
    """A chat template -> the form of a prompt and the default system text. ChatML, or none at all."""
    if "<|im_start|>" not in template:
        if template:
            raise ValueError(f"{path}: the chat template is not ChatML, which is the only one supported")
        return ["{system}{prompt}\n"], ""
    start, end = added["<|im_start|>"], added["<|im_end|>"]
    default = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"<{]+)<\|im_end\|>", template)
    form = [start, "system\n{system}", end, "\n", start, "user\n{prompt}", end, "\n", start, "assistant\n"]
    return form, default[1] if default else ""


# -----------------------------------------------------------------------------
# The built-in corpus: ordinary chat answers without tags, written by a seeded generator over a small table of facts.
# A topic: noun | verb | its order | what a short list gives, and how; three sentences; then its things, least first.
TOPICS = """\
planets|is|small|larg|positions|{1}
The {1} planet from the Sun, about {2} km across at its equator.
{0} goes around the Sun in about {3} and turns once on its axis in about {4}.
{0} is named after the {5}, and it is best known for {6}.
Mercury|first|4,900|88 days|59 days|messenger of the Roman gods|its many craters and its lack of air
Mars|fourth|6,800|687 days|25 hours|Roman god of war|rusty red dust and the tallest known volcano
Venus|second|12,100|225 days|243 days|Roman goddess of love|thick clouds and a surface hot enough to melt lead
Earth|third|12,800|365 days|24 hours|ground under our feet|wide oceans, green forests and all its living things
Neptune|eighth|49,500|165 years|16 hours|Roman god of the sea|a blue colour and very fast winds
Uranus|seventh|51,100|84 years|17 hours|Greek god of the sky|a tilt so strong that it rolls along on its side
Saturn|sixth|121,000|29 years|11 hours|Roman god of farming|wide bright rings made of ice and rock
Jupiter|fifth|143,000|12 years|10 hours|king of the Roman gods|the Great Red Spot, a storm seen for centuries

animals|are|light|heavi|young|{6}
{1} that feed mostly on {2} and weigh about {3} kg when fully grown.
{0} stand out in two ways: they have {4}, and they {5}.
{0} raise young called {6}, which stay close to a parent at first.
hedgehogs|Shy mammals of woods and gardens|beetles and worms|1|thousands of spines|roll into a ball in danger|hoglets
koalas|Furry mammals of Australia|eucalyptus leaves|10|fingerprints much like ours|sleep for most of the day|joeys
cheetahs|Slim cats of dry grassland|gazelles and hares|50|dark tear marks on the face|purr but cannot roar|cubs
ostriches|Birds of African plains|plants and seeds|120|only two toes on each foot|run fast but cannot fly|chicks
tigers|Striped cats of Asian forests|deer and wild pigs|200|sharp eyes for the night|swim very well and hunt alone|cubs
giraffes|Mammals of the African savanna|acacia leaves|1,000|a neck about two metres long|sleep very little|calves
hippos|Bulky mammals of African rivers|grass|1,500|jaws that open very wide|keep cool in water all day|calves
elephants|Mammals of Africa and Asia|grass and bark|5,000|a trunk that is nose and arm in one|talk in low rumbles|calves

countries|is|small|larg|capitals|{2}
A country in {1} with {2} as its capital and the {3} as its currency.
{0} covers about {4} square km, and its longest river is the {5}.
{0} has a flag with {6}, and most visitors come for {7}.
Iceland|northern Europe|Reykjavik|krona|103,000|Thjorsa|a red and white cross|volcanoes, glaciers and hot springs
Italy|southern Europe|Rome|euro|300,000|Po|green, white and red stripes|Roman ruins, old paintings and fresh pasta
Japan|East Asia|Tokyo|yen|378,000|Shinano|a red disc on white|cherry blossom, quiet temples and fast trains
Egypt|North Africa|Cairo|pound|1.0 million|Nile|a golden eagle|pyramids that are about 4,500 years old
Australia|Oceania|Canberra|dollar|7.7 million|Murray|six white stars on blue|coral reefs, kangaroos and long beaches
Brazil|South America|Brasilia|real|8.5 million|Amazon|a starry blue globe|carnival, waterfalls and rainforest
China|East Asia|Beijing|yuan|9.6 million|Yangtze|five yellow stars on red|a very long wall and giant pandas
Canada|North America|Ottawa|dollar|10.0 million|Mackenzie|a red maple leaf|mountain lakes, forests and ice hockey

elements|is|light|heavi|symbols|{2}
{1} with the symbol {2} and an atomic mass of about {3}.
{0} owes its symbol to the Latin word {4}, and it is used in {5}.
{0} is best known for {6}, and as a rule it {7}.
hydrogen|A colourless gas|H|1|hydrogenium|rockets and fertiliser plants|burning to plain water|is found in compounds
helium|A colourless gas|He|4|helium|balloons and hospital scanners|making voices sound high|forms no compounds at all
carbon|A black or clear solid|C|12|carbo|steel, pencils and filters|being graphite or diamond|forms four bonds
oxygen|A colourless gas|O|16|oxygenium|hospitals and welding torches|keeping fires alight|makes up a fifth of the air
iron|A grey metal|Fe|56|ferrum|bridges, cars and tools|rusting in damp air|is drawn to magnets
copper|A reddish metal|Cu|64|cuprum|cables, pipes and coins|carrying electricity and heat|turns green outdoors over the years
gold|A shiny yellow metal|Au|197|aurum|rings, coins and electronics|keeping its shine for ages|is sold by the ounce
lead|A soft grey metal|Pb|207|plumbum|car batteries and heavy weights|stopping X-rays|harms people even in small amounts"""
TOPICS = [[line.split("|") for line in block.splitlines()] for block in TOPICS.split("\n\n")]
SOUP = """\
Wash the {0} and cut them into small pieces.
Fry these pieces in a large pot with a little oil for 5 minutes.
Pour 1 litre of water over the mixture and bring it to the boil.
Now let that {1} simmer until the {2} are soft, then season it with salt."""
VEGETABLES = "carrots leeks potatoes onions peas beans tomatoes mushrooms".split()
STYLES = {  # opening, then what stands before, between and after the sentences of a branch
    "numbered": ("Here are the {} {}, one by one:", "{}. {}: ", " ", "\n"),
    "bulleted": ("Here is what to know about the {} {}:", "- **{1}**: ", " ", "\n"),
    "headed": ("This is a short guide to the {} {}.", "### {1}\n\n", " ", "\n\n"),
    "labelled": ("The {} {} differ in several ways.", "**{1}**: ", " ", "\n\n"),
    "nested": ("Key facts about the {} {}:", "- **{1}**\n  - ", "\n  - ", "\n"),
}
PROMPTS = {
    "numbered": ("Make a numbered list about {}.", "Walk me through {}, one by one.", "Describe {} in a numbered list."),
    "bulleted": ("Tell me about {}.", "What should I know about {}?", "Give me bullet points on {}."),
    "headed": ("Write a guide to {}.", "Write a section about each of {}.", "Write a report on {} with headings."),
    "labelled": ("Compare {}.", "How do {} differ?", "What sets {} apart?"),
    "nested": ("Make a fact sheet for {}.", "Give me the key facts about {}.", "Take notes on {}."),
    "two-lists": ("Tell me about {}, then about {}.", "Make a list on {} and one on {}.", "Two topics, please: {}; {}."),
    "sums": ("Add {} step by step.", "What is the sum of {}?", "I walked {} km on my trips. How far is that in all?"),
    "steps": ("How do I make a {1} with {0}?", "Give me a {1} recipe with {0}.", "I have {0}. Explain how to make a {1}."),
    "short-list": ("What are the {1} of {0}?", "List only the {1} of {0}.", "Just the {1} of {0}, please."),
    "prose": ("Write one paragraph about {}.", "Describe {} in a few sentences.", "In short, what can you say about {}?"),
}
SIZES = (2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 8, 8)  # branches of a list
COUNT = "zero one two three four five six seven eight".split()


def listing(words):
    return ", ".join(words[:-1]) + " and " + words[-1]


def sentences(topic, row):
    return [line.format(row[0].capitalize(), *row[1:]) for line, in topic[1:4]]


def conclusion(topic, rows):
    """what only the whole answer can tell: the ends of the order that the topic's things stand in"""
    _, verb, low, high, *_ = topic[0]
    least, *_, most = [row[0] for row in sorted(rows, key=topic.index)]
    end = "er" if len(rows) == 2 else "est"
    return f"Overall, {most} {verb} the {high}{end} of the {COUNT[len(rows)]} and {least} the {low}{end}."


def list_answer(topic, rows, style):
    opening, before, between, after = STYLES[style]
    answer = opening.format(COUNT[len(rows)], topic[0][0]) + "\n\n"
    for i, row in enumerate(rows, 1):
        answer += before.format(i, row[0].capitalize()) + between.join(sentences(topic, row)) + after
    return answer.rstrip() + "\n\n" + conclusion(topic, rows)


def steps_answer(opening, steps, closing):
    return "\n".join([opening, "", *(f"{i}. {step}" for i, step in enumerate(steps, 1)), "", closing])


def draw(category, rng):
    """(what the answer is about, what goes into the prompt, the answer)"""
    if category == "sums":
        numbers = [rng.randint(2, 7) for _ in range(rng.choice((3, 4)))]
        steps = [f"Add {n}: {t} + {n} = {t + n}." for t, n in zip(itertools.accumulate(numbers), numbers[1:])]
        answer = steps_answer(f"Start with {numbers[0]}:", steps, f"The total is {sum(numbers)}.")
        return numbers, [listing([str(n) for n in numbers])], answer
    if category == "steps":
        foods, dish = rng.sample(VEGETABLES, rng.choice((2, 3, 4))), rng.choice(("soup", "stew"))
        steps = SOUP.format(listing(foods), dish, foods[-1]).splitlines()
        return foods, [listing(foods), dish], steps_answer(f"To make the {dish}:", steps, f"Enjoy your {dish}!")
    styles = {"two-lists": ["bulleted", "numbered"]}.get(category, [category])
    sizes = {"two-lists": (3, 4, 4), "short-list": (2, 3, 4), "prose": (2, 2, 3)}.get(category, SIZES)
    topics = rng.sample(TOPICS, len(styles))
    picks = [rng.sample(topic[4:], rng.choice(sizes)) for topic in topics]
    topic, rows, asked, form = topics[0], picks[0], *topics[0][0][-2:]
    about, words = [row[0] for rows in picks for row in rows], [listing([row[0] for row in rows]) for rows in picks]
    if category == "prose":
        return about, words, " ".join(sum([sentences(topic, row)[1:] for row in rows], []) + [conclusion(topic, rows)])
    if category == "short-list":
        lines = [f"- {row[0].capitalize()}: {form.format(*row)}" for row in rows]
        return about, [*words, asked], "\n".join([f"Here are the {asked}:", "", *lines])
    return about, words, "\n\n".join(map(list_answer, topics, picks, styles))


def corpus(n=6000, seed=1337, split="train"):
    """n records {"id", "category", "prompt", "response", "facts"}; a "val" set of things is never in "train" """
    rng, records = random.Random(f"{split} {seed}"), []
    while len(records) < n:
        category = list(PROMPTS)[len(records) % len(PROMPTS)]
        about, words, response = draw(category, rng)
        if (split == "val") == (zlib.crc32(str(sorted(about)).encode()) % 8 == 0):  # an eighth of all sets is held out
            prompt = rng.choice(PROMPTS[category]).format(*words)
            facts = re.split(r"(?<=\w\w[.!])\s+|\n+(?=[-\d])", response)  # each sentence, with the label before it
            records.append({"id": f"{split}-{len(records)}", "category": category, "prompt": prompt,
                            "response": response, "facts": facts})
    return records


def facts_right(answer, facts):
    """share of the facts that the answer states, whatever its line breaks"""
    answer = " ".join(answer.split())
    return sum(" ".join(fact.split()) in answer for fact in facts) / len(facts)


# -----------------------------------------------------------------------------
# rows and batches

def split_held_out(records, percent=2):
    """(train, held out): by prompt, so that no prompt is on both sides; the same split on every run."""
    held = [zlib.crc32(r["prompt"].encode("utf-8", "replace")) % 100 < percent for r in records]
    return [r for r, h in zip(records, held) if not h], [r for r, h in zip(records, held) if h]


def make_rows(records, tokenizer, config, mode="aspd", limit=None):
    """
    Lays every answer out, tagged ("aspd") or as it stands ("serial") -> (rows, lengths of the tagged rows, Stats).
    An answer longer than the limit (tokens; none: the context), or with a branch longer than the stride, is left out,
    in both modes alike.
    """
    special = tokenizer.special or Special(*[tokenizer.eos] * 7)  # without tags only lengths count
    rows, lengths, figures = [], [], []
    for r in tqdm(records, desc="tokenizing", leave=False, disable=None):
        segments, _ = extract(r["response"], r["prompt"])
        prompt, ids = tokenizer.prompt(r["prompt"]), tokenize(segments, tokenizer.encode)
        try:
            row = layout(prompt, ids, special, config.positions, config.stride)
        except ValueError:  # a branch is longer than the stride
            continue
        if max(row.position.max(), len(row.token) - 1) < min(limit or config.block_size, config.block_size):
            rows.append(row if mode == "aspd" else layout(prompt, [tokenizer.encode(r["response"])], special))
            lengths.append(len(row.token))
            figures.append(stats(ids))
    return rows, lengths, figures


def batches(lengths, batch_size, seed):
    """
    Endlessly yields lists of batch_size indices, of like length so that little is padding, each epoch in a new order.
    The order depends on the seed alone.
    """
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        order, pool, groups = rng.permutation(len(lengths)), 16 * batch_size, []
        for start in range(0, len(order), pool):
            part = sorted(order[start:start + pool], key=lambda i: lengths[i])
            groups += [part[k:k + batch_size] for k in range(0, len(part), batch_size)]
        for g in rng.permutation(len(groups)):
            yield groups[g]


def collate(rows, device="cpu"):
    """
    Rows -> (idx, position, mask, pick, target), padded on the right. idx, position: (B, T). mask: (B, 1, T, T) bool,
    or None where no row has a block, which is plain causal. pick, target: (N,) the flat indices of the tokens that
    have a target, and their targets.
    """
    T = max(len(r.token) for r in rows)
    token, block, branch, position, target = (
        torch.from_numpy(np.stack([np.pad(a, (0, T - len(a)), constant_values=fill) for a in arrays])).to(device)
        for arrays, fill in zip(zip(*rows), (0, 0, 0, 0, IGNORE)))
    mask = branch_mask(block, branch)[:, None] if block.any() else None
    pick = (target.flatten() != IGNORE).nonzero()[:, 0]
    return token, position, mask, pick, target.flatten()[pick]


# -----------------------------------------------------------------------------
# command line

def write_whole(path, lines):
    """Writes the lines to a file whole or not at all."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.writelines(line + "\n" for line in lines)
    os.replace(temporary, path)


COLOURS = [31, 32, 33, 34, 35, 36]


def show(record, segments, refusals, colour):
    """Prints an answer with its blocks: a bar of its own colour at every branch, the title underlined."""
    paint = lambda code, text: f"\x1b[{code}m{text}\x1b[0m" if colour else text
    print(paint(1, f"\n--- {record['id']}: {record['prompt'][:100]!r}"))
    for s in segments:
        if isinstance(s, str):
            print(s, end="" if s.endswith("\n") else "\n")
            continue
        for i, b in enumerate(s):
            bar, rest = paint(COLOURS[i % 6], "| "), b.text[len(b.title):].rstrip("\n")
            print(bar + paint(4, b.title) + rest.replace("\n", "\n" + bar))
    for reason, start, end in refusals:
        print(paint(2, f"    refused, {reason}: {record['response'][start:start + 60]!r}"))


def parse_args():
    p = argparse.ArgumentParser(description="Finds the independent parts of answers. Next: python train.py")
    p.add_argument("file", nargs="?", help='JSON or JSON Lines of {"prompt", "response"}, Alpaca or ShareGPT records; '
                                           "default: the built-in corpus")
    p.add_argument("--out", metavar="OUT.jsonl", help="write the segments of every answer here")
    p.add_argument("--show", type=int, default=0, metavar="N", help="print N answers with their blocks (%(default)s)")
    p.add_argument("--tokenizer", default="bpe", help="counts the tokens: bpe (learnt from the answers), a tiktoken name "
                                                      "or a published model's folder (%(default)s)")
    return p.parse_args()


def main():
    args = parse_args()
    records = lambda: read_records(args.file) if args.file else iter(corpus())
    tokenizer = make_tokenizer(args.tokenizer, (r["response"] for r in records()))
    figures, reasons = {}, Counter()

    def lines():
        for n, r in enumerate(tqdm(records(), desc="answers", disable=None)):
            segments, refusals = extract(r["response"], r["prompt"])
            if join(segments) != r["response"]:
                raise AssertionError(f"answer {r['id']} does not join back")
            if n < args.show:
                show(r, segments, refusals, sys.stdout.isatty() and "NO_COLOR" not in os.environ)
            figures.setdefault(r.get("category", "all"), []).append(stats(tokenize(segments, tokenizer.encode)))
            reasons.update(reason for reason, _, _ in refusals)
            small = {k: r[k] for k in ("id", "category", "model", "prompt") if k in r}
            blocks = [s if isinstance(s, str) else {"branches": [b._asdict() for b in s]} for s in segments]
            yield json.dumps({**small, "segments": blocks}, ensure_ascii=False)

    if args.out:
        write_whole(args.out, lines())
    else:
        for _ in lines():
            pass
    if len(figures) > 1:
        figures["all"] = sum(figures.values(), [])
    print(f"\n{'category':<16}{'answers':>8}{'PPD':>8}{'ABN':>8}{'APD':>8}{'APE':>8}{'speedup':>9}{'best':>7}")
    for name, values in figures.items():
        s = summary(values)
        print(f"{name:<16}{s['answers']:>8}{s['PPD']:>8.1%}{s['ABN']:>8.2f}{s['APD']:>8.1%}{s['APE']:>8.1%}"
              f"{s['speedup']:>9.2f}{s['best']:>7.2f}")
    print("\nblocks refused:")
    for reason, n in reasons.most_common():
        print(f"{n:>8}  {reason}")


if __name__ == "__main__":
    cli(main)
