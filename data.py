"""
Text in: loading, the extraction of parallel structure, the tokenizer, the built-in corpus and batches.

    python data.py                       # what the extractor finds in the built-in corpus
    python data.py FILE --show 3         # in your answers (JSON or JSON Lines), three of them in colour
    python data.py FILE --out OUT.jsonl  # and write their segments

An answer enters as plain text. extract() cuts it into segments without losing a character and checks that the branches
do not need each other; a Tokenizer turns them into ids; make_rows() lays them out for training.
"""
import re
from collections import Counter
from itertools import accumulate
from types import SimpleNamespace
from typing import NamedTuple
import argparse
import itertools
import json
import os
import random
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from aspd import IGNORE, Branch, Special, branch_mask, join, layout, stats, summary, tally, tokenize

# -----------------------------------------------------------------------------
# loading: {"prompt", "response"}, Alpaca and ShareGPT, as JSON or JSON Lines

MAX_LINE = 64 * 2**20  # bytes


def parse_json(raw, where):
    """Bytes -> object. ValueError with the place for what is not JSON in UTF-8."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not JSON: {e}") from None


def read_objects(path):
    """Yields (place, dict) of every record of a file. ValueError with the place of one that is something else."""
    for where, record in read_json(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
        yield where, record


def read_json(path):
    """Yields (place, value) of a JSON array, or of JSON Lines with one line in memory at a time."""
    with open(path, "rb") as f:
        array = f.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        f.seek(0)
        if array:
            for n, record in enumerate(parse_json(f.read(), path), start=1):
                yield f"{path}, record {n}", record
            return
        for n, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise ValueError(f"{path}, line {n}: longer than {MAX_LINE} bytes")
            if line.strip():
                yield f"{path}, line {n}", parse_json(line, f"{path}, line {n}")


def text_field(record, where, name, value):
    """The value, a non-empty str. ValueError naming the fields that the record has instead."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: no {name} in a record with the fields {', '.join(record) or '(none)'}")
    return value


def read_records(path):
    """
    Yields {"id", "prompt", "response"} and the record's other small fields, for every answer in a file. Passes over
    conversations without an answer; other records without one, and a file with none at all, raise ValueError.
    """
    n = 0
    for where, r in read_objects(path):
        try:
            for answer in record_answers(r, where):
                yield {"id": n, **answer}
                n += 1
        except (AttributeError, TypeError) as e:
            raise ValueError(f"{where}: no prompts and answers in its fields {', '.join(r)}: {e}") from None
    if n == 0:
        raise ValueError(f"{path}: no usable answers")


def record_answers(r, where):
    """The answers of one record, as read_records() yields them."""
    small, prompt = {k: r[k] for k in ("id", "category", "model", "facts") if k in r}, ""
    if "conversations" in r:
        for n, turn in enumerate(r["conversations"]):
            text = (turn.get("value") or "") + ""  # TypeError for what is not text
            if turn.get("from") in ("human", "user"):
                prompt = text
            elif turn.get("from") != "system" and text.strip():
                yield {**small, "id": f"{r.get('id', '')}-{n}", "prompt": prompt, "response": text}
        return
    prompt, response = r.get("prompt"), r.get("response")
    if "instruction" in r:
        prompt, response = "\n\n".join(filter(None, (r["instruction"], r.get("input")))), r.get("output")
    yield {**small, "prompt": text_field(r, where, "prompt", prompt),
           "response": text_field(r, where, "answer", response)}


def read_prompts(path):
    """The {"prompt", "category"} of a file, as a list. ValueError for a record without a prompt, or for no records."""
    prompts = [{"category": r.get("category"), "prompt": text_field(r, where, "prompt", r.get("prompt"))}
               for where, r in read_objects(path)]
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def write_whole(path, lines):
    """Writes the lines to a file whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f:  # in JSON, a lone surrogate's escape
            f.writelines(line + "\n" for line in lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cli(main):
    """Runs a command line's main(): bad input becomes one clear line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- extraction



