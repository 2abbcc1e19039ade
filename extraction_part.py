import itertools
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from aspd import MAX_BRANCHES, Block, Branch

# ---- extraction: the outline of an answer -------------------------------------------------------
# An answer is read as an outline: lines open parts (a heading, a list item, ...), parts of one kind are siblings.
# From the outermost kind inwards, siblings become a block, or a rule says why they need each other and their parts are
# looked into in the same way.

TITLE_LENGTH = 80  # characters; the engine lets a title have 32 tokens
LABEL_WORDS = 3    # a longer label is cut to the fewest words that tell its part apart
BREAK = 4          # characters of white space before a part that open its title, at most
GROUP_OVER = 10    # a longer list may put neighbours into one branch
MIN_SAVED = 6      # words; a smaller gain is not worth its tags

NUMBER = r"(\d{1,9}|[一二三四五六七八九十]{1,3}|[ivx]{1,6}|[IVX]{1,6}|[^\W\d_])(?:[.)）．]{1,2}|、)(?![0-9A-Za-z])"
BOLD = r"(\*\*|__)(?![\s*_])(?:(?!\*\*|__).){1,99}"
# A label is a name: three words, or up to eight that are capitalised as in a title. A line that only introduces what
# stands below it ("A good report has three properties:") is a sentence.
NAME = r"[^\W\d_a-z][^\s:：.!?]{0,30}(?:(?: [^\s:：.!?,]{1,30}){0,2}|(?: (?:[a-z]{1,4}|[^\sa-z:：.!?,][^\s:：.!?,]{0,30})){0,7})"
SENTENCE = (r"(?:Here|Note|Subject|Dear|Sure|This|And|Now|So|To|You|I)\b"
    r"|[^:：\n]{0,90}\b(?:is|are|was|were|has|have|had|these|this|follow\w*|includ\w*|needs?|two|three|four|five|several)\b"
    r"|[一-鿿ぁ-ヿ]{9}|[^:：\n]{0,9}(?:有|是|如下|以下|包括)")
LEVELS = [(name, rank, re.compile(pattern, re.M)) for name, rank, pattern in [
    # name, rank (the smaller, the further out), pattern (group 1: siblings have it in common)
    ("heading", 0, r"(#{1,6})[ \t]+\S"),  # its rank is the number of #
    ("underlined heading", 1, r"(?=[^\n]*\n([-=])\1{2,}[ \t\r]*$)[^\s|]"),
    ("bold line", 7, BOLD + r"\1[:：]?[ \t\r]*$"),
    ("bold label", 8, BOLD + r"(?:[:：]\1|\1[:：])"),
    ("ordinal", 9, r"(\*\*|__|)(?:(?:First|Second|Third|Fourth|Fifth)(?:ly)?\1[,:]|(?:One|Another) |(?:Additional|Further|More)\w+,)"),
    ("number", 10, r"((?:\*\*|__)?[(（]?)" + NUMBER),
    ("bullet", 10, r"([-*+–](?=[ \t]+\S)|[•‣◦▪●・](?=[ \t]*\S))"),
    ("label", 8, rf"()(?!{SENTENCE}){NAME}(?::(?=\s|$)|：)"),
]]
OPAQUE = re.compile(r"""  # what is never cut: reasoning, code, formulas, tables. Not closed, it lasts to the end
    \A (?: [\s\S]*? </think> | \s* <think> [\s\S]* )
    | ^ [ \t]* (?: (`{3,}) (?!`) [^`\n]* | (~{3,}) (?!~) .* ) $
      [\s\S]*? (?: ^ [ \t]* (?: \1 `* | \2 ~* ) [ \t\r]* $ | \Z )
    | ^ [ \t]* \$\$ (?! .* \$\$ ) [\s\S]*? (?: \$\$ | \Z )
    | ^ (?: .* \\\[ [ \t\r]* $ | [ \t]* \\\[ (?! .* \\\] ) ) [\s\S]*? (?: \\\] | \Z )
    | ^ [ \t]* (?: \| | \$\$ | \\\[ ) .*""", re.M | re.X)
HIDDEN = "\0"  # stands for a character of an opaque region
CONCLUDES = re.compile(r"(?:In )?Summary|(?:Key )?Takeaway|Bottom Line|In short|Overall|Therefore|Final Answer|Calculating"
            r"|(?:Explanation|Solution|Comparison|Instructions|Directions|Total|Output|Answer|Results?)[ \t]*[:*\n(]|总结|综上|总之", re.I)
