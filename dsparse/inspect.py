"""What a checkpoint is made of: layers, parameters, cache and attention costs, and the tokens its layers select."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from dsparse.blocks import MIXERS
from dsparse.config import LayerSpec, ModelConfig
from dsparse.errors import DsparseError
from dsparse.model import Model
from dsparse.params import PACKED_FP4

LENGTHS = (1024, 8192, 32768, 131072)
CACHE_SPAN = 1 << 16  # tokens over which the cost of one more cached token is measured


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers of one kind. kind: mixer and MLP. parameters: of all of them. cache_bytes: a token and layer.

    attention_flops: of one layer for one token at each of the report's lengths, a multiply-add counting two.
    """

    kind: str
    layers: tuple[int, ...]
    parameters: int
    cache_bytes: float
    attention_flops: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What one layer attends to, for each query of the text.

    indices: sorted positions of tokens, or numbers of entries where the layer compresses: entry e is made of the
        `compress_rate` tokens from e * compress_rate on. window: of newest tokens that are seen besides; 0: none.
    shared_from: the layer that selected, where this one shares.
    """

    layer: int
    indices: list[list[int]]
    window: int = 0
    compress_rate: int = 0
    shared_from: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """Parameters count each weight once; active ones are those a token passes through (the head, but no
    embedding or table)."""

    path: str
    model_type: str
    parameters: int
    active_parameters: int
    mtp_parameters: int
    stored_bytes: int
    cache_bytes_per_token: float
    lengths: tuple[int, ...]
    kinds: tuple[Layers, ...]
    tokens: list[str] = dataclasses.field(default_factory=list)
    selections: list[Selection] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*_summary(self), "", *_layer_table(self), *_selection_table(self)])


def inspect_checkpoint(
    path: str | Path, text: str | None = None, lengths: Sequence[int] = LENGTHS, heat_map: str | Path | None = None
) -> Report:
    """Describe the checkpoint in `path`; its weights are read only for `text`.

    text: show which of its tokens (or compressed entries) each layer selects for each of them. heat_map: draw that
        into this PNG file.

    Raises:
        DsparseError: the checkpoint does not fit its config, or a heat map is asked for without text or selections.
    """
    from dsparse.checkpoints.plan import make_plan
    from dsparse.checkpoints.sources import open_checkpoint

    source = open_checkpoint(Path(path))
    with source.files as files:
        plan = make_plan(files, source.config, source.layout, source.origin, None, None)
    report = describe(nnx.merge(plan.graphdef, plan.state), tuple(lengths), str(path))
    if text is not None:
        report = _with_selections(report, Path(path), text)
    if heat_map is not None:
        draw_selections(report, Path(heat_map))
    return report


def describe(model: Model, lengths: tuple[int, ...] = LENGTHS, path: str = "") -> Report:
    """The report of a model, which may be abstract."""
    config, sizes = model.config, list(_parameters(model))
    kinds: dict[LayerSpec, list[int]] = {}
    for number, spec in enumerate(config.layers):
        kinds.setdefault(spec, []).append(number)
    described = tuple(
        Layers(
            _kind(spec),
            tuple(layers),
            sum(size for size, layer, _, _ in sizes if layer in layers),
            cache_bytes(config, spec, model.dtype),
            tuple(attention_flops(config, spec, length) for length in lengths),
        )
        for spec, layers in kinds.items()
    )
    return Report(
        path=path,
        model_type=config.model_type,
        parameters=sum(size for size, layer, _, _ in sizes if layer != "mtp"),
        active_parameters=round(sum(size * share for size, layer, share, _ in sizes if layer != "mtp")),
        mtp_parameters=sum(size for size, layer, _, _ in sizes if layer == "mtp"),
        stored_bytes=sum(nbytes for *_, nbytes in sizes),
        cache_bytes_per_token=sum(kind.cache_bytes * len(kind.layers) for kind in described),
        lengths=lengths,
        kinds=described,
    )


def _parameters(model: Model) -> Iterator[tuple[int, int | str, float, int]]:
    """(weights, layer, share of them a token passes through, bytes) of each parameter.

    Block scales are no weights; a byte of packed FP4 is two.
    """
    config = model.config
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape, itemsize = variable.shape, variable.dtype.itemsize
        weights = 0 if str(path[-1]).endswith("_scale_inv") else 2 if variable.dtype == PACKED_FP4 else 1
        share = config.num_experts_per_tok / config.n_routed_experts if "experts" in path else 1.0
        if path[-1] == "tid2eid" or (path[0] == "embed_tokens" and not config.tie_word_embeddings):
            share = 0.0  # a token reads one row
        if path[0] != "stacks":
            size = math.prod(shape)
            yield weights * size, "mtp" if path[0] == "mtp" else "top", share, size * itemsize
            continue
        run, size = model.runs[path[1]], math.prod(shape[1:])
        for repeat in range(run.repeats):
            yield weights * size, run.start + repeat * run.pattern + path[3], share, size * itemsize


def _kind(spec: LayerSpec) -> str:
    parts = [spec.mixer]
    if spec.indexer:
        parts.append(f"{spec.indexer} indexer")
    if spec.index_topk:
        parts.append(f"top-{spec.index_topk}")
    if spec.compress_rate:
        parts.append(f"1/{spec.compress_rate}")
    return ", ".join(parts) + {"dense": " + MLP", "sparse": " + MoE", "hash_moe": " + hash MoE"}[spec.mlp]


def cache_bytes(config: ModelConfig, spec: LayerSpec, dtype) -> float:
    """Bytes by which a layer's cache grows with one more token."""

    def size(slots: int) -> int:
        cache = jax.eval_shape(lambda: MIXERS[spec.mixer].init_cache(config, spec, 1, 1, slots, dtype))
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))

    return (size(2 * CACHE_SPAN) - size(CACHE_SPAN)) / CACHE_SPAN


