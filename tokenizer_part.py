# ---- the tokenizer: byte-level BPE, computed by tiktoken --------------------

# Cuts text into words, which are encoded apart; the same to `re`, which learns, and to tiktoken.
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
PLAIN_FORM = [["{system}\n"], ["User: {prompt}\nAssistant:\n"]]


class Tokenizer:
    """Text <-> ids; no text ever becomes a special token.

    pattern: cuts text into words. ranks: {a token's bytes: its id, also its merge priority}. eos: the
    id that ends an answer. tags: six ids, in the order of TAG_NAMES, or None. stop: more ids that end
    an answer. chat: the forms of a system text and of a prompt, lists of text and special ids. system:
    the default system text. nfc: normalise text? added: {text: id} of text that is matched before all
    else. taken: ids that tags must not get."""

    def __init__(self, pattern, ranks, eos, tags=None, stop=(), chat=PLAIN_FORM, system="",
                 nfc=False, added={}, taken=()):
        self.settings = dict(locals())  # plain values, for a checkpoint
        del self.settings["self"]
        self.eos = eos
        self.tags = tags and Tags(*tags)
        self.stop = {eos, *stop}
        self.bpe = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bytes = {i: token for token, i in ranks.items()}
        self.bytes |= {i: text.encode() for text, i in added.items()}
        self.vocab_size = max(*self.bytes, *self.stop, *taken, *(tags or ())) + 1
        self.lacking = {b for b in range(256) if bytes([b]) not in ranks}  # in some published ones
        names = [re.escape(text) for text in sorted(added, key=len, reverse=True)]
        self.find_added = re.compile("(" + "|".join(names or ["(?!)"]) + ")")  # the longest first

    def encode(self, text):
        """str -> list of ids. What UTF-8 cannot write and what has a lacking byte become U+FFFD."""
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        added = self.settings["added"]
        ids = []
        for piece in self.find_added.split(text):
            ids += [added[piece]] if piece in added else self.bpe.encode_ordinary(self.clean(piece))
        return ids

    def clean(self, text):
        """Text -> text that the vocabulary can write."""
        if self.settings["nfc"]:
            text = unicodedata.normalize("NFC", text)
        if self.lacking:
            text = "".join(c if self.lacking.isdisjoint(c.encode()) else "\ufffd" for c in text)
        return text

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
        """Gives the tags the first ids that are free -> a new Tokenizer."""
        taken = {*self.bytes, *self.stop, *self.settings["taken"]}
        free = (i for i in itertools.count() if i not in taken)
        return Tokenizer(**self.settings | {"tags": tuple(itertools.islice(free, 6))})


def learn_bpe(text, vocab_size=2048):
    """Byte pair encoding learnt from text -> ranks. Holds the commonest words with their counts, and
    a word as a str that has one character for each of its tokens."""
    words = Counter(re.findall(PATTERN, text)).most_common(4000)
    words = [(word.encode("utf-8", "replace").decode("latin-1"), n) for word, n in words]
    tokens = {chr(b): bytes([b]) for b in range(256)}
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = max(pairs, key=pairs.get, default=None)
        if pairs[best] < 2:
            break
        new = chr(len(tokens))
        tokens[new] = tokens[best[0]] + tokens[best[1]]
        words = [(word.replace("".join(best), new), n) for word, n in words]
    return {token: i for i, token in enumerate(tokens.values())}


def make_tokenizer(name, texts):
    """A Tokenizer with tags. name: "bpe", which is learnt from the texts; a published folder; or one
    that tiktoken knows."""
    if name == "bpe":
        ranks = learn_bpe("".join(itertools.islice(texts, 2000)))
        return Tokenizer(PATTERN, ranks, eos=len(ranks)).add_tags()
    if Path(name).is_dir():
        return published_tokenizer(name).add_tags()
    known = tiktoken.get_encoding(name)
    return Tokenizer(known._pat_str, known._mergeable_ranks, known.eot_token).add_tags()


# ---- published tokenizers ---------------------------------------------------

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after digits have been split off, one by one, as in SmolLM2.
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")
# Vocabularies write a byte as the character of that number or, if it is not visible, one from 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in VISIBLE]
TO_BYTE = {chr(b): b for b in VISIBLE} | {chr(256 + n): b for n, b in enumerate(HIDDEN)}
CHATML = {  # the templates that are known, by the hash of their text: their default system text
    "x": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "y": "You are a helpful assistant.",  # Qwen2
    "z": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",  # Qwen2.5
    "u": "",
}


