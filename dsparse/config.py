"""Model configuration: one frozen dataclass for every family, in Hugging Face's field names.

`ModelConfig.from_huggingface` accepts today's spelling and the published ones (`config_huggingface.py` translates
them). Everything family-specific is decided here, once: the rest of the code reads `config.layers`, a tuple of
`LayerSpec`, and never asks for the name of a family.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsparse.errors import DsparseError


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding of one kind of layer (Hugging Face `rope_parameters`).

    rope_type: "default", "linear" or "yarn" (Peng et al. 2023, arXiv:2309.00071).
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0


WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")
SELECTING_MIXERS = ("indexed_attention", "compressed_sparse_attention")  # select tokens or entries, index_topk of them
MIXER_KINDS = (
    "full_attention", "indexed_attention", "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer is made of. Layers with equal specs can be stacked and scanned together.

    mixer: a key of `dsparse.blocks.MIXERS` ("full_attention": dense MLA; "indexed_attention": MLA over selected tokens).
    mlp: "dense", "sparse" for a mixture of experts, or "hash_moe" for one that is routed by token id.
    compress_rate: tokens that share one compressed entry; 0 where the mixer compresses nothing.
    index_topk: how many tokens or entries the layer attends to, where it selects; a shared layer's is its full layer's.
    indexer: of layers that select: "full" selects itself, "shared" takes what the last full layer of the same mixer before
        it selected.
    """

    mixer: str
    mlp: str
    compress_rate: int = 0
    index_topk: int | None = None
    indexer: str | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model. Field names and meanings are Hugging Face's.

    `huggingface` keeps the config.json this came from, so that an export writes back every entry, understood or not.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    qk_rope_head_dim: int
    intermediate_size: int = 0
    # Latent attention
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0
    q_lora_rank: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    layer_types: tuple[str, ...] = ()
    mlp_layer_types: tuple[str, ...] = ()
    # Sliding window with compressed entries: heads of one size, one key-value head that is both key and value
    head_dim: int = 0
    sliding_window: int = 0
    compress_rates: tuple[tuple[str, int], ...] = ()  # kind of layer -> tokens a compressed entry
    compress_rope_parameters: RopeParameters | None = None  # of the layers that compress
    o_groups: int = 1
    o_lora_rank: int = 0
    # Hyper-connections (hc_mult 0: the plain residual sum)
    hc_mult: int = 0
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    swiglu_limit: float | None = None
    # Mixture of experts (n_routed_experts 0: none)
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # Lightning indexer (DeepSeek-V3.2). index_topk may list one number a layer; indexer_types is "full" or "shared" a layer
    index_topk: int | tuple[int, ...] = 0
    index_n_heads: int = 0
    index_head_dim: int = 0
    indexer_types: tuple[str, ...] = ()
    indexer_rope_interleave: bool = False
    # Multi-token prediction
    num_nextn_predict_layers: int = 0
    # Tokens and storage
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "bfloat16"
    checkpoint_names: str = "transformers"  # name table of its checkpoints (`dsparse.checkpoints.mapping`)
    huggingface: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        validate(self)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Specs of the main model's layers, first to last."""
        rates, full_topk, specs = dict(self.compress_rates), {}, []
        for i, (mixer, mlp) in enumerate(zip(self.layer_types, self.mlp_layer_types, strict=True)):
            indexer = None
            if mixer in SELECTING_MIXERS:
                indexer = self.indexer_types[i]
                if indexer == "full":
                    full_topk[mixer] = self.index_topk[i] if isinstance(self.index_topk, tuple) else self.index_topk
            specs.append(LayerSpec(mixer, mlp, rates.get(mixer, 0), full_topk.get(mixer), indexer))
        return tuple(specs)

    @property
    def mtp_layers(self) -> tuple[LayerSpec, ...]:
        """Specs of the multi-token prediction layers: each is built like the last layer of the main model.

        As DeepSeek-V4 publishes them, layers that compress are replaced by their sliding window alone, and none routes by
        token id. An indexed layer selects for itself: no layer before it has seen its input.
        """
        last = self.layers[-1]
        if last.mlp == "hash_moe":
            last = dataclasses.replace(last, mlp="sparse")
        if last.compress_rate:
            last = LayerSpec("sliding_attention", last.mlp)
        elif last.indexer:
            last = dataclasses.replace(last, indexer="full")
        return (last,) * self.num_nextn_predict_layers

    @classmethod
    def from_huggingface(cls, source: Mapping[str, Any] | str | Path) -> ModelConfig:
        """Read a Hugging Face config: the parsed dict, a config.json, or the folder that holds one.

        Raises:
            DsparseError: the file is missing or not JSON, the model_type is unknown, or fields contradict each other.
        """
        from dsparse.config_huggingface import model_config_fields

        if isinstance(source, Mapping):
            return cls(**model_config_fields(source), huggingface=dict(source))
        file = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        parsed = read_config_file(file)
        try:
            return cls.from_huggingface(parsed)
        except DsparseError as error:
            raise DsparseError(f"{file}: {error}") from error

    @classmethod
    def tiny(cls, family: str = "deepseek_v3", **overrides: Any) -> ModelConfig:
        """A config of a few hundred thousand parameters for tests and experiments, in Hugging Face spelling."""
        from dsparse.config_huggingface import tiny_config

        return cls.from_huggingface(tiny_config(family) | overrides)