MAX_BRANCHES = 16  # the engine's width
GROUP_OVER = 10    # a longer list may put neighbours into one branch
MIN_SAVED = 6      # words; a smaller gain is not worth its tags
LABEL_WORDS = 3    # a longer label is cut to the fewest words that tell its part apart

# ---- structure: what opens a part, and its rank (the smaller, the further out; a list item adds its indentation)
LEVELS = [(level, rank, re.compile(pattern)) for level, rank, pattern in [  # group 1: siblings open alike
    *[("heading", rank, rf"({'#' * rank})[ \t]+\S") for rank in range(1, 7)],
    ("bold line", 7, r"(\*\*|__)[^\s*_][^*_\n]{0,100}(?:\*\*|__)[:：]?\s*$"),
    ("number", 10, r"((?:\*\*)?[(（]?)(?:(\d{1,3})|[ivxIVX]{2,5}|[^\W\d_])(?:[.)）．](?=\s|\*\*|[一-鿿])|、)"),
    ("bullet", 10, r"([-*+•‣◦▪●–])[ \t]+\S"),
    ("label", 8, r"((?:\*\*|__)?)(?!Here|Note)[^\W\d_a-z][^\s:.!?]{0,30}(?: [^\s:.!?]{1,30}){0,7}(?::(?=\s|\*|$)|：)"),
    ("ordinal", 9, r"()(?:(?:First|Second|Third|Final|Last)(?:ly)?,|(?:One|Another) |(?:Additional|Further|More)\w+,)"),
]]
OPAQUE = re.compile(r"[ \t]*(?:(```|~~~)|\|)")  # code and tables are never cut
PREFIX = re.compile(r"\W*(?:\w{1,3}[.)）．、](?=[\s*一-鿿]))?\W*")  # the marker of a part
WORKS_ON = (r"(?:In )?Summary|(?:Key )?Takeaway|Bottom Line|In short|Overall|Therefore|总结|Final Answer|Calculating"
            r"|(?:Explanation|Solution|Comparison|Instructions|Directions|Total|Output|Answer|Results?)[ \t]*[:*\n]")


def bare(text):
    """The text without the marker it opens with."""
    return text[PREFIX.match(text).end():]


def read_marks(lines):
    """(kind, rank, number) of each line: kind is a tuple if it opens a part, else "text", "opaque" or "" (blank)."""
    marks, fenced = [], False
    for line in lines:
        fence, depth = OPAQUE.match(line), len(line) - len(line.lstrip())
        fenced ^= bool(fence and fence[1])
        kind, rank, number = "text" if line.strip("-*_ \t\r\n") else "", 10 + depth, 0
        for level, outer, pattern in LEVELS if kind and not fence and not fenced and depth < 13 else ():
            if (outer > 9 or depth < 2) and (m := pattern.match(line, depth)):
                number = int(m[2] or 0) if level == "number" else 0
                kind, rank = (level, m[1], depth, number > 0), outer + depth * (outer > 9)
                break
        marks.append(("opaque" if fence or fenced else kind, rank, number))
    return marks


def find_runs(lines, marks):
    """Runs of sibling parts, outer ones first: the lines where parts start, the line where the last one ends."""
    runs, stack = [], []  # stack: runs that may go on, each inside a part of the one before
    for i, (kind, rank, number) in enumerate(marks):
        if isinstance(kind, tuple):
            k = next((k for k, run in enumerate(stack) if run.rank > rank or run.kind == kind), len(stack))
            if rank < 10 and re.match(WORKS_ON, bare(lines[i]), re.I):
                kind = None  # works on the parts before it: ends their run, and nothing joins it
            joins = k < len(stack) and stack[k].kind == kind and number >= stack[k].number
            while len(stack) > k + joins:
                stack.pop().end = i
            if not joins:
                runs.append(SimpleNamespace(kind=kind, rank=rank, nested=len(stack) > 0, parts=[], end=len(lines),
                                            held=0, allowed=rank < 9))
                stack.append(runs[-1])
            run = stack[-1]
            run.parts.append(i)
            run.number, run.held, run.allowed = number, 0, max(run.allowed, run.held)
        elif kind == "text" and (i == 0 or marks[i - 1][0] in ("", "opaque")):
            while stack and rank <= max(stack[-1].rank, 10):
                stack[-1].held += 1
                if len(stack[-1].parts) < 2 or stack[-1].held <= stack[-1].allowed:
                    break
                stack.pop().end = i  # more than its siblings hold: the answer goes on after the list
    return [run for run in runs if len(run.parts) > 1]


