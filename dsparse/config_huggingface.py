"""Translate a Hugging Face config.json, of today or as published, into `ModelConfig` fields.

Published configs differ from today's: `rope_scaling` beside `rope_theta`, `torch_dtype`, `topk_method` and
`scoring_func` spelled out, `model_type` kimi_k2, remote-code entries (`auto_map`) that this package never runs, and
DeepSeek-V4's `compress_ratios` and `num_hash_layers` instead of lists of layer types.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dsparse.config import ModelConfig, RopeParameters
from dsparse.errors import DsparseError
from dsparse.params import FP8_BLOCK

# Each model_type with what its family uses where the config does not spell it out.
_V2 = {"scoring_func": "softmax", "topk_method": "greedy", "first_k_dense_replace": 0, "norm_topk_prob": False}
_V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 3, "norm_topk_prob": True}
_INDEXED = {"mixer": "indexed_attention", "index_topk": 2048, "index_head_dim": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _V2,
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "moonlight": _V3,
    "glm4_moe_lite": _V3 | {"first_k_dense_replace": 1},
    "deepseek_v32": _V3 | _INDEXED | {"index_n_heads": 64},
    "glm_moe_dsa": _V3 | _INDEXED | {"index_n_heads": 32, "rms_norm_eps": 1e-5},
    "deepseek_v4": {
        "checkpoint_names": "deepseek_v4", "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "compress_rope_theta": 160000.0, "num_hash_layers": 3, "partial_rotary_factor": 64 / 512,
    },
}  # fmt: skip
# What a family does whatever its config says, in transformers and in the published code.
_V3_FIXED = {"mlp_bias": False}
FIXED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"rope_interleave": True},
    "deepseek_v3": _V3_FIXED,
    "kimi_k2": _V3_FIXED,
    "moonlight": _V3_FIXED,
    "glm4_moe_lite": _V3_FIXED,
    "deepseek_v32": _V3_FIXED | {"rope_interleave": True, "indexer_rope_interleave": False},
    "glm_moe_dsa": _V3_FIXED | {"rope_interleave": True, "indexer_rope_interleave": True},
    "deepseek_v4": {"norm_topk_prob": True, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
}
LEGACY_LAYER_TYPES = {"attention": "full_attention", "deepseek_sparse_attention": "indexed_attention"}

_COPIED = {field.name for field in dataclasses.fields(ModelConfig)} - {
    "rope_parameters", "layer_types", "mlp_layer_types", "eos_token_id", "dtype", "huggingface", "compress_rates",
    "compress_rope_parameters", "index_topk", "indexer_types",
}  # fmt: skip
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED_LATENT = ("intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_REQUIRED_COMPRESSED = (
    "head_dim", "q_lora_rank", "sliding_window", "o_groups", "o_lora_rank", "moe_intermediate_size", "n_routed_experts",
    "num_experts_per_tok", "index_n_heads", "index_head_dim", "index_topk",
)  # fmt: skip


def model_config_fields(source: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `ModelConfig` for a parsed config.json."""
    model_type = source.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise DsparseError(f"config field model_type {model_type!r} is not supported (known: {known})")
    _check_kinds(source)
    source = _with_one_name(source)
    compressed = "compress_rates" in FAMILIES[model_type]
    required = (*_REQUIRED, *(_REQUIRED_COMPRESSED if compressed else _REQUIRED_LATENT))
    missing = [name for name in required if source.get(name) is None]
    if missing:
        raise DsparseError(f"config lacks the field{'s' * (len(missing) > 1)} {', '.join(missing)}")
    values = FAMILIES[model_type] | source | FIXED[model_type]
    block = (source.get("quantization_config") or {}).get("weight_block_size")
    if block is not None and list(block) != [FP8_BLOCK, FP8_BLOCK]:
        raise DsparseError(
            f"config field quantization_config.weight_block_size {block!r} is not supported (only "
            f"{[FP8_BLOCK, FP8_BLOCK]}): convert the checkpoint to bfloat16 with the tool that quantized it"
        )
    if compressed:
        values |= compressed_attention_fields(values, source)
    fields = {name: _typed(name, values[name]) for name in _COPIED if name in values}
    eos = values.get("eos_token_id", ())
    return fields | {
        "rope_parameters": rope_parameters(values),
        "compress_rope_parameters": rope_parameters(values["compress_rope"]) if compressed else None,
        "compress_rates": tuple(sorted(values.get("compress_rates", {}).items())),
        "layer_types": layer_types(values),
        "mlp_layer_types": mlp_layer_types(values),
        "index_topk": tuple(topk) if isinstance(topk := values.get("index_topk", 0), list | tuple) else topk,
        "indexer_types": indexer_types(values),
        "eos_token_id": tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        "dtype": str(values.get("dtype", values.get("torch_dtype", "bfloat16"))).removeprefix("torch."),
    }


# Other names that transformers reads (its configs' `attribute_map`).
ALIASES = {
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}