def attention_flops(config: ModelConfig, spec: LayerSpec, length: int) -> int:
    """Operations of scores and values for the token at position `length` - 1, indexer included, projections not.

    Latent attention is counted as it decodes: in latent space.
    """
    c, heads = config, config.num_attention_heads
    if spec.mixer in ("full_attention", "indexed_attention"):
        key, value = c.kv_lora_rank + c.qk_rope_head_dim, c.kv_lora_rank
        attended = length if spec.index_topk is None else min(length, spec.index_topk)
        scored = length if spec.indexer == "full" and length > spec.index_topk else 0
    else:
        key = value = c.head_dim
        entries = length // spec.compress_rate if spec.compress_rate else 0
        scored = entries if spec.indexer == "full" and entries > spec.index_topk else 0
        chosen = entries if spec.index_topk is None else min(entries, spec.index_topk)
        attended = min(length, c.sliding_window) + chosen
    return 2 * heads * (key + value) * attended + 2 * c.index_n_heads * (c.index_head_dim + 1) * scored


# ---- selections -----------------------------------------------------------------------------------------------------


def _with_selections(report: Report, path: Path, text: str) -> Report:
    from dsparse.pretrained import from_pretrained
    from dsparse.tokenizer import Tokenizer

    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(text)
    if not ids:
        raise DsparseError("the text is empty: give at least one token")
    model = from_pretrained(path)
    model.dtype = jnp.dtype(jnp.float32)  # lower precision would exchange tokens of close scores
    selected = [None if s is None else np.asarray(s[0]) for s in model.selections(np.asarray([ids], np.int32))]
    found = list(layer_selections(model.config, selected, len(ids)))
    return dataclasses.replace(report, tokens=[tokenizer.decode([i]) for i in ids], selections=found)