# ---- titles
LABEL_END = re.compile(r"[:：]|\*\*|__| [-–—](?: |$)")
WORD = re.compile(r"[一-鿿ぁ-ヿ]|[^\s:：*一-鿿ぁ-ヿ]+")


def name_parts(parts):
    """A title for each part: its label if that is short, else the fewest words that no sibling starts with."""
    heads, titles = [], []
    for part in parts:  # the first line up to each of its first words; something of the part stays after its title
        line = part[:300].split("\n")[0].rstrip()
        words = WORD.finditer(line, len(line) - len(bare(line)))
        heads.append([line[:m.end()] for m in words if m.end() < len(part)][:16] or [line])
    count = Counter(bare(head).lower() for openings in heads for head in openings)
    for openings in heads:
        label = [opening for opening in openings if not LABEL_END.search(bare(opening))]
        unique = [opening for opening in openings if count[bare(opening).lower()] == 1 and len(bare(opening)) > 4]
        titles.append(label[-1] if 0 < len(label) <= LABEL_WORDS else [*unique, openings[-1]][0])
    return titles


# ---- validation: a branch may rely on the question, the text before its block and all titles, not on a sibling's body
NAME = re.compile(r"[^\W_](?:[\w.,'-]*\w)?")
NOUN = r"(?:[a-z'-]+ ){0,2}?([a-z'-]{3,}?)s?(?=[^\w '-]| (?:and|or|of|to|in|on|for|with|by|from|at|is|are|that)\b)"
SAYS = [  # reason, what a part of the block says after its marker: it goes on from, or works on, what a sibling says
    ("works on what its siblings say", rf"(?i)\A(?:{WORKS_ON})"),  # a list item; a heading has ended its run
    ("is a song or a play", r"(?m)^[^\w\n]{0,9}(?:Verse|(?:Pre-)?Chorus|Outro|Stanza|Scene|Act)\b[^a-z\n]{0,40}$"),
    ("solves an equation step by step", r"(?m)^[ \t]*[\dxyz()][\dxyz ()+*/^.-]{0,40}=[\dxyz ()+*/^.-]{0,40}$"),
    ("steps of one recipe", r"\A[^\n]{0,400}(?:\b[Tt]he mixture\b|\b[Pp]reheat|\bset (?:it |them )?aside\b)"),
    ("opens by going on", r"\A(?:However|Thus|As a result|Then|Meanwhile|N(?:ow|ext)(?=,)|If (?:yes|no|so|not))\b"),
    ("points at a sibling", r"\A[A-Z]\w+ th(?:is|ese) [a-z]|\bas \w+ (?:above|earlier)\b|(?<=[a-z,(] )[Ss]teps? \d"
     r"|\b[Rr]epeat (?:the|steps?)\b|\b(?:above|previous|preceding|the last) (?:step|section|item|part|day)\b"),
]
BRINGS = [  # reason, what a part brings in, how a later one takes it up (unseen before), how often, title of the parts
    ("uses a value worked out in a sibling", r"[=≈][^\w\n]{0,6}(\d[\d,.]*\d)", r"\d[\d,.]*\d", 1, ""),
    ("uses a name that a sibling defines", r"(?m)(?:^[ \t]*|\b(?:def|let) )(\w{2,})(?= *=[^=]|\()", r"\w{2,}", 1, ""),
    ("takes up a thing of a sibling", rf"\b(?:[Aa]n?|one|some) {NOUN}", rf"\b[Tt]he {NOUN}(?! (?:of|that|wh))", 2, ""),
    ("goes on with a sibling's story", *[r"(?<=[a-z,] )[A-Z][a-z]{3,}"] * 2, 4, r"\W*[A-Z]\w+ \d"),
]