def read_config_file(file: Path) -> dict[str, Any]:
    """The entries of a config.json."""
    if not file.is_file():
        raise DsparseError(f"{file}: not found; expected a model folder with a config.json")
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DsparseError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise DsparseError(f"{file}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "qk_rope_head_dim", "max_position_embeddings",
)  # fmt: skip
_POSITIVE_FOR = {  # fields that a kind of mixer or mlp needs
    "full_attention": ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"),
    "sliding_attention": ("q_lora_rank", "head_dim", "sliding_window", "o_groups", "o_lora_rank"),
    "indexed_attention": ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim"),
    "compressed_sparse_attention": ("index_n_heads", "index_head_dim"),
    "dense": ("intermediate_size",),
}
_WINDOWED = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")


def validate(config: ModelConfig) -> None:
    """Raise DsparseError naming the first field that contradicts another."""
    kinds = {*config.layer_types, *config.mlp_layer_types}
    if kinds & set(_WINDOWED):
        kinds.add("sliding_attention")
    for name in (*_POSITIVE, *(name for kind in sorted(kinds) for name in _POSITIVE_FOR.get(kind, ()))):
        value = getattr(config, name)
        if not isinstance(value, int) or value <= 0:
            raise DsparseError(f"config field {name} must be a positive integer, found {value!r}")
    if config.dtype not in WEIGHT_DTYPES:
        raise DsparseError(f"config field dtype {config.dtype!r} is not supported ({', '.join(WEIGHT_DTYPES)})")
    if config.hidden_act != "silu":
        raise DsparseError(f"config field hidden_act: only 'silu' is supported, found {config.hidden_act!r}")
    if config.qk_rope_head_dim % 2:
        raise DsparseError(f"config field qk_rope_head_dim must be even, found {config.qk_rope_head_dim}")
    for name in ("layer_types", "mlp_layer_types"):
        count = len(getattr(config, name))
        if count != config.num_hidden_layers:
            raise DsparseError(
                f"config field {name} lists {count} layers, num_hidden_layers is {config.num_hidden_layers}"
            )
    _validate_layer_types(config)
    if any(kind != "dense" for kind in config.mlp_layer_types):
        _validate_experts(config)
    if set(config.layer_types) & set(_WINDOWED):
        _validate_windowed(config)
    for rope in filter(None, (config.rope_parameters, config.compress_rope_parameters)):
        if rope.rope_type not in ("default", "linear", "yarn"):
            raise DsparseError(
                f"config field rope_parameters.rope_type {rope.rope_type!r} is not supported (default, linear, yarn)"
            )
        if rope.rope_type != "default" and not rope.factor:
            raise DsparseError(f"config field rope_parameters.factor is required for rope_type {rope.rope_type!r}")