def _with_one_name(source: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say something, aliases replaced; where both are there, an alias has no say."""
    said = {name: value for name, value in source.items() if value is not None}
    aliased = {ALIASES[name]: value for name, value in said.items() if name in ALIASES}
    return aliased | {name: value for name, value in said.items() if name not in ALIASES}


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is int for item in value)


# What entries that are translated, not copied, must be: in words, the test, and the names.
_KINDS = (
    ("a whole number", lambda value: type(value) is int, (
        "head_dim", "index_topk_freq", "index_skip_topk_offset", "compress_rate_csa", "compress_rate_hca")),
    ("a whole number from 0 on", lambda value: type(value) is int and value >= 0, (
        "first_k_dense_replace", "num_hash_layers", "n_shared_experts", "num_nextn_predict_layers", "num_mtp_layers")),
    ("a positive whole number", lambda value: type(value) is int and value > 0, (
        "num_hidden_layers", "moe_layer_freq", "original_max_position_embeddings", "q_lora_rank")),
    ("a positive number", lambda value: _is_number(value) and value > 0, (
        "rope_theta", "compress_rope_theta", "partial_rotary_factor", "factor", "beta_fast", "beta_slow",
        "attention_factor", "rms_norm_eps")),
    ("a number", _is_number, ("mscale", "mscale_all_dim")),
    ("true or false", lambda value: type(value) is bool, ("truncate",)),
    ("text", lambda value: isinstance(value, str), ("rope_type", "type")),
    ("an object", lambda value: isinstance(value, Mapping), (
        "compress_rates", "quantization_config", "rope_parameters", "rope_scaling", "main", "compress")),
    ("a list of names", _is_names, ("layer_types", "mlp_layer_types", "indexer_types")),
    ("text or a list of names", lambda value: isinstance(value, str) or _is_names(value), ("index_topk_pattern",)),
    ("a list of whole numbers", _is_counts, ("compress_ratios", "weight_block_size")),
    ("a whole number or a list of them", lambda value: type(value) is int or _is_counts(value), (
        "eos_token_id", "index_topk")),
)  # fmt: skip
_KIND_OF = {name: (words, test) for words, test, names in _KINDS for name in names}


def _check_kinds(source: Mapping[str, Any], path: str = "") -> None:
    """Raise DsparseError for the first entry, nested ones included, that is not of its kind."""
    for name, value in source.items():
        words, test = _KIND_OF.get(name, ("", None))
        if test is None or value is None:
            continue
        if not test(value):
            raise DsparseError(f"config field {path}{name} must be {words}, found {value!r}")
        if isinstance(value, Mapping) and name != "compress_rates":
            _check_kinds(value, f"{path}{name}.")


_TYPES = {field.name: field.type for field in dataclasses.fields(ModelConfig)}


def _typed(name: str, value: Any) -> Any:
    """`value`, checked against the type of ModelConfig's field; whole numbers pass as float."""
    wanted = {"int": int, "float": float, "bool": bool, "str": str}[_TYPES[name].removesuffix(" | None")]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise DsparseError(f"config field {name} must be of type {wanted.__name__}, found {value!r}")
    return value


def layer_types(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Which mixer each layer has: listed outright, by today's or an older name, or the family's own everywhere."""
    listed = values.get("layer_types") or (values.get("mixer", "full_attention"),) * values["num_hidden_layers"]
    return tuple(LEGACY_LAYER_TYPES.get(kind, kind) for kind in listed)


def indexer_types(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Which layers run an indexer and which share the last one's selection (GLM-5, transformers' GlmMoeDsaConfig).

    Stated in one of three ways: `indexer_types` outright; `index_topk_pattern`, "F" or "S" a layer or a list; or every
    `index_topk_freq`-th layer, counted from `index_skip_topk_offset` - 1.
    """
    if listed := values.get("indexer_types"):
        return tuple(listed)
    if pattern := values.get("index_topk_pattern"):
        letters = {"F": "full", "S": "shared"}
        return tuple(letters.get(kind, kind) for kind in pattern)
    every, offset = max(values.get("index_topk_freq", 1), 1), values.get("index_skip_topk_offset", 2)
    return tuple(
        "full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(values["num_hidden_layers"])
    )


def mlp_layer_types(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Which layers are mixtures of experts: listed outright, or by `first_k_dense_replace` and `moe_layer_freq`."""
    if listed := values.get("mlp_layer_types"):
        return tuple("sparse" if kind == "moe" else kind for kind in listed)
    depth, first, every = values["num_hidden_layers"], values["first_k_dense_replace"], values.get("moe_layer_freq", 1)
    has_experts = bool(values.get("n_routed_experts"))
    return tuple("sparse" if has_experts and i >= first and i % every == 0 else "dense" for i in range(depth))


_COMPRESS_RATIOS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def compressed_attention_fields(values: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSeek-V4's layers, compression rates and both rotary embeddings, from today's or the published spelling."""
    depth, head_dim = values["num_hidden_layers"], values["head_dim"]
    rates = dict(values["compress_rates"])
    for kind, short in (("compressed_sparse_attention", "csa"), ("heavily_compressed_attention", "hca")):
        rates[kind] = values.get(f"compress_rate_{short}", rates.get(kind))
    kinds = values.get("layer_types") or _layer_types_by_ratio(values.get("compress_ratios"))
    if not kinds:  # two heavily compressed layers, then alternating
        kinds = [
            "compressed_sparse_attention" if i >= 2 and i % 2 else "heavily_compressed_attention" for i in range(depth)
        ]
    hashed = values["num_hash_layers"]
    mlp = values.get("mlp_layer_types") or ["hash_moe" if i < hashed else "moe" for i in range(depth)]
    ropes = _two_ropes(values)
    factor = ropes["rope_parameters"].get("partial_rotary_factor") or source.get("partial_rotary_factor")
    if factor is None and source.get("qk_rope_head_dim"):
        rotary = source["qk_rope_head_dim"]
    else:
        rotary = int(head_dim * (factor or values["partial_rotary_factor"]))
    return {
        "compress_rates": rates, "layer_types": list(kinds)[:depth], "mlp_layer_types": list(mlp)[:depth],
        "qk_rope_head_dim": rotary, **ropes,
    }  # fmt: skip


def _layer_types_by_ratio(ratios: list[int] | None) -> list[str]:
    unknown = sorted({ratio for ratio in ratios or () if ratio not in _COMPRESS_RATIOS})
    if unknown:
        raise DsparseError(
            f"config field compress_ratios: {unknown[0]!r} is none of 0 (window only), 4 and 128; use layer_types"
        )
    return [_COMPRESS_RATIOS[ratio] for ratio in ratios or ()]


def _two_ropes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain rotary embedding for layers of a window alone, its own base and scaling for the layers that compress."""
    stated = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    limit = {"max_position_embeddings": values.get("max_position_embeddings", 4096)}
    if isinstance(stated.get("main"), Mapping) and isinstance(stated.get("compress"), Mapping):
        main, compress = stated["main"], stated["compress"]
    else:
        main = {"rope_type": "default", "rope_theta": values.get("rope_theta", 10000.0)}
        compress = {k: v for k, v in stated.items() if k not in ("main", "compress")}
        compress |= {"rope_theta": values["compress_rope_theta"]}
        compress.setdefault("rope_type", compress.pop("type", "default"))
        if compress["rope_type"] == "yarn":
            compress.setdefault("attention_factor", 1.0)  # cos and sin are not scaled
    return {"rope_parameters": main, "compress_rope": limit | {"rope_parameters": compress}}


def rope_parameters(values: Mapping[str, Any]) -> RopeParameters:
    """`rope_parameters` of today, or the published `rope_scaling` beside `rope_theta`."""
    stated = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    stated.setdefault("rope_type", stated.pop("type", "default"))
    stated.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    if stated["rope_type"] == "yarn":
        limit = values.get("max_position_embeddings", 4096)
        stated.setdefault("original_max_position_embeddings", limit)
        if stated.get("factor") is None:
            stated["factor"] = limit / stated["original_max_position_embeddings"]
    fields = {field.name: float if "float" in field.type else None for field in dataclasses.fields(RopeParameters)}
    kept = {name: value for name, value in stated.items() if name in fields and value is not None}
    return RopeParameters(**{name: fields[name](value) if fields[name] else value for name, value in kept.items()})


def tiny_config(family: str) -> dict[str, Any]:
    """A small config.json of `family` that exercises its options."""
    if family not in FAMILIES:
        raise DsparseError(f"unknown family {family!r} (known: {', '.join(sorted(FAMILIES))})")
    if "compress_rates" in FAMILIES[family]:
        return _tiny_compressed(family)
    common = {
        "model_type": family, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "max_position_embeddings": 512,
        "routed_scaling_factor": 2.5, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    if "mixer" in FAMILIES[family]:
        common |= {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
    if FAMILIES[family]["scoring_func"] == "softmax":
        common |= {
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.0,
            "q_lora_rank": None,
            "norm_topk_prob": False,
        }
    return common


def _tiny_compressed(family: str) -> dict[str, Any]:
    return {
        "model_type": family, "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 32, "qk_rope_head_dim": 8, "partial_rotary_factor": 0.25, "q_lora_rank": 48,
        "o_groups": 2, "o_lora_rank": 24, "sliding_window": 8, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4,
        "layer_types": [
            "sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention",
            "heavily_compressed_attention", "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe", "moe"], "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "hc_mult": 2, "hc_sinkhorn_iters": 6, "swiglu_limit": 2.0,
        "max_position_embeddings": 512, "num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 1,
        "dtype": "float32", "compress_rope_theta": 160000.0,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            "compress": {
                "rope_type": "yarn", "rope_theta": 160000.0, "factor": 4.0, "original_max_position_embeddings": 128,
                "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0, "partial_rotary_factor": 0.25,
            },
        },
    }  # fmt: skip