def dependence(parts, titles, seen, start):
    """Yields why the parts are not independent. seen: where each word is said first; start: of the block."""
    if len({bare(title).strip(" *:_").lower() for title in titles}) < len(titles):
        yield "titles are not distinct"
    for reason, pattern in SAYS:
        if any(re.search(pattern, bare(part)) for part in parts):
            yield reason
    for reason, brings, takes_up, times, only in BRINGS:
        brought, hits, titled = set(), 0, " ".join(titles).lower()
        for part, title in zip(parts, titles) if re.match(only, titles[0]) else ():
            own = set(re.findall(brings, part))
            taken = set(re.findall(takes_up, part[len(title):])) & brought - (set() if only else own)
            hits += sum(seen.get(w.lower().rstrip("s"), -1) >= start and w.lower() not in titled for w in taken)
            brought |= own
        if hits >= times:
            yield reason


def group(parts, titles):
    """How many neighbours share a branch, 0 if no steps are saved: one, or more where the list is long."""
    n, length, best = len(parts), [len(WORD.findall(part)) for part in parts], (MIN_SAVED, 0)
    for size in {-(-n // count) for count in range(4, MAX_BRANCHES + 1)} if n > GROUP_OVER else {1}:
        rest = [sum(length[i:i + size]) - len(WORD.findall(titles[i])) for i in range(0, n, size)]
        # the longest rest is still waited for, and the tags: two a title, <|para|>, <|/para|> and one <|/branch|>
        best = max(best, (sum(rest) - max(rest) - 2 * len(rest) - 3, size))
    return best[1]


def extract(text, prompt=""):
    """Segments of the answer, and its refused blocks as (reason, start, end)."""
    segments, refusals, done, seen = [], [], 0, {}
    for m in NAME.finditer(prompt + "\n" + text):  # where a word is first said; in the prompt: before 0
        seen.setdefault(m[0].lower().rstrip("s"), m.start() - len(prompt) - 1)
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    starts, marks = [0, *accumulate(map(len, lines))], read_marks(lines)
    for run in find_runs(lines, marks):
        while run.nested and not marks[run.end - 1][0]:  # blank lines after the last part are the outer part's
            run.end -= 1
        at = [starts[k] for k in [*run.parts, run.end]]
        if at[0] < done:
            continue
        parts = [text[start:end] for start, end in zip(at, at[1:])]
        titles = name_parts(parts)
        size = group(parts, titles)
        reason = next(dependence(parts, titles, seen, at[0]), "") if size else "saves no steps"
        if reason:
            refusals.append((reason, at[0], at[-1]))
        else:
            segments.append(text[done:at[0]])
            segments.append([Branch(titles[i], "".join(parts[i:i + size])) for i in range(0, len(parts), size)])
            done = at[-1]
    return [segment for segment in [*segments, text[done:]] if segment], refusals


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
    special: the ids of the tags, None for a published model that has none; chat: the form of a prompt, text and special
    ids in turn; system: the default system text; nfc: normalise first. Tokenizer(**state()) is the same tokenizer.
    """

    def __init__(self, pattern, ranks, eos, special=None, chat=USER_FORM, system="", nfc=False):
        self.pattern, self.ranks, self.eos, self.special = pattern, ranks, eos, special and Special(*special)
        self.chat, self.system, self.nfc = chat, system, nfc
        self.encoding = tiktoken.Encoding("aspd", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bytes = {i: token for token, i in ranks.items()}
        self.lacking = {b for b in range(256) if bytes([b]) not in ranks}  # rare bytes that a published one may lack

    def state(self):
        """Plain values for a checkpoint."""
        return {**{k: getattr(self, k) for k in ("pattern", "ranks", "eos", "chat", "system", "nfc")},
                "special": self.special and tuple(self.special)}

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
        fill = {"prompt": text, "system": self.system if system is None else system}
        form = self.chat[4:] if not fill["system"] and "system\n{system}" in self.chat else self.chat  # no empty turn
        ids = [[p] if isinstance(p, int) else self.encode(p.format(**fill)) for p in form]
        return sum(ids, [])

    def add_tags(self, used=()):
        """Gives the tags the first ids that neither the tokenizer nor its added tokens (`used`) use -> self."""
        taken = {*self.bytes, *used, self.eos}
        self.special = Special(*itertools.islice((i for i in itertools.count() if i not in taken), 6), self.eos)
        return self

    @property
    def vocab_size(self):
        """One more than the highest id."""
        return max(*self.bytes, self.eos, *(self.special or ())) + 1


def learn_bpe(text, vocab_size=2048):
    """
    Byte pair encoding learnt from text -> ranks. tiktoken's own trainer rescans the whole text at every merge (minutes
    for a megabyte); this one counts each distinct word once and revisits only the words that a merge changes.
    """
    words = [([bytes([b]) for b in word.encode("utf-8", "replace")], n) for word, n in Counter(re.findall(PATTERN, text)).items()]
    pairs, where = Counter(), defaultdict(set)

    def count(i, sign):
        parts, n = words[i]
        for pair in zip(parts, parts[1:]):
            pairs[pair] += sign * n
            where[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        ranks[b"".join(best)] = len(ranks)
        for i in where.pop(best):
            count(i, -1)
            merged = []
            for part in words[i][0]:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            words[i] = merged, words[i][1]
            count(i, 1)
        del pairs[best]
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
    The byte-level BPE of a published folder -> (a Tokenizer with the same ids and without tags, its added ids).
    ValueError naming a setting of tokenizer.json that would change ids and is not implemented.
    """
    def refuse_unless(ok, what):
        if not ok:
            raise ValueError(f"{path}/tokenizer.json: {what} is not supported")

    read = lambda name: Path(path, name).read_text(encoding="utf-8") if Path(path, name).exists() else ""
    refuse_unless(read("tokenizer.json"), "a tokenizer without this file (SentencePiece)")
    t, config = (parse_json((read(name) or "{}").encode(), f"{path}/{name}") for name in ("tokenizer.json", "tokenizer_config.json"))
    model, normalizer = t["model"], (t.get("normalizer") or {}).get("type")
    refuse_unless(model.get("type") == "BPE" and not model.get("byte_fallback"), f"the model {model.get('type')}, byte fallback")
    refuse_unless(normalizer in (None, "NFC"), f"the normalizer {normalizer}")
    merges = ["".join(m) if isinstance(m, list) else m.replace(" ", "") for m in model["merges"]]
    ids = [model["vocab"][token] for token in merges]
    refuse_unless(ids == sorted(ids), "a vocabulary in another order than the merges")
    added = {a["content"]: a["id"] for a in t["added_tokens"]}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes every byte as a visible character:
    hidden = [b for b in range(256) if b not in visible]             # these as themselves, the others from 256 on
    to_byte = {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}
    ranks = {bytes(to_byte[c] for c in token): i for token, i in model["vocab"].items() if token not in added}
    template = read("chat_template.jinja") or config.get("chat_template") or ""
    refuse_unless(not template or "<|im_start|>" in template, "a chat template other than ChatML")
    chat, system = ["{system}{prompt}\n"], ""
    if template:
        start, end = added["<|im_start|>"], added["<|im_end|>"]
        chat = [start, "system\n{system}", end, "\n", start, "user\n{prompt}", end, "\n", start, "assistant\n"]
        default = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"<{]+)<\|im_end\|>", template)
        system = default[1] if default else ""
    eos = config.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    refuse_unless(eos in added, f"the eos_token {eos}")
    eos = added[eos]
    return Tokenizer(split_pattern(t, refuse_unless), ranks, eos, None, chat, system, normalizer == "NFC"), list(added.values())