MARKER = re.compile(rf"\W*(?:{NUMBER})?\W*")  # of a part; its text begins after it


class Mark(NamedTuple):
    """What a line is in the outline."""
    level: str          # a name of LEVELS if it opens a part, else one of TEXT
    rank: int
    notation: str = ""  # siblings have level, rank and notation in common
    number: int = 0     # 0 where it has none

    @property
    def kind(self):
        return self[:3]

    @property
    def opens(self):
        return self.level not in CLOSED


CLOSED = ("text", "blank", "opaque", "conclusion", "alone")


ONES = ["", *"一二三四五六七八九"]
CHINESE = {tens + one: 10 * i + k for i, tens in enumerate(["", "十", *(o + "十" for o in ONES[2:])]) for k, one in enumerate(ONES)}
ROMAN = {tens + one: 10 * i + k for i, tens in enumerate(["", "x", "xx", "xxx"])
         for k, one in enumerate(["", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix"])}


def read_number(symbol, letters, key):
    """"3", "c", "iii" or "三" -> (its script, 3). letters: {key: the last letter read there}, for "i" may follow "h"."""
    if symbol.isdecimal():
        return "1", int(symbol)
    if symbol in CHINESE:
        return "一", CHINESE[symbol]
    small = symbol.lower()
    case = "a" if small == symbol else "A"
    goes_on = len(symbol) == 1 and letters.get((*key, case)) == ord(small) - 1
    if small in ROMAN and not goes_on:
        return "i" if case == "a" else "I", ROMAN[small]
    if len(small) != 1:
        return case, 0
    letters[(*key, case)] = ord(small)
    return case, ord(small)


def bare(text):
    """The text without its marker."""
    return text[MARKER.match(text).end():]


def read_mark(line, below, letters):
    indent = len(line) - len(line.lstrip())
    depth = len(line[:indent].expandtabs(4)) // 2
    content = line.strip("-=*_ \t\r\n")
    if not content or not line.strip():
        return Mark("blank", 10 + depth)
    if content[0] == "\0":
        return Mark("opaque", 10 + depth)
    for level, rank, pattern in LEVELS:
        if depth > (6 if rank == 10 else 1):
            continue
        m = pattern.match(line + below, indent)
        if not m:
            continue
        notation, number = m[1], 0
        if level == "heading":
            rank = len(m[1])
        if rank == 10:
            rank += depth
        if level == "number":
            script, number = read_number(m[2], letters, (m[1], depth))
            notation += script
        if rank < 10 and CONCLUDES.match(bare(line)):
            level = "conclusion"
        return Mark(level, rank, notation, number)
    return Mark("text", 10 + depth)


def hide(m):
    return re.sub(r"[^\n]", "\0", m[0])


def read_marks(text):
    """The Mark of every line."""
    marks, letters = [], {}
    lines = re.findall(r"[^\n]*\n|[^\n]+", OPAQUE.sub(hide, text))
    seen = Counter(line.split(":")[0] for line in lines)
    for line, below in zip(lines, [*lines[1:], ""]):
        mark = read_mark(line, below, letters)
        if "label" in mark.level:
            before = marks[-1].level if marks else "blank"
            if seen[line.split(":")[0]] > 1 or before in ("text", "label", "bold label", "opaque"):
                mark = Mark("text", 10)
        marks.append(mark)
    return lines, marks


@dataclass
class Run:
    """Siblings: parts of one kind in a stretch of lines."""
    mark: Mark
    at: list    # the lines where its parts start
    end: int    # the line after its last part

LONEBAR = False
def find_runs(lines, marks, first, last, kind):
    rank = kind[1]
    at = [i for i in range(first, last) if marks[i].kind == kind]
    runs, run, allowed = [], None, 0
    for i, stop in zip(at, [*at[1:], last]):
        if run and marks[i].number >= marks[run.at[-1]].number:
            run.at.append(i)
        else:
            run = Run(marks[i], [i], stop)
            runs.append(run)
            allowed = MINALLOWED if rank < 9 else 0
        run.end = stop
        held = 0
        for k in range(i + 1, stop):
            mark = marks[k]
            if mark.rank < rank and mark.level not in ("text", "blank", "opaque") and (LONEBAR or mark.rank<8) or mark.level == "conclusion" and mark.rank <= rank:
                run.end = k
                run = None
                break
            if (mark.level == "text" or not LONEBAR and mark.rank in (8,9)) and marks[k - 1].level in ("blank", "opaque") and mark.rank <= max(rank, 10):
                held += 1
                concludes = CONCLUDES.match(lines[k])
                if len(run.at) > 1 and (held > allowed or concludes):
                    if rank >= 9 or stop == last:
                        run.end = k
                        if rank >= 9:
                            run = None
                        break
        allowed = max(allowed, held)
    for run in runs:
        if rank < 8 and len(run.at) > 1 and all(m.level == "blank" for m in marks[run.at[0] + 1:run.at[1]]):
            del run.at[0]
    return [run for run in runs if len(run.at) > 1]
MINALLOWED = 0


def outermost(marks, first, last):
    kinds = Counter(mark.kind for mark in marks[first:last] if mark.opens)
    return min((kind for kind, n in kinds.items() if n > 1), key=lambda kind: kind[1], default=None)


LABEL_END = re.compile(r"[:：]|\*\*|__| [-–—](?: |$)")
WORD = re.compile(r"[一-鿿ぁ-ヿ]|[^\s:：*一-鿿ぁ-ヿ]+")


def name_parts(parts, listed):
    """A title for each part: its label if that is short and, in a list, its own, else the fewest words that no sibling
    starts with."""
    heads, titles = [], []
    for part in parts:  # the first line up to each of its first words; something of the part stays after its title
        line = part[:TITLE_LENGTH].split("\n")[0].rstrip()
        words = WORD.finditer(line, len(line) - len(bare(line)))
        heads.append([line[:m.end()] for m in words] or [line])
    count = Counter(bare(head).lower() for openings in heads for head in openings)
    for openings in heads:
        label = [opening for opening in openings if not LABEL_END.search(bare(opening))]
        unique = [opening for opening in openings if count[bare(opening).lower()] == 1 and len(bare(opening)) > 4]
        named = 0 < len(label) <= LABEL_WORDS and not (count[bare(label[-1]).lower()] > 1)
        titles.append(label[-1] if named else [*unique, openings[-1]][0])
    return titles


def group(parts, titles):
    """How many neighbours share a branch, 0 if no steps are saved: one, or more where the list is long."""
    n, length, best = len(parts), [len(WORD.findall(part)) for part in parts], (MIN_SAVED, 0)
    for size in {-(-n // count) for count in range(4, MAX_BRANCHES + 1)} if n > GROUP_OVER else {1}:
        rest = [sum(length[i:i + size]) - len(WORD.findall(titles[i])) for i in range(0, n, size)]
        # the longest rest is still waited for, and the tags: two a title, <|para|>, <|/para|> and one <|/branch|>
        best = max(best, (sum(rest) - max(rest) - 2 * len(rest) - 3, size))
    return best[1]


# validation: a branch may rely on the question, the text before its block and all titles, not on a sibling's body
WORDS = re.compile(r"[^\W_](?:[\w.,'-]*\w)?")
NOUN = r"(?:[a-z'-]+ ){0,2}?([a-z'-]{3,}?)s?(?=[^\w '-]|'s\b| (?:and|or|of|to|in|on|for|with|by|from|at|is|are|that|who|which)\b)"
SAYS = [  # reason, what a part of the block says after its marker: it goes on from, or works on, what a sibling says
    ("is a song or a play", r"(?m)^[^\w\n]{0,9}(?:Verse|(?:Pre-)?Chorus|Outro|Scene|Act|FADE)\b[^a-z\n]{0,40}$"
     r"|\APanel \d|\A[^\n:]{1,40}(?:\([a-z]+(?:ly|ing|ed)\)\**:|:\W{1,4}\([a-z]+(?:ly|ing|ed)\))"),
    ("opens by going on", r"\A(?:However|Thus|As a result|Then|Meanwhile|Now|(?:Next|Also)(?=,)|If (?:yes|no|so))\b"),
    ("points at a sibling", r"\A[A-Z]\w+ th(?:is|ese) [a-z]|\bas \w+ (?:above|earlier)\b|(?<=[a-z,(] )[Ss]teps? \d"
     r"|\b[Rr]epeat (?:the|steps?)\b|\b(?:above|previous|preceding|the last) (?:step|section|item|part|day)\b"
     r"|\bthe (?:\w+ )?above\b|上述|如上|上一步"),
]
BRINGS = [  # reason, what a part brings in, how a later one takes it up, how often, title of the parts
    ("uses a value worked out in a sibling", r"[=≈][^\w\n]{0,6}(\d[\d,.]*\d)(?!\S{0,9} *[-+*/])", r"\d[\d,.]*\d", 1, ""),
    ("uses a name of a sibling", *[r"\b[a-z](?=\w*(?:_\w|[a-z][A-Z][a-z]))\w+|\b(?:[A-Z][a-z]+){3}\w*"
     r"|(?<=[\"'#/])[a-z]\w*(?:-\w+)+|(?<=[\"'])[A-Z]\w{3,}(?=[\"'])"] * 2, 1, ""),
    ("takes up a thing of a sibling", rf"\b(?:[Aa]n?|one|some) {NOUN}", rf"\b[Tt]he {NOUN}(?! (?:of|that|wh))", 2, ""),
    ("goes on with a sibling's story", *[r"(?<=[a-z,] )[A-Z][a-z]{3,}"] * 2, 4,
     r"\W*(?:Day|Week|Chapter|Episode|Part|Act|Panel|Scene|Page) [\dIV]"),
]

def dependence(parts, titles, start, said):
    """Yields why a part needs another. start: of the block; said: where each word of the text is said first."""
    if len({bare(title).strip(" *:_").lower() for title in titles}) < len(titles):
        yield "titles are not distinct"
    bodies = [bare(part) for part in parts]
    if CONCLUDES.match(bodies[-1]):  # a list item; a heading has ended its run
        yield "works on what its siblings say"
    yield from (reason for reason, pattern in SAYS if any(re.search(pattern, body) for body in bodies))
    known = {name.lower().rstrip("s") for title in titles for name in WORDS.findall(title)}
    for reason, brings, takes_up, times, only in BRINGS:
        brought, hits = set(), 0
        for part, title in zip(parts, titles) if re.match(only, titles[0]) else ():
            own = set(re.findall(brings, part))
            taken = set(re.findall(takes_up, part[len(title):])) & brought - (set() if brings == takes_up else own)
            hits += sum(said.get(word, -1) >= start for word in {word.lower().rstrip("s") for word in taken} - known)
            brought |= own
        if hits >= times:
            yield reason


def extract(text, prompt=""):
    lines, marks = read_marks(text)
    starts = [0, *itertools.accumulate(map(len, lines))]
    said = {}
    for m in WORDS.finditer(prompt + "\n" + text):  # where a word is first said; in the prompt: before 0
        said.setdefault(m[0].lower().rstrip("s"), m.start() - len(prompt) - 1)
    blocks, refusals = [], []
    todo = [(0, len(lines))]
    while todo:
        first, last = todo.pop()
        kind = outermost(marks, first, last)
        if not kind:
            continue
        at = first
        for run in find_runs(lines, marks, first, last, kind):
            todo.append((at, run.at[0]))
            at = run.end
            end = run.end
            while marks[end - 1].level == "blank":
                end -= 1
            spans = []
            for i, stop in zip(run.at, [*run.at[1:], end]):
                start = starts[i]
                spans.append((start, start + len(text[start:starts[stop]].rstrip())))
            parts = [text[a:b] for a, b in spans]
            titles = name_parts(parts, run.mark.rank > 9)
            size = group(parts, titles)
            reason = next(dependence(parts, titles, spans[0][0], said), "") if size else "saves no steps"
            if reason:
                refusals.append((reason, spans[0][0], spans[-1][1]))
                todo += zip(run.at, [*run.at[1:], run.end])
            else:
                block = Block()
                here = opens = spans[0][0]
                for i in range(0, len(spans), size):
                    start = spans[i][0]
                    end = spans[min(i + size, len(spans)) - 1][1]
                    if i + size < len(spans):
                        gap = min(spans[i + size][0] - end, BREAK)
                        end = spans[i + size][0] - gap
                    cut = start + len(titles[i])
                    block.append(Branch(text[here:cut], text[cut:end]))
                    here = end
                blocks.append((opens, end, block))
        todo.append((at, last))
        for i in range(first, last):
            if marks[i].kind == kind:
                marks[i] = Mark("alone", kind[1])
    segments, done = [], 0
    for start, end, block in sorted(blocks, key=lambda b: b[0]):
        segments += [text[done:start], block]
        done = end
    return [s for s in [*segments, text[done:]] if s], sorted(refusals, key=lambda r: r[1])
