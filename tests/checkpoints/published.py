"""Small random checkpoints written exactly as DeepSeek publishes them, independently of the code under test."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dsparse import ModelConfig

LARGE = {  # wide enough for several ragged 128x128 blocks
    "hidden_size": 160, "intermediate_size": 200, "moe_intermediate_size": 136, "kv_lora_rank": 130, "q_lora_rank": 144,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "vocab_size": 128, "num_hidden_layers": 3,
}  # fmt: skip


def config_dict(family="deepseek_v3", **overrides):
    return dict(ModelConfig.tiny(family, **(LARGE | overrides)).huggingface)


def linear_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Linear weights of one layer, by published name."""
    c, heads = config, config.num_attention_heads
    shapes = {
        "self_attn.kv_a_proj_with_mqa": (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size),
        "self_attn.kv_b_proj": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "self_attn.o_proj": (c.hidden_size, heads * c.v_head_dim),
    }
    if c.q_lora_rank is None:
        shapes["self_attn.q_proj"] = (heads * c.qk_head_dim, c.hidden_size)
    else:
        shapes["self_attn.q_a_proj"] = (c.q_lora_rank, c.hidden_size)
        shapes["self_attn.q_b_proj"] = (heads * c.qk_head_dim, c.q_lora_rank)
    if layer < c.num_hidden_layers and c.mlp_layer_types[layer] == "dense":
        mlps = {"mlp": c.intermediate_size}
    else:
        mlps = {"mlp.shared_experts": c.moe_intermediate_size * c.n_shared_experts}
        mlps |= {f"mlp.experts.{e}": c.moe_intermediate_size for e in range(c.n_routed_experts)}
    for name, width in mlps.items():
        shapes[f"{name}.gate_proj"] = shapes[f"{name}.up_proj"] = (width, c.hidden_size)
        shapes[f"{name}.down_proj"] = (c.hidden_size, width)
    return shapes


def tensors(config: ModelConfig, dtype=torch.bfloat16, fp8: bool = False, mtp: int = 0, tied_mtp: bool = True):
    """Random tensors of a whole checkpoint."""
    generator, c = torch.Generator().manual_seed(0), config

    def rand(*shape):
        return torch.randn(*shape, generator=generator) * 0.05

    def norm(size):
        return (1 + rand(size)).to(dtype)

    out = {
        "model.embed_tokens.weight": rand(c.vocab_size, c.hidden_size).to(dtype),
        "model.norm.weight": norm(c.hidden_size),
    }
    if not c.tie_word_embeddings:
        out["lm_head.weight"] = rand(c.vocab_size, c.hidden_size).to(dtype)
    for layer in range(c.num_hidden_layers + mtp):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{prefix}{name}.weight"] = norm(c.hidden_size)
        out[f"{prefix}self_attn.kv_a_layernorm.weight"] = norm(c.kv_lora_rank)
        if c.q_lora_rank is not None:
            out[f"{prefix}self_attn.q_a_layernorm.weight"] = norm(c.q_lora_rank)
        shapes = linear_shapes(c, layer)
        if "mlp.experts.0.up_proj" in shapes:
            out[f"{prefix}mlp.gate.weight"] = rand(c.n_routed_experts, c.hidden_size).to(dtype)
            if c.topk_method == "noaux_tc":
                out[f"{prefix}mlp.gate.e_score_correction_bias"] = rand(c.n_routed_experts)
        for name, shape in shapes.items():
            if name.startswith("self_attn") and "_b_" not in name and c.attention_bias and name != "self_attn.q_proj":
                out[f"{prefix}{name}.bias"] = rand(shape[0]).to(dtype)
            if name.startswith("mlp") and "mlp.experts." not in name and c.mlp_bias:
                out[f"{prefix}{name}.bias"] = rand(shape[0]).to(dtype)
            if fp8:
                blocks = tuple(-(-n // 128) for n in shape)
                out[f"{prefix}{name}.weight"] = (rand(*shape) * 1000).to(torch.float8_e4m3fn)
                out[f"{prefix}{name}.weight_scale_inv"] = 1e-3 * (1 + rand(*blocks).abs() * 10)
            else:
                out[f"{prefix}{name}.weight"] = rand(*shape).to(dtype)
        if layer >= c.num_hidden_layers:
            out |= {f"{prefix}enorm.weight": norm(c.hidden_size), f"{prefix}hnorm.weight": norm(c.hidden_size)}
            out |= {f"{prefix}shared_head.norm.weight": norm(c.hidden_size)}
            out[f"{prefix}eh_proj.weight"] = rand(c.hidden_size, 2 * c.hidden_size).to(dtype)
            for copy, main in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
                value = out.get(f"{main}.weight", out["model.embed_tokens.weight"])
                out[f"{prefix}{copy}.weight"] = value.clone() if tied_mtp else rand(*value.shape).to(dtype)
    return out


def write(folder: Path, config: dict, state: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A Hugging Face folder with `state` in one or several safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: state[n] for n in names[i::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def make(
    folder: Path,
    family="deepseek_v3",
    shards: int = 1,
    dtype=torch.bfloat16,
    fp8=False,
    mtp=0,
    tied_mtp=True,
    **overrides,
) -> Path:
    """A whole checkpoint."""
    config = config_dict(family, dtype=str(dtype).removeprefix("torch."), num_nextn_predict_layers=mtp, **overrides)
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    state = tensors(ModelConfig.from_huggingface(config), dtype, fp8, mtp, tied_mtp)
    return write(folder, config, state, shards)


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor in a folder's safetensors files, read with a few lines of its own."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        blob = file.read_bytes()
        start = 8 + int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), blob[start + begin : start + end])
    return found