def split_pattern(t, refuse_unless):
    """The pre_tokenizer of a tokenizer.json -> the pattern that cuts text the same way."""
    pre = t.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    kinds, last = [p.get("type") for p in parts], parts[-1]
    refuse_unless(last.get("type") == "ByteLevel" and not last.get("add_prefix_space"), f"the pre_tokenizer {parts}")
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        refuse_unless(parts[0]["behavior"] == "Isolated" and not parts[0].get("invert"), f"the split {parts[0]}")
        return parts[0]["pattern"]["Regex"]
    digits = kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]
    refuse_unless((digits or len(kinds) == 1) and last.get("use_regex", True), f"the pre_tokenizer {parts}")
    return GPT2_DIGITS if digits else GPT2


# -----------------------------------------------------------------------------
# The built-in corpus: ordinary chat answers without tags, written by a seeded generator over a small table of facts.
# A topic: noun | verb | how least and most are called | what a short list gives, and which column has it; the three
# sentences of a thing; then the things and what goes into their sentences, least first.
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
"""
TOPICS = [[line.split("|") for line in block.splitlines()] for block in TOPICS.split("\n\n")]
SOUP = """\
To make the {0}:

1. Wash the {1} and cut them into small pieces.
2. Fry these pieces in a large pot with a little oil for 5 minutes.
3. Pour 1 litre of water over the mixture and bring it to the boil.
4. Now let that {0} simmer until the {2} are soft, then season it with salt.

