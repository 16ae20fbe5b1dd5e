"""Names of DeepSeek-V4 checkpoints: DeepSeek's own, what transformers saves, and mixtures of both.

DeepSeek publishes `layers.0.attn.wq_a.weight`, `embed.weight`, `hc_head_fn`, quantized weights with `.scale` beside
them, and multi-token prediction layers as `mtp.0`. transformers reads that and saves `model.layers.0.attn.wq_a.weight`,
`model.embed_tokens.weight`, `model.hc_head.hc_fn` beside `head.weight`. Its names in memory
(`model.layers.0.self_attn.q_a_proj.weight`) are our paths, so they need few rules.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsparse.checkpoints.mapping import TRANSFORMERS, Layout, Prefix, Rule
from dsparse.config import ModelConfig

# Published name -> path, for weights that are never quantized. Where a path comes twice, the first name is preferred.
_PLAIN = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.norm.weight": "self_attn.kv_norm.weight",  # transformers saves both norms of that name like this
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.{w1|w3}.bias": "mlp.shared_experts.gate_up_bias",
    "ffn.shared_experts.w2.bias": "mlp.shared_experts.down_proj.bias",
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "norm.weight": "shared_head.norm.weight",  # of a multi-token prediction layer
    "emb.tok_emb.weight": "embed_tokens.weight",
    "head.weight": "shared_head.head.weight",
    **{f"hc_{ours}_{part}": f"{ours}_hc.{part}" for ours in ("attn", "ffn") for part in ("fn", "base", "scale")},
    **{f"hc_head_{part}": f"hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}

# Published module -> path of its weight; `.weight` and `.scale` stand behind the name.
_LINEAR = {
    "attn.wq_a": "self_attn.q_a_proj.weight",
    "attn.wq_b": "self_attn.q_b_proj.weight",
    "attn.wkv": "self_attn.kv_proj.weight",
    "attn.wo_a": "self_attn.o_a_proj.weight",
    "attn.wo_b": "self_attn.o_b_proj.weight",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj.weight",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "ffn.shared_experts.{w1|w3}": "mlp.shared_experts.gate_up_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj.weight",
    "ffn.experts.{}.{w1|w3}": "mlp.experts.gate_up_proj",
    "ffn.experts.{}.w2": "mlp.experts.down_proj",
    "e_proj": "e_proj.weight",
    "h_proj": "h_proj.weight",
}


def _layer_rules() -> Iterator[Rule]:
    for name, path in _PLAIN.items():
        yield Rule(name, path)
    for name, path in _LINEAR.items():
        yield Rule(f"{name}.weight", path)
        yield Rule(f"{name}.scale", f"{path}_scale_inv")
        yield Rule(f"{name}.weight_scale_inv", f"{path}_scale_inv")


_TOP = (
    Rule("embed.weight", "embed_tokens.weight"),
    Rule("norm.weight", "norm.weight"),
    Rule("head.weight", "lm_head.weight"),
    *(Rule(f"hc_head_{part}", f"hc_head.hc_{part}") for part in ("fn", "base", "scale")),
)
_TOP_SAVED = (
    *TRANSFORMERS.top,
    *(Rule(f"model.hc_head.hc_{part}", f"hc_head.hc_{part}") for part in ("fn", "base", "scale")),
)
_SAVED_FIRST = (Rule("attn.norm.weight", "self_attn.kv_norm.weight"),)


def deepseek_v4(config: ModelConfig, published: bool) -> Layout:
    """The names of both layouts; what is written without a name of its own gets the published or the saved one."""
    mtp = config.num_hidden_layers
    prefixes = [Prefix("layers.{}."), Prefix("mtp.{}.", mtp), Prefix("model.layers.{}."), Prefix("model.mtp.{}.", mtp)]
    rules = (*_layer_rules(), *TRANSFORMERS.layer)
    if published:
        return Layout(tuple(prefixes), top=(*_TOP, *_TOP_SAVED), layer=rules, aside=TRANSFORMERS.aside)
    prefixes = [prefixes[2], prefixes[1], prefixes[0], prefixes[3]]
    top = (*_TOP_SAVED, *_TOP)
    return Layout(tuple(prefixes), top=top, layer=(*_SAVED_FIRST, *rules), aside=TRANSFORMERS.aside)