def published_tokenizer(path):
    """The tokenizer of a published folder, without tags: the same ids, the same prompts. ValueError,
    by name, for whatever would change them and is not implemented."""
    path = Path(path)
    t = read_json(path / "tokenizer.json")
    check(t, f"{path}: no tokenizer.json in it, and others (SentencePiece) are not supported")
    with naming(path / "tokenizer.json"):
        special = {a["content"]: a["id"] for a in t["added_tokens"] if a["special"]}
        added = {a["content"]: a["id"] for a in t["added_tokens"] if not a["special"]}
        for a in t["added_tokens"]:
            plain = not (a["single_word"] or a["lstrip"] or a["rstrip"])
            check(plain, f"the added token {a} is not supported")
        normalizer = (t["normalizer"] or {}).get("type")
        check(normalizer in (None, "NFC"), f"the normalizer {normalizer} is not supported")
        adds = re.search("'(SpecialToken|sep)'", str(t["post_processor"]))
        check(not adds, "a token before or after all text is not supported")
        ranks = read_ranks(t["model"], special | added)
        pattern = word_pattern(t["pre_tokenizer"] or {})
    with naming(path):
        config = read_json(path / "tokenizer_config.json")
        eos, *stop = end_ids(path, config, special)
        chat, system = chat_form(path, config, special)
        return Tokenizer(pattern, ranks, eos, None, stop, chat, system, normalizer == "NFC", added,
                         taken=list(special.values()))


def read_text(path):
    """A file of a published folder -> str, "" where it is missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    check(text[:7] != "version", f"{path} is a Git LFS pointer: run `git lfs pull` in its folder")
    return text


def read_json(path):
    """A JSON file of a published folder -> dict, {} where it is missing."""
    text = read_text(path)
    with naming(path):
        return json.loads(text or "{}")


def read_ranks(model, added):
    """The BPE model of a tokenizer.json -> ranks. added: the tokens that are not of the BPE.

    tiktoken joins the neighbours that make a token, the one with the lowest id first. That is what
    the merges say if ids are in their order and every token comes out of its own merges."""
    supported = model["type"] == "BPE" and not model.get("byte_fallback")
    check(supported, f"a {model['type']} model, or one with byte_fallback, is not supported")
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    ids = {*model["vocab"].values(), *added.values()}
    check(len(ids) == len(vocab) + len(added), "an id of two tokens is not supported")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    merged = [(vocab[a], vocab[b], vocab[a + b])[2] for a, b in merges]
    check(merged == sorted(merged), "ids in another order than the merges are not supported")
    order = {merge: n for n, merge in enumerate(merges)}
    for token in vocab:
        own = apply_merges(token, order) == [token] and set(token) <= TO_BYTE.keys()
        check(own, f"the token {token!r} does not come out of its bytes and their merges")
    return {bytes(TO_BYTE[c] for c in token): i for token, i in vocab.items()}


def apply_merges(token, order):
    """Byte pair encoding by the book: joins the neighbours that stand first in the order, and again."""
    parts = list(token)
    while True:
        pairs = list(zip(parts, parts[1:]))
        first = min(pairs, key=lambda pair: order.get(pair, len(order)), default=None)
        if first not in order:
            return parts
        i = pairs.index(first)
        parts[i:i + 2] = ["".join(first)]


def word_pattern(pre):
    """The pre_tokenizer of a tokenizer.json, which cuts text into words -> a pattern that does it."""
    *before, last = pre.get("pretokenizers", [pre])
    kinds = [part.get("type") for part in [*before, last]]
    kinds += [last.get("use_regex"), last.get("add_prefix_space")]
    if kinds == ["ByteLevel", True, False]:
        return GPT2
    if kinds == ["Digits", "ByteLevel", True, False] and before[0]["individual_digits"]:
        return DIGITS
    if kinds == ["Split", "ByteLevel", False, False] and before[0]["behavior"] == "Isolated":
        return before[0]["pattern"]["Regex"]
    raise ValueError(f"the pre_tokenizer {pre} is not supported")


def end_ids(path, config, special):
    """-> the id that ends an answer in training, then all that end one."""
    eos = config.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    check(eos in special, f"tokenizer_config.json: the eos_token {eos!r} is no special token")
    ids = [special[eos]]
    for name in ("config.json", "generation_config.json"):
        more = read_json(path / name).get("eos_token_id")
        ids += more if isinstance(more, list) else [more]
    return [i for i in ids if i is not None]


def chat_form(path, config, special):
    """-> the forms of a system text and of a prompt, and the default system text."""
    template = read_text(path / "chat_template.jinja") or config.get("chat_template")
    if isinstance(template, list):  # several, each with its name
        template = {named["name"]: named["template"] for named in template}["default"]
    if not template:
        return [["{system}\n"], ["{prompt}\n"]], ""
    # a line break within quotes is the same as \n
    template = re.sub("'[^']*'", lambda quoted: quoted[0].replace("\n", r"\n"), template)
    digest = hashlib.sha256(template.removesuffix("\n").encode()).hexdigest()[:16]
    check(digest in CHATML, f"its chat template ({digest}) is not supported")
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    prompt_form = [start, "user\n{prompt}", end, "\n", start, "assistant\n"]
    return [[start, "system\n{system}", end, "\n"], prompt_form], CHATML[digest]