Enjoy your {0}!"""
VEGETABLES = "beans carrots leeks mushrooms onions peas potatoes tomatoes".split()
COUNT = "zero one two three four five six seven eight".split()
LISTS = {  # opening; what stands before, between and after the sentences of a branch
    "numbered": ("Here are the {} {}, one by one:", "{}. {}: ", " ", "\n"),
    "bulleted": ("Here is what to know about the {} {}:", "- **{1}**: ", " ", "\n"),
    "headed": ("This is a short guide to the {} {}.", "### {1}\n\n", " ", "\n\n"),
    "labelled": ("The {} {} differ in several ways.", "**{1}**: ", " ", "\n\n"),
    "nested": ("Key facts about the {} {}:", "- **{1}**\n  - ", "\n  - ", "\n"),
}
PROMPTS = {
    "numbered": ("Make a numbered list about {}.", "Walk me through {}, one by one.", "Give me a numbered list on {}."),
    "bulleted": ("Tell me about {}.", "What should I know about {}?", "Give me bullet points on {}."),
    "headed": ("Write a guide to {}.", "Write a section about each of {}.", "Write a report on {} with headings."),
    "labelled": ("Compare {}.", "How do {} differ?", "What sets {} apart?"),
    "nested": ("Make a fact sheet for {}.", "Give me the key facts about {}.", "Take notes on {}."),
    "two-lists": ("Tell me about {}, then about {}.", "Make a list on {}, one on {}.", "Two topics, please: {}; {}."),
    "sums": ("Add {} step by step.", "What is the sum of {}?", "I walked {} km on my trips. How far is that in all?"),
    "steps": ("How do I make a {1} with {0}?", "Give me a {1} recipe with {0}.", "Explain how to cook a {1} with {0}."),
    "short-list": ("What are the {1} of {0}?", "List only the {1} of {0}.", "Just the {1} of {0}, please."),
    "prose": ("Write one paragraph about {}.", "Describe {} in a few sentences.", "Can you say a few words on {}?"),
}


def listing(words):
    return ", ".join(words[:-1]) + " and " + words[-1]


def conclusion(topic, rows):
    """What only the whole answer can tell: the least and the most of the things in it."""
    verb, low, high = topic[0][1:4]
    end = "er" if len(rows) == 2 else "est"
    return f"Overall, {rows[-1][0]} {verb} the {high}{end} of the {COUNT[len(rows)]} and {rows[0][0]} the {low}{end}."


def list_answer(topic, rows, kind):
    """An opening, a branch a thing, a conclusion."""
    opening, before, between, after = LISTS[kind]
    answer = opening.format(COUNT[len(rows)], topic[0][0]) + "\n\n"
    for i, (name, *row) in enumerate(rows, 1):
        name = name.capitalize()
        answer += before.format(i, name) + between.join(line.format(name, *row) for line, in topic[1:4]) + after
    return answer.rstrip() + "\n\n" + conclusion(topic, rows)


def draw(kind, rng):
    """(what the answer is about, what goes into the prompt, the answer). Things stand in the order of their table."""
    if kind == "sums":
        numbers = sorted(rng.sample(range(1, 10), rng.choice((3, 4))))
        words, totals = listing([str(n) for n in numbers]), list(itertools.accumulate(numbers))
        steps = [f"{i}. {t - n} + {n} = {t}." for i, (n, t) in enumerate(zip(numbers[1:], totals[1:]), 1)]
        return numbers, [words], "\n".join([f"Adding {words}:", "", *steps, "", f"The total is {totals[-1]}."])
    if kind == "steps":
        foods, dish = sorted(rng.sample(VEGETABLES, rng.choice((2, 3, 4)))), rng.choice(("soup", "stew"))
        return foods, [listing(foods), dish], SOUP.format(dish, listing(foods), foods[-1])
    sizes = {"two-lists": (3, 4, 4), "short-list": (2, 3, 4), "prose": (2, 2, 3)}.get(kind, (2, 3, 4, 5, 5, 6, 6, 6, 7, 7, 8))
    topics = rng.sample(TOPICS, 2 if kind == "two-lists" else 1)
    picks = [sorted(rng.sample(topic[4:], rng.choice(sizes)), key=topic.index) for topic in topics]
    about, words = [row[0] for rows in picks for row in rows], [listing([row[0] for row in rows]) for rows in picks]
    topic, rows, asked, value = topics[0], picks[0], *topics[0][0][-2:]
    if kind == "prose":
        lines = [line.format(name.capitalize(), *row) for name, *row in rows for line, in topic[2:4]]
        return about, words, " ".join([f"A few words on {words[0]}.", *lines, conclusion(topic, rows)])
    if kind == "short-list":
        lines = [f"- {row[0].capitalize()}: {value.format(*row)}" for row in rows]
        return about, [*words, asked], "\n".join([f"Here are the {asked} of {words[0]}:", "", *lines])
    kinds = ("bulleted", "numbered") if kind == "two-lists" else (kind,)
    return about, words, "\n\n".join(map(list_answer, topics, picks, kinds))


def corpus(n=6000, seed=1337, split="train"):
    """
    n records {"id", "category", "prompt", "response", "facts"} of ten kinds, the same for the same seed. The sets of
    things that "val" asks about, an eighth of all, never occur in "train", whatever the kind.
    """
    rng, records = random.Random(f"{split} {seed}"), []
    while len(records) < n:
        kind = list(PROMPTS)[len(records) % len(PROMPTS)]
        about, words, response = draw(kind, rng)
        if (zlib.crc32(str(sorted(about)).encode()) % 8 == 0) == (split == "val"):
            facts = re.split(r"(?<=\w\w[.!])\s+|\n+(?=[-\d])", response)  # each sentence, with the label before it
            records.append({"id": len(records), "category": kind, "prompt": rng.choice(PROMPTS[kind]).format(*words),
                            "response": response, "facts": facts})
    return records


def facts_right(answer, facts):
    """Share of the facts that the answer states, whatever its line breaks."""
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
    Lays every answer out, tagged ("aspd") or as it stands ("serial") -> (rows, their tallied Stats).
    An answer longer than the limit (tokens; none: the context), or with a branch longer than the stride, is left out,
    in both modes alike.
    """
    special = tokenizer.special or Special(*[tokenizer.eos] * 7)  # without tags only lengths count
    rows, total = [], Counter()
    for r in tqdm(records, desc="tokenizing", leave=False, disable=None):
        segments, _ = extract(r["response"], r["prompt"])
        prompt, ids = tokenizer.prompt(r["prompt"]), tokenize(segments, tokenizer.encode)
        try:
            row = layout(prompt, ids, special, config.positions, config.stride)
        except ValueError:  # a branch is longer than the stride
            continue
        if max(row.position.max(), len(row.token) - 1) < min(limit or config.block_size, config.block_size):
            rows.append(row if mode == "aspd" else layout(prompt, [tokenizer.encode(r["response"])], special))
            tally(total, stats(ids))
    return rows, total


