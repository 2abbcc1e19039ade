# ---- rows and batches -------------------------------------------------------

def split_held_out(records):
    """-> (train, held out): the answers to 2% of the prompts, the same in every run. At least one
    prompt is held out where there are two, none where there is one."""
    prompts = {r["prompt"] for r in records}
    shuffled = sorted(prompts, key=lambda prompt: random.Random(repr(prompt)).random())
    held = set()
    if len(prompts) > 1:
        held = set(shuffled[:max(1, len(prompts) // 50)])
    train = [r for r in records if r["prompt"] not in held]
    return train, [r for r in records if r["prompt"] in held]


def make_rows(records, tokenizer, config, mode="aspd"):
    """Answers -> (list of Rows, Metrics), without those whose tagged row exceeds the context.

    mode: "aspd" is tagged, "serial" the plain answer; both leave out the same answers, so that models
    of either kind can be compared."""
    tags = tokenizer.tags or Tags(*[tokenizer.eos] * 6)  # a serial model has none; as long
    rows = []
    metrics = Metrics()
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
        metrics.add(stats(ids))
    return rows, metrics


def batches(lengths, batch_size, seed):
    """Endlessly yields batches, arrays of indices into lengths (N,), in a new order every epoch.
    Rows of a batch are of like length, so that little is padded: windows of 32 batches are sorted."""
    window = 32 * batch_size
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        epoch_batches = []
        for some in np.split(rng.permutation(len(lengths)), range(window, len(lengths), window)):
            some = some[np.argsort(lengths[some], kind="stable")]
            epoch_batches += np.split(some, range(batch_size, len(some), batch_size))
        for i in rng.permutation(len(epoch_batches)):
            yield epoch_batches[i]


def collate(rows, device="cpu"):
    """Rows -> (idx, position, mask, target), padded on the right to a multiple of 16: fewer shapes,
    for each of which kernels are chosen, or compiled, anew.

    idx, position, target: (B, T). mask: (B, 1, T, T) bool; None, causal, if no row has a block."""
    T = math.ceil(max(len(row.token) for row in rows) / 16) * 16

    def stack(name, fill=0):
        tensors = [getattr(row, name) for row in rows]
        padded = [F.pad(tensor, (0, T - len(tensor)), value=fill) for tensor in tensors]
        return torch.stack(padded).to(device)

    mask = None
    if any(row.block.any() for row in rows):
        mask = branch_mask(stack("block"), stack("branch"))[:, None]
    return stack("token"), stack("position"), mask, stack("target", fill=IGNORE)


# ---- loading ----------------------------------------------------------------

MAX_LINE = 64 * 2**20  # bytes
LAYOUTS = ('{"prompt", "response"}, {"instruction", "input", "output"}, '
           '{"conversations": [{"from", "value"}]}, {"messages": [{"role", "content"}]}')
USERS = {"user", "human", "prompter"}
ASSISTANTS = {"assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"}


def printable(text):
    """Text for a terminal: control characters, which could steer it, are shown like \\x1b."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def parse_json(text, where):
    """UTF-8 bytes -> object. ValueError with the place for anything else."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        hint = "JSON Lines has one object a line"
        raise ValueError(f"{where}: not JSON: {e} ({hint})") from None


def given(fields):
    """A dict without the fields that hold nothing: tables write null or NaN for "not given"."""
    return {key: v for key, v in fields.items() if v is not None and v == v}


def read_objects(path):
    """Yields (place, dict) for every record of a JSON array, which is read whole, or of JSON Lines,
    of which one line at a time is in memory. ValueError with the place."""
    with open(path, "rb") as f:
        records = None
        for n, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), start=1):
            start = line.removeprefix(b"\xef\xbb\xbf").strip()[:1]
            if not start:
                continue
            if start == b"[" and records is None:
                records = parse_json(line + f.read(), path)
                places = [f"{path}, record {k}" for k in range(1, len(records) + 1)]
            else:
                places = [f"{path}, line {n}"]
                check(len(line) <= MAX_LINE, f"{places[0]}: longer than {MAX_LINE} bytes")
                records = [parse_json(line, places[0])]
            for where, r in zip(places, records):
                check(isinstance(r, dict), f"{where}: expected an object, not {type(r).__name__}")
                yield where, given(r)


def only(fields, *names):
    """The value of the one field given under these names; None for none or several of them."""
    values = [fields[name] for name in names if name in fields]
    return values[0] if len(values) == 1 else None


def read_turns(record):
    """The turns of a record as [(role, text)]; none where it is in none of the LAYOUTS."""
    if {"prompt", "response"} <= record.keys():
        return [("user", record["prompt"]), ("assistant", record["response"])]
    if {"instruction", "output"} <= record.keys():
        asked = [("user", record[key]) for key in ("instruction", "input") if key in record]
        return [*asked, ("assistant", record["output"])]
    turns = only(record, "conversations", "messages")
    turns = turns if isinstance(turns, list) else []
    turns = [given(turn) if isinstance(turn, dict) else {} for turn in turns]
    return [(only(t, "from", "role"), only(t, "value", "content")) for t in turns]


def read_answers(record, left_out):
    """Yields (prompt, answer) for every answer of a record, its prompt the user's turn before it.
    Turns of one role in a row are one. Counts in left_out what yields no answer, by reason."""
    turns = []
    for role, text in read_turns(record):
        name = str(role).strip().lower()
        if name in USERS | ASSISTANTS:
            turns.append((name in USERS, text))
        elif name != "system":
            left_out[f"turn of {role!r:.40}"] += 1
    if not turns:
        left_out[f"record with the fields {', '.join(record):.100}"] += 1

    prompt = ""
    for is_user, group in itertools.groupby(turns, key=lambda turn: turn[0]):
        texts = [text for _, text in group]
        if all(isinstance(text, str) for text in texts):
            text = "\n\n".join(text for text in texts if text.strip())
        else:
            text = ""
        if is_user:
            prompt = text
        elif prompt and text:
            yield prompt, text
        else:
            left_out["answer without text" if prompt else "answer without a prompt"] += 1
    if turns and is_user:
        left_out["prompt without an answer"] += 1


def read_records(path):
    """Yields {"id", "prompt", "response", ...} for every answer of a file, then says on stderr what
    was left out. ValueError for a file without an answer, and for what is not JSON."""
    n_answers = 0
    left_out = Counter()
    for n, (_, record) in enumerate(read_objects(path)):
        kept = {"id": n}
        kept |= {key: record[key] for key in ("id", "category", "model", "facts") if key in record}
        pairs = list(read_answers(record, left_out))
        for k, (prompt, response) in enumerate(pairs):
            own = {"id": f"{kept['id']}-{k}"} if len(pairs) > 1 else {}
            yield kept | own | {"prompt": prompt, "response": response}
        n_answers += len(pairs)
    reasons = ", ".join(f"{n} x {reason}" for reason, n in left_out.most_common(10))
    check(n_answers, f"{path}: no usable answers: {reasons or 'no records'}; read are {LAYOUTS}")
    if left_out:
        tqdm.write(printable(f"{path}: left out: {reasons}"), file=sys.stderr)


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
    """Writes lines to a file whole or not at all; a link, a device or a pipe stays what it is."""
    temporary = path = Path(path)
    if path.is_file() or not path.exists():
        path = path.resolve()
        temporary = Path(f"{path}.tmp")
    try:
        # a lone surrogate is written as JSON escapes it, \ud83d
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f:
            f.writelines(line + "\n" for line in lines)
        temporary.replace(path)
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


def cli(main):
    """Runs a command line's main(). Bad input: one clear line on stderr and exit code 2. Ctrl-C: 130.
    Nobody reads on, as behind `| head`: a quiet end, 141."""
    try:
        sys.stdout = sys.stdout or open(os.devnull, "w")  # where it was closed before the start
        sys.stderr = sys.stderr or open(os.devnull, "w")
        sys.stdout.reconfigure(errors="backslashreplace")  # for lone surrogates
        try:
            main()
        finally:
            sys.stdout.flush()  # fails here, if it fails, and not when Python ends
    except BrokenPipeError:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.exit(128 + 13)  # as if ended by SIGPIPE
    except (ValueError, OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "compiler" not in str(e):  # --compile found none
            raise
        line = " ".join(str(e).split("\n\n")[0].split())
        print("error:", printable(line), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- the built-in corpus ----------------------------------------------------
# Chat answers from one small table of facts, to watch a model learn when to open a block and to mark
# what it says. To "Give me a numbered list of facts about bears and goats.":
#
#     One by one:
#
#     1. **Bears**: Bears weigh about 300 kg and ... Bears live in thick forests in ... and eat ...
#     2. **Goats**: Goats weigh about 60 kg and ... Goats live on steep rocks high in ... and eat ...
#
#     Overall, goats are the lightest and bears the heaviest.

ANIMALS = """\
Bears|300|25|in thick forests of the far north|berries, roots, fish and honey
Camels|600|40|in hot deserts with little water|dry grass, thorns and salty leaves
Elephants|5000|65|in open country near wide rivers|bark, fruit and a lot of grass
Foxes|6|5|in woods, fields and quiet gardens|mice, birds, eggs and fallen apples
Goats|60|15|on steep rocks high in the mountains|herbs, moss and very short grass
Hippos|1500|45|in slow rivers and muddy lakes|soft grass that they find at night
Lions|190|13|on warm plains with long yellow grass|zebras, antelopes and young giraffes
Wolves|40|8|in cold hills and snowy forests|deer, hares and now and then a sheep
"""
FORMS = {  # its words in a prompt; what stands before, how each thing is told, what stands after
    "numbered": ("a numbered list of", "One by one:\n\n", "{i}. **{name}**: {size} {life}\n", "\n"),
    "bulleted": ("bullet points on", "In short:\n\n", "- **{name}**: {size} {life}\n", "\n"),
    "headed": ("a guide to", "A short guide.\n\n", "### {name}\n\n{size} {life}\n\n", ""),
    "nested": ("a fact sheet for", "Facts:\n\n", "- **{name}**\n  - {size}\n  - {life}\n", "\n"),
    "prose": ("a paragraph about", "", "{size} {life} ", ""),
    "sums": ("a running sum of", "Day by day:\n\n", "Day {i}: {before} + {km} = {after} km.\n", "\n"),
}
ASKS = ("Write {} {}.", "Give me {} {}.", "Can you make {} {}?")


def tell_animals(rows, thing):
    """-> the parts of an answer about rows of ANIMALS, the facts in them and in the conclusion."""
    parts = []
    facts = []
    for i, (name, kg, years, home, food) in enumerate(rows, start=1):
        size = f"{name} weigh about {kg} kg and can live for {years} years."
        life = f"{name} live {home} and eat {food}."
        parts.append(thing.format(i=i, name=name, size=size, life=life))
        facts += [size, life]
    by_weight = sorted(rows, key=lambda row: int(row[1]))
    lightest = by_weight[0][0].lower()
    heaviest = by_weight[-1][0].lower()
    return parts, [*facts, f"Overall, {lightest} are the lightest and {heaviest} the heaviest."]


def tell_sums(km, days, thing):
    """The same for running sums, in which every line needs the one before: they must stay serial."""
    parts = []
    for i in range(1, days + 1):
        parts.append(thing.format(i=i, before=km * (i - 1), km=km, after=km * i))
    return parts, [*map(str.strip, parts), f"In all, that is {km * days} km."]


def corpus(n=6000, seed=1337, split="train"):
    """-> n records {"id", "category", "prompt", "response", "facts"}; facts: sentences to mark an
    answer by. In "val" it is about things of which "train" has no answer of this kind."""
    rng = random.Random(f"{split} {seed}")
    table = [line.split("|") for line in ANIMALS.splitlines()]
    records = []
    while len(records) < n:
        kind = list(FORMS)[len(records) % len(FORMS)]
        asked, before, thing, after = FORMS[kind]
        if kind == "sums":
            km, days = rng.randint(2, 15), rng.randint(3, 8)
            about = f"{km} km a day for {days} days"
            parts, facts = tell_sums(km, days, thing)
        else:
            rows = sorted(rng.sample(table, rng.randint(2, 8)))
            names = [row[0].lower() for row in rows]
            about = ", ".join(names[:-1]) + " and " + names[-1]
            parts, facts = tell_animals(rows, thing)
        if (random.Random(f"{kind} {about}").random() < 1 / 8) == (split == "val"):
            prompt = rng.choice(ASKS).format(asked, about)
            response = before + "".join(parts) + after + facts[-1]
            records.append({"id": len(records), "category": kind, "prompt": prompt,
                            "response": response, "facts": facts})
    return records


# ---- command line -----------------------------------------------------------

def show(record, segments, refusals):
    """Prints an answer: each branch behind a numbered bar, its title in brackets; what was refused."""
    print(printable(f"\n--- {record['id']}: {record['prompt'][:80]!r}"))
    for segment in segments:
        if not isinstance(segment, Block):
            print(printable(segment.strip("\n")))
            continue
        for i, (title, rest) in enumerate(segment, start=1):
            text = f"[{title.strip()}]{rest}"
            print(printable(f"{i:>2}| " + text.replace("\n", f"\n{i:>2}| ")))
    for reason, start, _ in refusals:
        print(f"    refused, {reason}: {record['response'][start:start + 60]!r}")


def extract_all(records, tokenizer, n_shown, metrics, refused):
    """Yields what extract() finds in every answer as a line of JSON; shows the first n_shown. Counts
    their figures in metrics {category: Metrics}, the reasons of refusals in refused."""
    for n, r in enumerate(tqdm(records, desc="answers", disable=None)):
        segments, refusals = extract(r["response"], r["prompt"])
        check(join(segments) == r["response"], f"answer {r['id']} does not join back")
        if n < n_shown:
            show(r, segments, refusals)
        counted = stats(tokenize(segments, tokenizer.encode))
        for category in {str(r.get("category") or "all"), "all"}:
            metrics[category].add(counted)
        refused.update(reason for reason, _, _ in refusals)
        written = []
        for segment in segments:
            if isinstance(segment, Block):
                segment = {"branches": [{"title": b.title, "text": b.title + b.rest} for b in segment]}
            written.append(segment)
        del r["response"]
        yield json.dumps(r | {"segments": written}, ensure_ascii=False)


def main():
    """The command line: what extract() finds in a file."""
    p = argparse.ArgumentParser(description="Finds the independent parts of answers.")
    p.add_argument("file", nargs="?", help=f"JSON (Lines) of {LAYOUTS}; none: the built-in corpus")
    p.add_argument("--out", metavar="OUT.jsonl", help="write the segments of every answer here")
    p.add_argument("--show", type=int, default=0, metavar="N", help="print the first N answers")
    p.add_argument("--tokenizer", default="bpe", help="bpe (learnt here), a tiktoken name, a folder")
    args = p.parse_args()

    records = read_records(args.file) if args.file else iter(corpus())
    first = list(itertools.islice(records, 2000))  # for the tokenizer to learn from
    tokenizer = make_tokenizer(args.tokenizer, (r["response"] for r in first))
    records = itertools.chain(first, records)
    metrics = defaultdict(Metrics)
    refused = Counter()
    lines = extract_all(records, tokenizer, args.show, metrics, refused)
    write_whole(args.out or os.devnull, lines)

    names = ("answers", "PPD", "ABN", "APD", "APE", "speedup", "best")
    print(f"\n{'category':<16}" + "".join(f"{name:>9}" for name in names))
    row = "{:<16}{answers:>9}{PPD:>9.1%}{ABN:>9.2f}{APD:>9.1%}{APE:>9.1%}{speedup:>9.2f}{best:>9.2f}"
    for category in sorted(metrics, key=lambda name: name == "all"):
        print(row.format(printable(category), **metrics[category].figures()))
    print("\nblocks refused:" if refused else "\nno block was refused")
    for reason, n in refused.most_common():
        print(f"{n:>8}  {reason}")


if __name__ == "__main__":
    cli(main)
