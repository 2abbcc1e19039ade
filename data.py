"""Text in: loading, the extraction of parallel structure, the tokenizer, the built-in corpus and batches.

    python data.py                                # what the extractor finds in the built-in corpus
    python data.py FILE --show 3 --out OUT.jsonl  # in a file of answers; shows three, writes the segments of all"""
import argparse
import itertools
import json
import os
import random
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from aspd import IGNORE, Branch, Special, branch_mask, check, join, layout, stats, summary, tally, tokenize

# ---- loading: {"prompt", "response"}, Alpaca and ShareGPT, as JSON or JSON Lines 
MAX_LINE = 64 * 2**20  # bytes

def parse_json(raw, where):
    """Bytes -> object. ValueError with the place for what is not JSON in UTF-8."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not JSON: {e}") from None

def read_objects(path):
    """Yields (place, dict) for every record of a JSON array, or of JSON Lines with one line in memory at a time."""
    with open(path, "rb") as f:
        array = f.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        f.seek(0)
        records = parse_json(f.read(), path) if array else iter(lambda: f.readline(MAX_LINE + 1), b"")
        for n, r in enumerate(records, start=1):
            where = f"{path}, {'record' if array else 'line'} {n}"
            check(array or len(r) <= MAX_LINE, f"{where}: longer than {MAX_LINE} bytes")
            if array or r.strip():
                r = r if array else parse_json(r, where)
                check(isinstance(r, dict), f"{where}: expected an object, found {type(r).__name__}")
                yield where, r

def text_of(r, key, where):
    """The text in a record's field. ValueError naming the fields that it has instead."""
    fits = isinstance(r.get(key), str) and r[key].strip()
    check(fits, f"{where}: no {key} in a record with the fields {', '.join(r) or '(none)'}")
    return r[key]

def questions_answers(r, where):
    """Yields (prompt, answer) of a record; of a conversation every answer with the user turn before it."""
    if "instruction" in r:
        yield "\n\n".join(filter(None, (r["instruction"], r.get("input")))), text_of(r, "output", where)
    elif "conversations" not in r:
        yield text_of(r, "prompt", where), text_of(r, "response", where)
    prompt = ""
    for turn in r.get("conversations", ()):
        text = (turn.get("value") or "") + ""  # TypeError for what is not text
        if turn.get("from") in ("human", "user"):
            prompt = text
        elif turn.get("from") != "system" and text.strip():
            yield prompt, text

def read_records(path):
    """Yields {"id", "prompt", "response", ...} per answer. ValueError for a file, or a record not a chat, without."""
    n = 0
    for where, r in read_objects(path):
        try:
            pairs = list(questions_answers(r, where))
        except (AttributeError, TypeError) as e:
            raise ValueError(f"{where}: no prompts and answers in its fields {', '.join(r)}: {e}") from None
        small = {"id": n, **{key: r[key] for key in ("id", "category", "model", "facts") if key in r}}
        for k, (prompt, response) in enumerate(pairs):
            id = f"{small['id']}-{k}" if "conversations" in r else small["id"]
            yield {**small, "id": id, "prompt": prompt, "response": response}
        n += len(pairs)
    check(n, f"{path}: no usable answers")

def read_prompts(path):
    """The {"prompt", "category"} of a file, as a list. ValueError for a record without a prompt, or for no records."""
    prompts = [{"category": r.get("category"), "prompt": text_of(r, "prompt", at)} for at, r in read_objects(path)]
    check(prompts, f"{path}: no prompts")
    return prompts

def write_whole(path, lines):
    """Writes the lines to a file whole or not at all; a link or a device stays what it is."""
    path = Path(path).resolve()
    temporary = Path(f"{path}.tmp") if path.is_file() or not path.exists() else path
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f:  # a lone surrogate becomes \ud83d
            f.writelines(line + "\n" for line in lines)
        temporary.replace(path)
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)