def batches(n, batch_size, seed):
    """Endlessly yields arrays of batch_size indices below n: every epoch a new order, which depends on the seed alone."""
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(n)
        yield from np.split(order, range(batch_size, n, batch_size))


def micro_batches(rows, tokens):
    """Rows -> lists of rows of like length: little is padding, and each has at most so many tokens (or is one row)."""
    groups = [[]]
    for row in sorted(rows, key=lambda r: len(r.token)):
        n, group = len(row.token), groups[-1]
        if group and ((len(group) + 1) * n > tokens or n > 1.2 * len(group[0].token)):
            groups.append([])
        groups[-1].append(row)
    return groups


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

def show(record, segments, refusals):
    """Prints an answer: a bar of its own colour before every branch, its title underlined, and what was refused."""
    paint = lambda code, s: f"\x1b[{code}m{s}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else s
    print(paint(1, f"\n--- {record['id']}: {record['prompt'][:100]!r}"))
    for s in segments:
        for i, b in enumerate([] if isinstance(s, str) else s):
            bar = paint(31 + i % 6, "| ")
            print(bar + paint(4, b.title) + b.text[len(b.title):].rstrip("\n").replace("\n", "\n" + bar))
        if isinstance(s, str):
            print(s.rstrip("\n"))
    for reason, start, end in refusals:
        print(paint(2, f"    refused, {reason}: {record['response'][start:start + 60]!r}"))


