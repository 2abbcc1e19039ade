"""What a model must choose to write a given answer, whatever its weights would have it write."""
from aspd import Block


def script(ids, tags, eos):
    """Tokenised segments -> the tokens that must be chosen, a list for the prefill and for each
    step. A branch chooses up to <|/branch|>, and takes part in one more pass, which feeds that."""
    passes = []
    for segment in ids:
        if not isinstance(segment, Block):
            passes += [[token] for token in segment]
            continue
        for title, _ in segment:
            passes += [[token] for token in [tags.title, *title, tags.title_end]]
        passes.append([tags.para])
        written = [rest + [tags.branch_end] for _, rest in segment]
        for k in range(max(map(len, written)) + 1):
            live = [tokens for tokens in written if k <= len(tokens)]
            passes.append([(tokens + [tags.branch_end])[k] for tokens in live])
    return passes + [[eos]]
