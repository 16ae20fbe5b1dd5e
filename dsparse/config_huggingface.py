"""Translate a Hugging Face config.json, of today or as published, into `ModelConfig` fields.

Published configs differ from today's: `rope_scaling` beside `rope_theta`, `torch_dtype`, `topk_method` and
`scoring_func` spelled out, `model_type` kimi_k2, remote-code entries (`auto_map`) that this package never runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsparse.config import ModelConfig, RopeParameters
from dsparse.errors import DsparseError

# Each model_type with the router its family uses where the config does not spell it out, and the rope layout.
_V2 = {"scoring_func": "softmax", "topk_method": "greedy", "first_k_dense_replace": 0, "norm_topk_prob": False}
_V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 3, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _V2,
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "moonlight": _V3,
    "glm4_moe_lite": _V3 | {"first_k_dense_replace": 1},
}

_COPIED = {field.name for field in dataclasses.fields(ModelConfig)} - {
    "rope_parameters", "layer_types", "mlp_layer_types", "eos_token_id", "dtype", "huggingface",
}  # fmt: skip
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip


def model_config_fields(source: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `ModelConfig` for a parsed config.json."""
    model_type = source.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise DsparseError(f"config field model_type {model_type!r} is not supported (known: {known})")
    missing = [name for name in _REQUIRED if source.get(name) is None]
    if missing:
        raise DsparseError(f"config lacks the field{'s' * (len(missing) > 1)} {', '.join(missing)}")
    values = FAMILIES[model_type] | {key: value for key, value in source.items() if value is not None}
    if "num_mtp_layers" in source:  # transformers' newer name
        values.setdefault("num_nextn_predict_layers", source["num_mtp_layers"])
    fields = {name: _typed(name, values[name]) for name in _COPIED if name in values}
    eos = values.get("eos_token_id", ())
    return fields | {
        "rope_parameters": rope_parameters(values),
        "layer_types": tuple(values.get("layer_types") or ("full_attention",) * values["num_hidden_layers"]),
        "mlp_layer_types": mlp_layer_types(values),
        "eos_token_id": tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        "dtype": str(values.get("dtype", values.get("torch_dtype", "bfloat16"))).removeprefix("torch."),
    }


_TYPES = {field.name: field.type for field in dataclasses.fields(ModelConfig)}


def _typed(name: str, value: Any) -> Any:
    """`value`, checked against the type of ModelConfig's field; whole numbers pass as float."""
    wanted = {"int": int, "float": float, "bool": bool, "str": str}[_TYPES[name].removesuffix(" | None")]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise DsparseError(f"config field {name} must be of type {wanted.__name__}, found {value!r}")
    return value


def mlp_layer_types(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Which layers are mixtures of experts: listed outright, or by `first_k_dense_replace` and `moe_layer_freq`."""
    if listed := values.get("mlp_layer_types"):
        return tuple(listed)
    depth, first, every = values["num_hidden_layers"], values["first_k_dense_replace"], values.get("moe_layer_freq", 1)
    has_experts = bool(values.get("n_routed_experts"))
    return tuple("sparse" if has_experts and i >= first and i % every == 0 else "dense" for i in range(depth))


def rope_parameters(values: Mapping[str, Any]) -> RopeParameters:
    """`rope_parameters` of today, or the published `rope_scaling` beside `rope_theta`."""
    stated = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    stated.setdefault("rope_type", stated.pop("type", "default"))
    stated.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    if stated["rope_type"] == "yarn":
        stated.setdefault("original_max_position_embeddings", values.get("max_position_embeddings", 4096))
        if stated.get("factor") is None:
            stated["factor"] = values["max_position_embeddings"] / stated["original_max_position_embeddings"]
    fields = {field.name: float if "float" in field.type else None for field in dataclasses.fields(RopeParameters)}
    kept = {name: value for name, value in stated.items() if name in fields and value is not None}
    return RopeParameters(**{name: fields[name](value) if fields[name] else value for name, value in kept.items()})


def tiny_config(family: str) -> dict[str, Any]:
    """A small config.json of `family` that exercises its options."""
    if family not in FAMILIES:
        raise DsparseError(f"unknown family {family!r} (known: {', '.join(sorted(FAMILIES))})")
    common = {
        "model_type": family, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "max_position_embeddings": 512,
        "routed_scaling_factor": 2.5, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    if FAMILIES[family]["scoring_func"] == "softmax":
        common |= {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.0, "q_lora_rank": None, "norm_topk_prob": False}
    return common