def cli(main):
    """Runs a command line's main(): bad input becomes one clear line on stderr and exit code 2."""
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # a lone surrogate is shown as \ud83d
        main()
    except (ValueError, OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "compiler" not in str(e):  # --compile found none
            raise
        print("error:", " ".join(str(e).split("\n\n")[0].split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

# ---- extraction: cuts an answer into segments, loses no character, checks that branches do not need each other 
MAX_BRANCHES = 16  # the engine's width
GROUP_OVER = 10    # a longer list may put neighbours into one branch
MIN_SAVED = 6      # words; a smaller gain is not worth its tags
LABEL_WORDS = 3    # a longer label is cut to the fewest words that tell its part apart
# structure: what opens a part, and its rank (the smaller, the further out; a list item adds its indentation)
LEVELS = [(level, rank, re.compile(pattern, re.M)) for level, rank, pattern in [  # group 1: siblings open alike
    ("heading", 0, r"(#{1,6})[ \t]+\S"),  # its rank: how many
    ("underlined", 1, r"(?=.*\n([-=])\1{2,}\s*$)[^\s|]"),
    ("bold line", 7, r"(\*\*|__)[^\s*_][^*_\n]{0,100}(?:\*\*|__)[:：]?\s*$"),
    ("number", 10, r"((?:\*\*)?[(（]?)(\d{1,3}|[ivx]{1,5}|[IVX]{1,5}|[^\W\d_])(?:[.)）．](?=\s|\*\*|[一-鿿])|、)"),
    ("bullet", 10, r"([-*+•‣◦▪●–])[ \t]+\S"),
    ("numbered label", 8, r"((?:\*\*|__)?[A-Z][a-z]+ )\d{1,2}(?:\*\*|__)?(?::| [-–] |\s*$)"),  # Day 1, Review 2
    ("label", 8, r"((?:\*\*|__)?)(?!(?:Here|Note|Subject|Dear|Sure|This|And|Now|So|To|You|I)\b)[^\W\d_a-z]"
     r"[^\s:.!?]{0,30}(?: [^\s:.!?,]{1,30}){0,7}(?::(?=\s|\*|$)|：)"),  # a name, not a sentence: eight words at most
    ("ordinal", 9, r"()(?:(?:First|Second|Third)(?:ly)?,|(?:One|Another) |(?:Additional|Further|More)\w+,)"),
]]
OPAQUE = re.compile(r"[ \t]*(?:(```|~~~)|\|)")  # code and tables are never cut
PREFIX = re.compile(r"\W*(?:\w{1,3}[.)）．、](?=[\s*一-鿿]))?\W*")  # the marker of a part
bare = lambda text: text[PREFIX.match(text).end():]
LABEL_END = re.compile(r"[:：]|\*\*|__| [-–—](?: |$)")
WORD = re.compile(r"[一-鿿ぁ-ヿ]|[^\s:：*一-鿿ぁ-ヿ]+")
WORKS_ON = (r"(?:In )?Summary|(?:Key )?Takeaway|Bottom Line|In short|Overall|Therefore|总结|Final Answer|Calculating"
            r"|(?:Explanation|Solution|Comparison|Instructions|Directions|Total|Output|Answer|Results?)[ \t]*[:*\n(]")

def read_marks(lines):
    """(kind, rank, number) of each line: kind is a tuple if it opens a part, else "text", "opaque" or "" (blank)."""
    marks, fenced = [], False
    for line, below in zip(lines, [*lines[1:], ""]):
        fence, depth = OPAQUE.match(line), len(line) - len(line.lstrip())
        fenced ^= bool(fence and fence[1])
        kind, rank, number = "text" if line.strip("-=*_ \t\r\n") else "", 10 + depth, 0
        for level, outer, pattern in LEVELS if kind and not fence and not fenced and depth < 13 else ():
            if (outer > 9 or depth < 2) and (m := pattern.match(line + below, depth)):
                mark = m[2] if level == "number" else ""  # 3, B or iv
                number, style = (int(mark), 1) if mark.isdecimal() else (0, mark.strip("ivxIVX") and mark.isupper())
                kind, rank = (level, m[1], style, depth), (outer or len(m[1])) + depth * (outer > 9)
                break
        marks.append(("opaque" if fence or fenced else kind, rank, number))
    return marks

def find_runs(lines, marks):
    """Runs of sibling parts, outer ones first: the lines where parts start, the line where the last one ends."""
    runs, stack = [], []  # stack: runs that may go on, each inside a part of the one before
    labels = Counter(line.split(":")[0] for line in lines)
    for i, (kind, rank, number) in enumerate(marks):
        if rank == 8 and stack and stack[-1].rank > 9 and labels[lines[i].split(":")[0]] > 1:
            kind = "text"  # a field that several items of a list have
        if isinstance(kind, tuple):
            k = next((k for k, run in enumerate(stack) if run.rank > rank or run.kind == kind), len(stack))
            if rank < 10 and re.match(WORKS_ON, bare(lines[i]), re.I):
                kind = None  # works on the parts before it: ends their run, and nothing joins it
            joins = k < len(stack) and stack[k].kind == kind and number >= stack[k].number
            for run in stack[k + joins:]:
                run.end = min(run.end, i)
            del stack[k + joins:]
            if not joins:
                runs.append(SimpleNamespace(kind=kind, rank=rank, nested=k > 0, parts=[], held=0, allowed=rank < 9))
                stack.append(runs[-1])
            run = stack[-1]
            if rank < 8 and len(run.parts) == 1 and not any(mark[0] for mark in marks[run.parts[0] + 1:i]):
                run.parts.clear()  # a first heading without a body is the title of them all
            run.parts.append(i)
            run.number, run.held, run.allowed, run.end = number, 0, max(run.allowed, run.held), len(lines)
        elif kind == "text" and (i == 0 or marks[i - 1][0] in ("", "opaque")):
            while stack and rank <= max(stack[-1].rank, 10):  # a paragraph
                run = stack[-1]
                run.held += 1
                # more than its siblings hold, or a conclusion: the answer goes on; another heading would take this back
                over = len(run.parts) > 1 and (run.held > run.allowed or re.match(WORKS_ON, lines[i], re.I))
                run.end = min(run.end, i) if over else run.end
                if not over or run.rank < 9:
                    break
                stack.pop()
    apart = lambda run: run.kind[0] != "label" or not any(marks[i - 1][0] for i in run.parts[1:])  # else fields of one
    return [run for run in runs if len(run.parts) > 1 and apart(run)]

def name_parts(parts, listed):
    """A title for each part: its label if that is short and, in a list, its own, else the fewest words that no sibling
    starts with."""
    heads, titles = [], []
    for part in parts:  # the first line up to each of its first words; something of the part stays after its title
        line = part[:300].split("\n")[0].rstrip()
        words = WORD.finditer(line, len(line) - len(bare(line)))
        heads.append([line[:m.end()] for m in words if m.end() < len(part)][:16] or [line])
    count = Counter(bare(head).lower() for openings in heads for head in openings)
    for openings in heads:
        label = [opening for opening in openings if not LABEL_END.search(bare(opening))]
        unique = [opening for opening in openings if count[bare(opening).lower()] == 1 and len(bare(opening)) > 4]
        named = 0 < len(label) <= LABEL_WORDS and not (listed and count[bare(label[-1]).lower()] > 1)
        titles.append(label[-1] if named else [*unique, openings[-1]][0])
    return titles

# validation: a branch may rely on the question, the text before its block and all titles, not on a sibling's body
NAME = re.compile(r"[^\W_](?:[\w.,'-]*\w)?")
NOUN = r"(?:[a-z'-]+ ){0,2}?([a-z'-]{3,}?)s?(?=[^\w '-]| (?:and|or|of|to|in|on|for|with|by|from|at|is|are|that)\b)"
SAYS = [  # reason, what a part of the block says after its marker: it goes on from, or works on, what a sibling says
    ("is a song or a play", r"(?m)^[^\w\n]{0,9}(?:Verse|(?:Pre-)?Chorus|Outro|Scene|Act|FADE)\b[^a-z\n]{0,40}$"
     r"|\APanel \d|\A[^\n:]{1,40}(?:\([a-z]+(?:ly|ing|ed)\)\**:|:\W{1,4}\([a-z]+(?:ly|ing|ed)\))"),
    ("solves an equation", r"(?m)^[ \t]*[\dxyz()][\dxyz ()+*/^.-]*=[\dxyz ()+*/^.-]*$|\A(?:Solve for|Substit)"),
    ("steps of one recipe", r"\A[^\n]{0,400}(?:\b[Tt]he (?:\w+ )?mixture\b|\b[Pp]reheat|\bset (?:\w+ )?aside\b)"),
    ("opens by going on", r"\A(?:However|Thus|As a result|Then|Meanwhile|Now|(?:Next|Also)(?=,)|If (?:yes|no|so))\b"),
    ("points at a sibling", r"\A[A-Z]\w+ th(?:is|ese) [a-z]|\bas \w+ (?:above|earlier)\b|(?<=[a-z,(] )[Ss]teps? \d"
     r"|\b[Rr]epeat (?:the|steps?)\b|\b(?:above|previous|preceding|the last) (?:step|section|item|part|day)\b"
     r"|\bthe (?:\w+ )?above\b|上述|如上"),
]
PRONOUN = re.compile(r'[^\w"“]{0,9}(?:\w{1,3}[.)])?[^\w"“]{0,9}(?:They|These|Those|This|She|He|It) [a-z]')
STEPS = re.compile(r"(?i)(?:\b(?:steps?|(?:instruc|direc)tions|procedure|process|approach|it works|how (?:you|to))\b"
                   r"|步骤).*\s*\Z")
BRINGS = [  # reason, what a part brings in, how a later one takes it up, how often, title of the parts
    ("uses a value worked out in a sibling", r"[=≈][^\w\n]{0,6}(\d[\d,.]*\d)(?!\S* *[-+*/])", r"\d[\d,.]*\d", 1, ""),
    ("uses a name of a sibling", r"(?m)^[ \t]*(?:(?:[a-z.-]+ ){0,3}(?:class|function|const|def|struct|startproject"
     r"|startapp|mkdir) |(?=\w+ *(?:=[^=]|\()))(\w{2,})", r"\w{2,}", 1, ""),
    ("uses a name of a sibling", *[r"\b[a-z]{2,}(?:\w*_\w+|[A-Z][a-z]\w*)|(?:[A-Z][a-z]+){3}\w*"
     r"|(?<=[\"'#/])[a-z]\w*(?:-\w+)+|(?<=[\"'])[A-Z]\w{3,}(?=[\"'])"] * 2, 1, ""),
    ("uses a name of a sibling", r"\A\W*Name: ([A-Z]\w+)", r"\b[A-Z]\w+", 1, ""),
    ("takes up a thing of a sibling", rf"\b(?:[Aa]n?|one|some) {NOUN}", rf"\b[Tt]he {NOUN}(?! (?:of|that|wh))", 2, ""),
    ("goes on with a sibling's story", *[r"(?<=[a-z,] )[A-Z][a-z]{3,}"] * 2, 4,
     r"\W*(?:Day|Week|Chapter|Episode|Part|Act|Panel|Scene|Page) [\dIV]"),
]

def dependence(parts, titles, text, start, said):
    """Yields why a part needs another. start: of the block; said: where each word of the text is said first."""
    if len({bare(title).strip(" *:_").lower() for title in titles}) < len(titles):
        yield "titles are not distinct"
    bodies = [bare(part) for part in parts]
    if re.match(WORKS_ON, bodies[-1], re.I):  # a list item; a heading has ended its run
        yield "works on what its siblings say"
    yield from (reason for reason, pattern in SAYS if any(re.search(pattern, body) for body in bodies))
    if any(map(PRONOUN.match, parts)) and not PRONOUN.match(parts[0]):  # else it stands for what the lead is about
        yield "opens with a pronoun for a sibling"
    if STEPS.search(text, max(0, start - 150), start) and re.match(r"[\s*(]*\w{1,3}[.)]", parts[0]):
        if 2 * sum(bool(LABEL_END.search(body[:60].split("\n")[0])) for body in bodies) < len(parts):
            yield "steps without names"  # their titles do not tell the others what they do
    known = {name.lower().rstrip("s") for title in titles for name in NAME.findall(title)}
    for reason, brings, takes_up, times, only in BRINGS:
        brought, hits = set(), 0
        for part, title in zip(parts, titles) if re.match(only, titles[0]) else ():
            own = set(re.findall(brings, part))
            taken = set(re.findall(takes_up, part[len(title):])) & brought - (set() if brings == takes_up else own)
            hits += sum(said.get(word, -1) >= start for word in {word.lower().rstrip("s") for word in taken} - known)
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
    segments, refusals, done, said = [], [], 0, {}
    for m in NAME.finditer(prompt + "\n" + text):  # where a word is first said; in the prompt: before 0
        said.setdefault(m[0].lower().rstrip("s"), m.start() - len(prompt) - 1)
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    starts, marks = [0, *itertools.accumulate(map(len, lines))], read_marks(lines)
    for run in find_runs(lines, marks):
        while run.nested and not marks[run.end - 1][0]:  # blank lines after the last part are the outer part's
            run.end -= 1
        at = [starts[k] for k in [*run.parts, run.end]]
        if at[0] < done:
            continue
        parts = [text[start:end] for start, end in zip(at, at[1:])]
        titles = name_parts(parts, run.rank > 9)
        size = group(parts, titles)
        reason = next(dependence(parts, titles, text, at[0], said), "") if size else "saves no steps"
        if reason:
            refusals.append((reason, at[0], at[-1]))
        else:
            block = [Branch(titles[i], "".join(parts[i:i + size])) for i in range(0, len(parts), size)]
            segments += [text[done:at[0]], block]
            done = at[-1]
    return [segment for segment in [*segments, text[done:]] if segment], refusals

# ---- the tokenizer: a tiktoken byte-level BPE, learnt here, known by name, or read from a published tokenizer.json 
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"  # the same to `re`, which learns, and to tiktoken
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # and with digits one by one:
GPT2_DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")
PLAIN_FORM = [["{}\n"], ["User: {}\nAssistant:\n"]]

class Tokenizer:
    """Text <-> ids; no text becomes a special token. pattern: cuts text into words; ranks: {a token's bytes: its id and
    merge priority}; special: the tags' ids or None; chat: forms of system text and prompt; nfc: normalise first."""
    def __init__(self, pattern, ranks, eos, special=None, chat=PLAIN_FORM, system="", nfc=False, added=()):
        self.settings = dict(pattern=pattern, ranks=ranks, eos=eos, special=special and tuple(special), chat=chat,
                             system=system, nfc=nfc, added=added)  # plain values, for a checkpoint
        self.eos, self.special, self.chat, self.system, self.nfc = eos, special and Special(*special), chat, system, nfc
        self.encoding = tiktoken.Encoding("aspd", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bytes = {i: token for token, i in ranks.items()}
        self.vocab_size = max(*self.bytes, eos, *(special or ())) + 1  # one more than the highest id
        self.lacking = {b for b in range(256) if bytes([b]) not in ranks}  # rare bytes that a published one may lack

    def encode(self, text):
        """str -> list of ids. What UTF-8 cannot write and characters with a lacking byte become U+FFFD."""
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.lacking:
            text = "".join(c if self.lacking.isdisjoint(c.encode()) else "\ufffd" for c in text)
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """List of ids -> str; tags and end-of-text are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

    def prompt(self, text, system=None):
        """A user's text in the model's own chat form -> list of ids."""
        system = self.system if system is None else system
        parts = [(p, system) for p in self.chat[0] if system] + [(p, text) for p in self.chat[1]]
        return [i for p, fill in parts for i in ([p] if isinstance(p, int) else self.encode(p.format(fill)))]

    def add_tags(self):
        """Gives the tags the first ids that neither the tokenizer nor its added tokens use -> a new Tokenizer."""
        taken = {*self.bytes, *self.settings["added"], self.eos}
        free = itertools.islice((i for i in itertools.count() if i not in taken), 6)
        return Tokenizer(**self.settings | {"special": (*free, self.eos)})

def learn_bpe(text, vocab_size=2048):
    """Byte pair encoding learnt from text -> ranks. Holds each common word once, a character for each of its tokens."""
    words = Counter(re.findall(PATTERN, text)).most_common(4000)
    words = [(word.encode("utf-8", "replace").decode("latin-1"), n) for word, n in words]
    tokens = {chr(b): bytes([b]) for b in range(256)}
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        a, b = best = max(pairs, key=pairs.get, default="  ")
        if pairs[best] < 2:
            break
        tokens[new := chr(len(tokens))] = tokens[a] + tokens[b]
        words = [(word.replace(a + b, new), n) for word, n in words]
    return {token: i for i, token in enumerate(tokens.values())}

def make_tokenizer(name, texts):
    """"bpe": learnt from the texts; a folder: its tokenizer; else a name that tiktoken knows. With tags."""
    if name == "bpe":
        ranks = learn_bpe("".join(itertools.islice(texts, 2000)))
        return Tokenizer(PATTERN, ranks, eos=len(ranks)).add_tags()
    if Path(name).is_dir():
        return published_tokenizer(name).add_tags()
    encoding = tiktoken.get_encoding(name)
    return Tokenizer(encoding._pat_str, encoding._mergeable_ranks, encoding.eot_token).add_tags()

def published_tokenizer(path):
    """A published folder -> a Tokenizer with the same ids, without tags. ValueError naming what is not supported."""
    refuse = lambda what, unless: check(unless, f"{path}/tokenizer.json: {what} is not supported")
    files = [Path(path, name) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    t, config, template = [file.read_bytes() if file.exists() else b"" for file in files]
    refuse("a tokenizer without this file (SentencePiece)", unless=t)
    t, config = parse_json(t, files[0]), parse_json(config or b"{}", files[1])
    refuse("a file without merges or added_tokens", unless="merges" in t.get("model", ()) and "added_tokens" in t)
    model, added = t["model"], {a["content"]: a["id"] for a in t["added_tokens"]}
    kind, normalizer, eos = model.get("type"), (t.get("normalizer") or {}).get("type"), config.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    template = str(template.decode() or config.get("chat_template") or "").replace(r"\\", "\\")
    known = kind == "BPE" and not model.get("byte_fallback") and normalizer in (None, "NFC")
    refuse(f"the model {kind}, byte fallback or the normalizer {normalizer}", unless=known)
    refuse(f"the eos_token {eos}", unless=eos in added)
    chatml = "<|im_start|>" in template and "<|im_start|>" in added
    refuse("a chat template other than ChatML", unless=not template or chatml)
    refuse("a token before or after all text", unless="'SpecialToken'" not in str(t.get("post_processor")))
    merged = [model["vocab"]["".join(m) if isinstance(m, list) else m.replace(" ", "")] for m in model["merges"]]
    refuse("a vocabulary in another order than the merges", unless=merged == sorted(merged))
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes every byte as a visible character:
    hidden = [b for b in range(256) if b not in visible]             # these as themselves, the others from 256 on
    to_byte = {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}
    ranks = {bytes(to_byte[c] for c in token): i for token, i in model["vocab"].items() if token not in added}
    chat, system = [["{}\n"], ["{}\n"]], ""
    if template:
        start, end = added["<|im_start|>"], added["<|im_end|>"]
        chat = [[start, "system\n{}", end, "\n"], [start, "user\n{}", end, "\n", start, "assistant\n"]]
        system = (re.findall(r"<\|im_start\|>system(?:\\n|\n)((?:[^'\"<{]|{})+)<\|im_end\|>", template) or [""])[0]
    pre = t.get("pre_tokenizer") or {}  # how it cuts text into words -> a pattern that does the same
    parts = pre.get("pretokenizers", [pre])
    kinds, first, last = " ".join(str(p.get("type")) for p in parts), parts[0], parts[-1]
    pattern = {"ByteLevel": GPT2, "Digits ByteLevel": first.get("individual_digits") and GPT2_DIGITS,
               "Split ByteLevel": first.get("behavior") == "Isolated" and first["pattern"].get("Regex")}.get(kinds)
    known = pattern and last.get("use_regex", True) == (first["type"] != "Split") and not first.get("invert")
    refuse(f"the pre_tokenizer {parts}", unless=known and not last.get("add_prefix_space"))
    return Tokenizer(pattern, ranks, added[eos], None, chat, system, normalizer == "NFC", list(added.values()))

# ---- the built-in corpus: chat answers without tags, written by a seeded generator over a small table of facts 
# A topic: name | what a short list gives | its column; two sentences; its things and their columns, smallest first.
TOPICS = [[line.split("|") for line in topic.splitlines()] for topic in """\
planets|positions|{1}
The {1} planet from the Sun, about {2} km across at its equator.
{0} is named after the {3}, and it is best known for {4}.
Mercury|first|4,900|messenger of the Roman gods|its many craters and its lack of air
Mars|fourth|6,800|Roman god of war|rusty red dust and the tallest known volcano
Venus|second|12,100|Roman goddess of love|thick clouds and a surface hot enough to melt lead
Earth|third|12,800|ground under our feet|wide oceans, green forests and all its living things
Neptune|eighth|49,500|Roman god of the sea|a blue colour and very fast winds
Uranus|seventh|51,100|Greek god of the sky|a tilt so strong that it rolls along on its side
Saturn|sixth|121,000|Roman god of farming|wide bright rings made of ice and rock
Jupiter|fifth|143,000|king of the Roman gods|the Great Red Spot, a storm seen for centuries

countries|capitals|{2}
A country in {1} with {2} as its capital and about {3} square km of land.
{0} has a flag with {4}, and most visitors come for {5}.
Iceland|northern Europe|Reykjavik|103,000|a red and white cross|volcanoes, glaciers and hot springs
Italy|southern Europe|Rome|300,000|green, white and red stripes|Roman ruins, old paintings and fresh pasta
Japan|East Asia|Tokyo|378,000|a red disc on white|cherry blossom, quiet temples and fast trains
Egypt|North Africa|Cairo|1.0 million|a golden eagle|pyramids that are about 4,500 years old
Australia|Oceania|Canberra|7.7 million|six white stars on blue|coral reefs, kangaroos and long beaches
Brazil|South America|Brasilia|8.5 million|a starry blue globe|carnival, waterfalls and rainforest
China|East Asia|Beijing|9.6 million|five yellow stars on red|a very long wall and giant pandas
Canada|North America|Ottawa|10.0 million|a red maple leaf|mountain lakes, forests and ice hockey
""".split("\n\n")]
SOUP = ("To make the {0}:\n\n1. Wash {1} and cut them into small pieces.\n2. Fry these pieces in a large pot with a "
        "little oil for 5 minutes.\n3. Pour 1 litre of water over the mixture and bring it to the boil.\n4. Now let "
        "that {0} simmer until the {2} are soft, then season it with salt.\n\nEnjoy your {0}!")
NUMBERS = "three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
VEGETABLES = "beans carrots leeks mushrooms onions peas potatoes tomatoes".split()
FORMS = {  # opening; what stands before, between and after the sentences of a thing
    "numbered": ("Here are the {}, one by one:", "{}. **{}**: ", " ", "\n"),
    "bulleted": ("Here is what to know about the {}:", "- **{1}**: ", " ", "\n"),
    "headed": ("This is a short guide to the {}.", "### **{1}**\n\n", " ", "\n\n"),
    "labelled": ("The {} differ in several ways.", "**{1}**: ", " ", "\n\n"),
    "nested": ("Key facts about the {}:", "- **{1}**\n  - ", "\n  - ", "\n"),
    "short-list": ("Here are the {1}:", "- **{1}**: ", "", "\n"),
    "prose": ("", "", " ", " "),
}
PROMPTS = {
    "numbered": ("Make a numbered list about {}.", "Walk me through {}, one by one.", "Give me a numbered list on {}."),
    "bulleted": ("Tell me about {}.", "What should I know about {}?", "Give me bullet points on {}."),
    "headed": ("Write a guide to {}.", "Write a section about each of {}.", "Write a report on {} with headings."),
    "labelled": ("Compare {}.", "How do {} differ?", "What sets {} apart?"),
    "nested": ("Make a fact sheet for {}.", "Give me the key facts about {}.", "Take notes on {}."),
    "two-lists": ("Write two lists: {}; {}.", "Two topics, please: {}; {}.", "First these, then those: {}; {}."),
    "sums": ("I walk {} km a day. How far is that in {} days?", "How many km are {} km a day for {} days?",
             "Add up {} km a day over {} days."),
    "steps": ("How do I make a {1} with {0}?", "Give me a {1} recipe with {0}.", "Explain how to cook a {1} with {0}."),
    "short-list": ("What are the {1} of {0}?", "List only the {1} of {0}.", "Just the {1} of {0}, please."),
    "prose": ("Write one paragraph about {}.", "Describe {} in a few sentences.", "Can you say a few words on {}?")}

listing = lambda words: ", ".join(words[:-1]) + " and " + words[-1]  # ["a", "b", "c"] -> "a, b and c"

def describe(topic, rows, kind):
    """Text about things: an opening, the sentences of each, and in a list a conclusion that only the whole can tell."""
    value, (opening, before, between, after) = topic[0][2], FORMS[kind]
    lines = {"prose": topic[2:3], "short-list": [[value]]}.get(kind, topic[1:3])
    text = opening.format(*topic[0]) + "\n\n"
    for i, (name, *row) in enumerate(rows, 1):
        sentences = [line.format(f"**{name}**" if kind == "prose" else name, *row) for line, in lines]
        text += before.format(i, name) + between.join(sentences) + after
    closing = f"\n\nOverall, {rows[0][0]} is the smallest and {rows[-1][0]} the largest."
    return text.strip() + (closing if kind not in ("prose", "short-list") else "")

def draw(kind, rng):
    """(what the answer is about, the words for the prompt, the answer: things in the order of the table)."""
    if kind == "sums":
        km, days = rng.randrange(5, 16), rng.randrange(3, 8)
        lines = [f"Day {day} of {days}: {km * day - km} + {km} = {km * day} km." for day in range(1, days + 1)]
        text = "Day by day:\n\n" + "\n".join(lines) + f"\n\nIn all, that is {km * days} km."
        return [km, days], [NUMBERS[km - 3], NUMBERS[days - 3]], text
    if kind == "steps":
        foods, dish = rng.sample(VEGETABLES, rng.choice((2, 3, 4))), rng.choice(("soup", "stew"))
        bold = listing([f"the **{food}**" for food in sorted(foods)])
        return foods, [listing(foods), dish], SOUP.format(dish, bold, max(foods))
    sizes = {"two-lists": (3, 4), "prose": (2, 3, 4, 5)}.get(kind, (2, 3, 4, 5, 6, 7, 7, 8, 8))
    kinds = ("bulleted", "numbered") if kind == "two-lists" else (kind,)
    topics = sorted(rng.sample(TOPICS, len(kinds)), key=TOPICS.index)
    picks = [rng.sample(topic[3:], rng.choice(sizes)) for topic in topics]
    names = [[row[0] for row in rows] for rows in picks]
    picks = [sorted(rows, key=topic.index) for topic, rows in zip(topics, picks)]
    texts = ["Here are two lists."] * (len(kinds) - 1) + list(map(describe, topics, picks, kinds))
    return sum(names, []), [*map(listing, names), topics[0][0][1]], "\n\n".join(texts)

def corpus(n=6000, seed=1337, split="train"):
    """n records {"id", "category", "prompt", "response", "facts"}. In "val" a kind of answer is about other things."""
    rng, records, kinds = random.Random(f"{split} {seed}"), [], list(PROMPTS)
    kinds += 2 * kinds[5:] + ["prose", "short-list", "short-list"] if split == "train" else []  # they teach the most
    while len(records) < n:
        kind = kinds[len(records) % len(kinds)]
        about, words, response = draw(kind, rng)
        if (random.Random(f"{kind} {sorted(about)}").random() < 1 / 8) == (split == "val"):
            records.append({"id": len(records), "category": kind, "prompt": rng.choice(PROMPTS[kind]).format(*words),
                            "response": response, "facts": re.split(r"(?<=\w\w[.!]) |(?<![*\n])\n+", response)})
    return records

# ---- rows and batches -------------------------------------------------------
def split_held_out(records, percent=2):
    """(train, held out): by prompt, so that no prompt is on both sides; the same split on every run."""
    held = [zlib.crc32(r["prompt"].encode("utf-8", "replace")) % 100 < percent for r in records]
    return [r for r, out in zip(records, held) if not out], [r for r, out in zip(records, held) if out]

def make_rows(records, tokenizer, config, mode="aspd", limit=None):
    """(rows, tallied Stats) of answers, tagged or "serial", without those over the limit (none: context) or stride."""
    special = tokenizer.special or Special(*[tokenizer.eos] * 7)
    limit, rows, total = min(limit or config.block_size, config.block_size), [], Counter()
    for r in tqdm(records, desc="tokenizing", leave=False, disable=None):
        prompt, ids = tokenizer.prompt(r["prompt"]), tokenize(extract(r["response"], r["prompt"])[0], tokenizer.encode)
        try:
            row = layout(prompt, ids, special, config.positions, config.stride)
        except ValueError:  # a branch is longer than the stride
            continue
        if max(row.position.max() + 1, len(row.token)) <= limit:
            rows.append(row if mode == "aspd" else layout(prompt, [tokenizer.encode(r["response"])], special))
            tally(total, stats(ids))
    return rows, total

def batches(lengths, batch_size, seed):
    """Endlessly yields batches of like length: arrays of indices into lengths (N,), in a new seeded order an epoch."""
    n, window = len(lengths), 32 * batch_size
    for epoch in itertools.count():
        rng, epoch_batches = np.random.default_rng([seed, epoch]), []
        for part in np.split(rng.permutation(n), range(window, n, window)):
            part = part[np.argsort(lengths[part], kind="stable")]
            epoch_batches += np.split(part, range(batch_size, len(part), batch_size))
        yield from (epoch_batches[i] for i in rng.permutation(len(epoch_batches)))

def micro_batches(rows, tokens):
    """Rows -> lists of rows of like length, each of at most so many tokens when padded (or of one row)."""
    rows = sorted(rows, key=lambda r: len(r.token))
    n = max(1, tokens // (-(-len(rows[-1].token) // 16) * 16))
    return [rows[i:i + n] for i in range(0, len(rows), n)]

def collate(rows, device="cpu"):
    """Rows -> (idx, position, mask, pick, target), padded on the right. idx, position: (B, T). mask: (B, 1, T, T) bool,
    or None (causal) where no row has a block. pick: (N,) flat indices of all tokens with a target and a few without;
    target: (N,). T and N are rounded up: fewer shapes, for each of which a CPU prepares its kernels, and keeps them."""
    T = -(-max(len(r.token) for r in rows) // 16) * 16
    token, block, branch, position, target = (
        torch.from_numpy(np.stack([np.pad(a, (0, T - len(a)), constant_values=fill) for a in arrays])).to(device)
        for arrays, fill in zip(zip(*rows), (0, 0, 0, 0, IGNORE)))
    mask = branch_mask(block, branch)[:, None] if block.any() else None
    ignored = (target.flatten() == IGNORE).byte()
    pick = ignored.argsort(stable=True)[:-(-int((1 - ignored).sum()) // 128) * 128]
    return token, position, mask, pick, target.flatten()[pick]

# ---- command line -----------------------------------------------------------
def show(record, segments, refusals):
    """Prints an answer: a bar of its own colour before every branch, its title underlined, and what was refused."""
    paint = lambda code, s: f"\x1b[{code}m{s}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else s
    print(paint(1, f"\n--- {record['id']}: {record['prompt'][:100]!r}"))
    for s in segments:
        for i, (title, text) in enumerate([("", s)] if isinstance(s, str) else s):
            bar = "" if isinstance(s, str) else paint(31 + i % 6, "| ")
            print(bar + paint(4, title) + text[len(title):].rstrip("\n").replace("\n", "\n" + bar))
    for reason, start, end in refusals:
        print(paint(2, f"    refused, {reason}: {record['response'][start:start + 60]!r}"))

def main():
    """The command line: the table of what extract() finds."""
    p = argparse.ArgumentParser(description="Finds the independent parts of answers. Next: python train.py")
    p.add_argument("file", nargs="?", help='{"prompt", "response"}, Alpaca or ShareGPT records; none: built-in corpus')
    p.add_argument("--out", metavar="OUT.jsonl", help="write the segments of every answer here")
    p.add_argument("--show", type=int, default=0, metavar="N", help="print N answers with their blocks (default: 0)")
    p.add_argument("--tokenizer", default="bpe", help="bpe (learnt here), a tiktoken name, or a published folder")
    args, totals, reasons = p.parse_args(), defaultdict(Counter), Counter()  # totals: {category: tallied Counter}
    records = lambda: read_records(args.file) if args.file else corpus()
    tokenizer = make_tokenizer(args.tokenizer, (r["response"] for r in records()))
    def lines():
        for n, r in enumerate(tqdm(records(), desc="answers", disable=None)):
            segments, refusals = extract(r["response"], r["prompt"])
            assert join(segments) == r["response"], f"answer {r['id']} does not join back"
            if n < args.show:
                show(r, segments, refusals)
            for category in {str(r.get("category") or "all"), "all"}:
                tally(totals[category], stats(tokenize(segments, tokenizer.encode)))
            reasons.update(reason for reason, _, _ in refusals)
            blocks = [s if isinstance(s, str) else {"branches": [b._asdict() for b in s]} for s in segments]
            del r["response"]
            yield json.dumps({**r, "segments": blocks}, ensure_ascii=False)
    write_whole(args.out, lines()) if args.out else deque(lines(), maxlen=0)  # or for the figures alone
    print(f"\n{'category':<16}{'answers':>8}{'PPD':>8}{'ABN':>8}{'APD':>8}{'APE':>8}{'speedup':>9}{'best':>7}")
    row = "{:<16}{answers:>8}{PPD:>8.1%}{ABN:>8.2f}{APD:>8.1%}{APE:>8.1%}{speedup:>9.2f}{best:>7.2f}"
    for name, total in sorted(totals.items(), key=lambda item: item[0] == "all"):
        print(row.format(name, **summary(total)))
    print("\nblocks refused:" if reasons else "\nno block was refused")
    print(*(f"{n:>8}  {reason}" for reason, n in reasons.most_common()), sep="\n")

if __name__ == "__main__":
    cli(main)
