# ---- published folders ------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SUPPORTED = {  # settings that change the result, and the values that are implemented (None: not set)
    "model_type": ("llama", "qwen2"), "auto_map": (None,), "hidden_act": ("silu",),
    "attention_bias": (None, False), "mlp_bias": (None, False), "num_local_experts": (None,),
    "use_sliding_window": (None, False), "quantization_config": (None,),
    # how rotary positions are scaled, by its older and its newer name; and for one kind of layer
    "type": (None, "default"), "rope_type": (None, "default"), "full_attention": (None,),
    "partial_rotary_factor": (None, 1.0),
}


def from_published(path):
    """The model of a published Llama or Qwen2 folder. ValueError, by name, for whatever would change
    the result and is not implemented, and for tensors that are missing, unknown or misshapen."""
    where = Path(path, "config.json")
    settings = read_json(where)
    with naming(where), torch.device("meta"):
        model = GPT(published_config(settings))
    # rotary_emb.inv_freq: in old files. lm_head: a copy of the embedding, where they are tied.
    unused = ("rotary_emb.inv_freq", "lm_head.weight") if model.config.tied else "rotary_emb.inv_freq"
    weights = {name: w for name, w in read_weights(path).items() if not name.endswith(unused)}
    load_weights(model, weights, path)
    return model


def published_config(settings):
    """The contents of a config.json -> GPTConfig. Over the years rotary positions have moved in it."""
    c = {}
    for place in (settings, settings.get("rope_scaling"), settings.get("rope_parameters")):
        c |= {name: value for name, value in (place or {}).items() if value is not None}
        for name, values in SUPPORTED.items():
            check(c.get(name) in values, f"{name} = {c.get(name)!r} is not supported")
    layers = set(c.get("layer_types", []))
    check(layers <= {"full_attention"}, f"layer_types = {layers} is not supported")
    n_head = c["num_attention_heads"]
    n_embd = c["hidden_size"]
    return GPTConfig(
        block_size=int(c["max_position_embeddings"]), vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"], n_head=n_head, n_kv_head=c.get("num_key_value_heads", n_head),
        n_embd=n_embd, n_inner=c["intermediate_size"], head_size=c.get("head_dim", n_embd // n_head),
        rope_theta=float(c.get("rope_theta", 10000)), norm_eps=float(c["rms_norm_eps"]),
        qkv_bias=c["model_type"] == "qwen2", tied=c.get("tie_word_embeddings", False),
    )


def read_weights(path):
    """{name: tensor} of a folder's *.safetensors, or of those that its index names, if it has one."""
    index = Path(path, "model.safetensors.index.json")
    files = sorted(Path(path).glob("*.safetensors"))
    if index.exists():
        with naming(index):
            files = [Path(path, name) for name in {*read_json(index)["weight_map"].values()}]
    check(files, f"{path}: no *.safetensors in it")
    weights = {}
    found_in = {}
    for file in files:
        for name, tensor in read_safetensors(file).items():
            check(name not in weights, f"{file}: the tensor {name} is in {found_in.get(name)} too")
            weights[name] = tensor
            found_in[name] = file
    return weights


def read_safetensors(path):
    """{name: tensor} of a file: 8 bytes header length, a JSON header, raw tensors. They are mapped, not
    read, and changes stay in memory. ValueError naming the tensor whose entry does not fit the file."""
    data = map_file(path)
    tensors = {}
    with naming(f"{path}: header"):
        start = 8 + int.from_bytes(data[:8], "little")
        check(start <= len(data), f"ends at byte {start} of {len(data)}")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
    for name, entry in header.items():
        with naming(f"{path}: tensor {name} = {entry}"):
            dtype = DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            n = math.prod(entry["shape"])
            check(0 <= begin <= end == begin + n * dtype.itemsize, "bytes and shape differ")
            raw = torch.frombuffer(data, dtype=dtype, count=n, offset=start + begin)
            tensors[name] = raw.view(entry["shape"])
    return tensors


def load_weights(model, weights, where):
    """Gives a model its weights, {name: tensor}. ValueError naming the first few that do not fit."""
    with naming(where):
        model.load_state_dict(weights, assign=True)


def read_json(path):
    """A JSON file -> object. ValueError naming it where it is missing or not JSON."""
    data = map_file(path)
    with naming(path):
        return json.loads(data[:])


def map_file(path):
    """A file's bytes, mapped. ValueError where it is missing, empty, or only a Git LFS pointer to it."""
    with naming(path), open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pointer = data[:23] == b"version https://git-lfs"
    check(not pointer, f"{path} is a Git LFS pointer: run `git lfs pull` in its folder")
    return data