def _validate_windowed(config: ModelConfig) -> None:
    if config.qk_rope_head_dim > config.head_dim:
        raise DsparseError(
            f"config field qk_rope_head_dim ({config.qk_rope_head_dim}) exceeds head_dim ({config.head_dim})"
        )
    if config.num_attention_heads % config.o_groups:
        raise DsparseError(
            f"config field o_groups ({config.o_groups}) does not divide num_attention_heads ({config.num_attention_heads})"
        )
    rates = dict(config.compress_rates)
    for kind in _WINDOWED[1:]:
        if kind in config.layer_types and not (isinstance(rates.get(kind), int) and rates[kind] > 0):
            raise DsparseError(
                f"config field compress_rates.{kind} must be a positive integer, found {rates.get(kind)!r}"
            )


def _validate_layer_types(config: ModelConfig) -> None:
    for kinds, name, known in (
        (config.layer_types, "layer_types", MIXER_KINDS),
        (config.mlp_layer_types, "mlp_layer_types", ("dense", "sparse", "hash_moe")),
    ):
        if unknown := sorted(set(kinds) - set(known)):
            raise DsparseError(f"config field {name}: {unknown[0]!r} is not supported ({', '.join(known)})")
    if selecting := [i for i, kind in enumerate(config.layer_types) if kind in SELECTING_MIXERS]:
        _validate_topk(config, selecting)
        _validate_indexer(config, selecting)


def _validate_topk(config: ModelConfig, selecting: list[int]) -> None:
    topk, depth = config.index_topk, config.num_hidden_layers
    if isinstance(topk, tuple) and len(topk) != depth:
        raise DsparseError(f"config field index_topk lists {len(topk)} layers, num_hidden_layers is {depth}")
    for value in [topk[i] for i in selecting] if isinstance(topk, tuple) else [topk]:
        if not isinstance(value, int) or value <= 0:
            raise DsparseError(f"config field index_topk must be a positive integer, found {value!r}")


def _validate_indexer(config: ModelConfig, selecting: list[int]) -> None:
    if config.index_head_dim < config.qk_rope_head_dim:
        raise DsparseError(
            f"config field index_head_dim ({config.index_head_dim}) is smaller than qk_rope_head_dim ({config.qk_rope_head_dim})"
        )
    kinds, depth = config.indexer_types, config.num_hidden_layers
    if len(kinds) != depth:
        raise DsparseError(f"config field indexer_types lists {len(kinds)} layers, num_hidden_layers is {depth}")
    if unknown := sorted(set(kinds) - {"full", "shared"}):
        raise DsparseError(f"config field indexer_types: {unknown[0]!r} is not supported (full, shared)")
    for mixer in SELECTING_MIXERS:
        first = next((i for i in selecting if config.layer_types[i] == mixer), None)
        if first is not None and kinds[first] != "full":
            raise DsparseError(
                f"config field indexer_types: layer {first} is shared, but no full layer comes before it ({mixer})"
            )


def _validate_experts(config: ModelConfig) -> None:
    for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
        value = getattr(config, name)
        if not isinstance(value, int) or value <= 0:
            raise DsparseError(
                f"config field {name} must be a positive integer in a mixture of experts, found {value!r}"
            )
    if config.n_routed_experts % config.n_group:
        raise DsparseError(
            f"config field n_group ({config.n_group}) does not divide n_routed_experts ({config.n_routed_experts})"
        )
    if config.topk_group > config.n_group:
        raise DsparseError(f"config field topk_group ({config.topk_group}) exceeds n_group ({config.n_group})")
    eligible = config.n_routed_experts // config.n_group * config.topk_group
    if config.num_experts_per_tok > eligible:
        raise DsparseError(
            f"config field num_experts_per_tok ({config.num_experts_per_tok}) exceeds the {eligible} experts that "
            f"topk_group ({config.topk_group}) of n_group ({config.n_group}) groups leave"
        )
    if config.scoring_func not in ("softmax", "sigmoid", "sqrtsoftplus"):
        raise DsparseError(
            f"config field scoring_func {config.scoring_func!r} is not supported (softmax, sigmoid, sqrtsoftplus)"
        )
    if config.topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"):
        raise DsparseError(
            f"config field topk_method {config.topk_method!r} is not supported (greedy, group_limited_greedy, noaux_tc)"
        )
    if config.topk_method == "noaux_tc" and config.n_group > 1 and config.n_routed_experts // config.n_group < 2:
        raise DsparseError(
            f"config field n_group ({config.n_group}) leaves fewer than 2 experts a group, which noaux_tc scores by"
        )