def layer_selections(
    config: ModelConfig, selected: Sequence[Int[np.ndarray, "T K"] | None], length: int
) -> Iterator[Selection]:
    """What each layer attends to that does not simply see every token. selected: `Model.selections` of one text."""
    full: dict[str, int] = {}
    for layer, spec in enumerate(config.layers):
        if spec.indexer == "full":
            full[spec.mixer] = layer
        source = full.get(spec.mixer, layer)
        indices, rate = selected[source], spec.compress_rate
        window = 0 if spec.mixer in ("full_attention", "indexed_attention") else config.sliding_window
        if indices is not None:
            rows = [sorted(int(i) for i in row if i >= 0) for row in indices]
        elif window:  # no entry, or all of them
            rows = [list(range((query + 1) // rate)) if rate else [] for query in range(length)]
        else:
            continue
        yield Selection(layer, rows, window, rate, source if source != layer else None)


def draw_selections(report: Report, file: Path) -> None:
    """One panel a layer: queries downwards, the tokens they attend to to the right, those of entries lighter."""
    if not report.selections:
        raise DsparseError("nothing to draw: no layer selects among so few tokens (give a text longer than index_topk)")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DsparseError("heat maps need matplotlib: pip install 'dsparse[plots]'") from error
    columns = min(3, len(report.selections))
    rows = -(-len(report.selections) // columns)
    figure = Figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, selection in zip(panels, report.selections, strict=False):
        panel.imshow(attended(selection), cmap="Blues", interpolation="nearest", vmin=0, vmax=1)
        panel.set_title(_title(selection))
        panel.set_xlabel("token")
        panel.set_ylabel("query")
    for panel in panels[len(report.selections) :]:
        panel.axis("off")
    figure.savefig(file, dpi=100)


def attended(selection: Selection) -> Float[np.ndarray, "T T"]:
    """1 where a query attends to a token itself, 0.5 where it attends to an entry made of it."""
    length, rate = len(selection.indices), selection.compress_rate
    shades = np.zeros((length, length))
    for query, row in enumerate(selection.indices):
        if rate:
            shades[query, [token for e in row for token in range(e * rate, (e + 1) * rate)]] = 0.5
        else:
            shades[query, row] = 1.0
        shades[query, max(0, query + 1 - selection.window) : query + 1 if selection.window else 0] = 1.0
    return shades


# ---- text -----------------------------------------------------------------------------------------------------------


def _number(value: float | int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:g}"


def _spans(numbers: Sequence[int]) -> str:
    """0-3,5 for [0, 1, 2, 3, 5]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _summary(report: Report) -> list[str]:
    share = 100 * report.active_parameters / report.parameters
    active = f"{_number(report.active_parameters)} ({share:.1f}%)"
    lines = [
        f"{report.path or 'model'}: {report.model_type}, {sum(len(kind.layers) for kind in report.kinds)} layers",
        f"parameters: {_number(report.parameters)}, active per token: {active}",
        f"stored: {_number(report.stored_bytes)} bytes",
        f"cache: {report.cache_bytes_per_token:g} bytes per token in all layers",
    ]
    if report.mtp_parameters:
        lines.insert(2, f"multi-token prediction: {_number(report.mtp_parameters)} parameters more")
    return lines


def _layer_table(report: Report) -> list[str]:
    header = ["kind", "layers", "parameters", "cache B/token", *(f"attention FLOPs at {n}" for n in report.lengths)]
    rows = [
        [
            kind.kind, f"{len(kind.layers)} ({_spans(kind.layers)})", _number(kind.parameters), f"{kind.cache_bytes:g}",
            *(_number(flops) for flops in kind.attention_flops),
        ]
        for kind in report.kinds
    ]  # fmt: skip
    totals = [sum(k.attention_flops[i] * len(k.layers) for k in report.kinds) for i in range(len(report.lengths))]
    layers = sum(len(kind.layers) for kind in report.kinds)
    parameters = _number(sum(kind.parameters for kind in report.kinds))
    rows.append(
        ["all", str(layers), parameters, f"{report.cache_bytes_per_token:g}", *(_number(total) for total in totals)]
    )
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


SHOWN = 12  # tokens or entries the table names for a layer


def _title(selection: Selection) -> str:
    parts = [f"window of {selection.window}"] if selection.window else []
    if selection.compress_rate:
        parts.append(f"entries of {selection.compress_rate}")
    if selection.shared_from is not None:
        parts.append(f"as layer {selection.shared_from}")
    return f"layer {selection.layer}" + (f" ({', '.join(parts)})" if parts else "")


def _selection_table(report: Report) -> list[str]:
    if not report.tokens:
        return []
    if not report.selections:
        return ["", f"no layer selects among {len(report.tokens)} tokens: every top-k covers them"]
    count = len(report.tokens)
    lines = [
        "",
        f"selected by the last of {count} tokens, nearest first (most often selected: by how many of {count} queries)",
    ]
    for selection in report.selections:
        last, rate = selection.indices[-1][::-1], selection.compress_rate
        if selection.window and len(last) == (count // rate if rate else 0):
            lines.append(_title(selection) + (f": all {len(last)} entries" if rate else ""))
            continue
        named = " ".join(_named(report.tokens, selection, i) for i in last[:SHOWN])
        more = f" and {len(last) - SHOWN} more" if len(last) > SHOWN else ""
        counts = np.bincount([i for row in selection.indices for i in row])
        lines.append(f"{_title(selection)}: {named}{more} ({counts.argmax()}: {counts.max()})")
    return lines


def _named(tokens: Sequence[str], selection: Selection, index: int) -> str:
    """A token, or the tokens of an entry."""
    first, size = index * (selection.compress_rate or 1), selection.compress_rate or 1
    return f"{index}:{''.join(tokens[first : first + size])!r}"