def table(totals):
    """Prints the paper's figures, a row a category. totals: {category: tallied Counter}."""
    print(f"\n{'category':<16}{'answers':>8}{'PPD':>8}{'ABN':>8}{'APD':>8}{'APE':>8}{'speedup':>9}{'best':>7}")
    for name, total in sorted(totals.items(), key=lambda item: item[0] == "all"):
        print("{:<16}{answers:>8}{PPD:>8.1%}{ABN:>8.2f}{APD:>8.1%}{APE:>8.1%}{speedup:>9.2f}{best:>7.2f}".format(
            name, **summary(total)))


def parse_args():
    p = argparse.ArgumentParser(description="Finds the independent parts of answers. Next: python train.py")
    p.add_argument("file", nargs="?", help='JSON or JSON Lines of {"prompt", "response"}, Alpaca or ShareGPT records; '
                                           "none: the built-in corpus")
    p.add_argument("--out", metavar="OUT.jsonl", help="write the segments of every answer here")
    p.add_argument("--show", type=int, default=0, metavar="N", help="print N answers with their blocks (default: 0)")
    p.add_argument("--tokenizer", default="bpe", help="counts tokens: bpe (learnt from the answers, the default), a tiktoken "
                                                      "name, or a published model's folder")
    return p.parse_args()


def main():
    args = parse_args()
    records = lambda: read_records(args.file) if args.file else corpus()
    tokenizer = make_tokenizer(args.tokenizer, (r["response"] for r in records()))
    totals, reasons = defaultdict(Counter), Counter()

    def lines():
        for n, r in enumerate(tqdm(records(), desc="answers", disable=None)):
            segments, refusals = extract(r["response"], r["prompt"])
            assert join(segments) == r["response"], f"answer {r['id']} does not join back"
            if n < args.show:
                show(r, segments, refusals)
            for category in {r.get("category", "all"), "all"}:
                tally(totals[category], stats(tokenize(segments, tokenizer.encode)))
            reasons.update(reason for reason, _, _ in refusals)
            blocks = [s if isinstance(s, str) else {"branches": [b._asdict() for b in s]} for s in segments]
            yield json.dumps({**{k: v for k, v in r.items() if k != "response"}, "segments": blocks}, ensure_ascii=False)

    if args.out:
        write_whole(args.out, lines())
    else:
        for _ in lines():
            pass
    table(totals)
    print("\nblocks refused:" if reasons else "\nno block was refused")
    for reason, n in reasons.most_common():
        print(f"{n:>8}  {reason}")


if __name__ == "__main__":
    cli(main)
