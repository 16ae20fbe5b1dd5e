"""The key ledger: every tensor of a checkpoint is used, kept aside by a named rule, or listed in one error.

`make_plan` matches the tensors on disk with the parameters their config asks for, before any weight is read.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsparse.checkpoints.mapping import TOP, Layout, Rule, Slot
from dsparse.checkpoints.tensorfiles import TensorFiles, natural, shorten
from dsparse.config import ModelConfig
from dsparse.errors import DsparseError
from dsparse.model import Model
from dsparse.origin import Origin
from dsparse.params import PACKED_FP4, QUANTIZED

logger = logging.getLogger("dsparse.checkpoints")

_NARROW = {np.dtype(wide): np.dtype(wide.replace("64", "32")) for wide in ("float64", "int64", "uint64")}
INTEGER_PARAMETER = ".tid2eid"  # the one kind of parameter that holds no floating-point numbers
SCALE = "_scale_inv"  # what DeepSeek appends to the name of an FP8 weight for its block scales


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One variable of a model, and the tensors it is made of.

    key: in the model's state. layers: of each row of a stacked variable, else the one layer. path: inside the layer.
    shape, axes: of the variable, the stack's leading axis included.
    """

    key: tuple[Any, ...]
    layers: tuple[int, ...]
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]
    stacked: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape


@dataclasses.dataclass
class Plan:
    """How a checkpoint becomes a model.

    state: abstract; graphdef: of the model. sources: for each layer and path, the tensor at each leading index.
    scales: of FP8 weights that are dequantized while read, the name of their block scales.
    """

    config: ModelConfig
    graphdef: Any
    state: nnx.State
    parameters: list[Parameter]
    sources: dict[tuple[int, str], dict[tuple[int, ...], str]]
    scales: dict[str, str]
    origin: Origin
    notes: list[str]


def model_parameters(state: nnx.State, model_runs, config: ModelConfig) -> list[Parameter]:
    """Every variable of a (possibly abstract) model state, with its layers and path."""
    found = []
    for key, variable in nnx.to_flat_state(state):
        layers, path, stacked = _locate(key, model_runs, config)
        axes = variable.get_metadata().get("axes") or (None,) * len(variable.shape)
        found.append(
            Parameter(key, layers, path, tuple(variable.shape), np.dtype(variable.dtype), tuple(axes), stacked)
        )
    return found


def _locate(key: tuple[Any, ...], runs, config: ModelConfig) -> tuple[tuple[int, ...], str, bool]:
    """Layers, path inside the layer, and whether the leading axis is the layers'."""
    match key:
        case ("stacks", stack, "blocks", position, *rest):
            run = runs[stack]
            return (
                tuple(run.start + position + r * run.pattern for r in range(run.repeats)),
                ".".join(map(str, rest)),
                True,
            )
        case ("mtp", number, "block", *rest):
            return (config.num_hidden_layers + number,), ".".join(map(str, rest)), False
        case ("mtp", number, "norm" | "head" as part, *rest):
            return (config.num_hidden_layers + number,), ".".join(["shared_head", part, *map(str, rest)]), False
        case ("mtp", number, *rest):
            return (config.num_hidden_layers + number,), ".".join(map(str, rest)), False
        case _:
            return (TOP,), ".".join(map(str, key)), False


def make_plan(
    files: TensorFiles,
    config: ModelConfig,
    layout: Layout,
    origin: Origin,
    dtype: jnp.dtype | None,
    mesh: Mesh | None = None,
) -> Plan:
    """Match tensors with parameters.

    origin: gains what must be remembered for an export. dtype: to cast to, or None to keep each tensor as stored.

    Raises:
        DsparseError: tensors are missing, unexpected or of the wrong shape; all of them are in the one message.
    """
    notes: list[str] = []
    slots, clashes = _read_names(files, layout, origin)
    config = _count_mtp_layers(config, slots, notes)
    _tie_copies(files, config, layout, slots, origin, notes)
    sources, rules = _group(slots)
    scales, unscaled = ({}, []) if dtype is None else _take_scales(files, sources)
    storage, unkept = _storage(files, config, sources, dtype, origin)
    options = {"dtype": dtype or jnp.dtype(config.dtype), "param_dtype": dtype, "storage": storage, "mesh": mesh}
    abstract = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), **options))
    graphdef, state = nnx.split(abstract)
    parameters = model_parameters(state, abstract.runs, config)
    errors = clashes + unkept + unscaled + _compare(files, layout, parameters, sources, rules, slots, origin)
    if errors:
        raise DsparseError(f"{origin.path}: the tensors do not match the config: " + "; ".join(errors))
    for note in notes:
        logger.info("%s: %s", origin.path, note)
    return Plan(config, graphdef, state, parameters, sources, scales, origin, notes)


def _read_names(files: TensorFiles, layout: Layout, origin: Origin) -> tuple[dict[str, tuple[Slot, Rule]], list[str]]:
    """The slot of every tensor that is not kept aside, and complaints about tensors that claim the same slot."""
    slots, taken, clashes = {}, {}, []
    for name in files.tensors:
        if reason := layout.aside_rule(name):
            origin.kept[name] = files.read(name)
            logger.info("%s is kept aside: %s", name, reason)
            continue
        slot, rule = layout.parse(name)
        if slot in taken:
            clashes.append(f"{taken[slot]} and {name} are the same tensor")
        taken[slot] = name
        slots[name] = (slot, rule)
    return slots, clashes


def _count_mtp_layers(config: ModelConfig, slots: Mapping[str, tuple[Slot, Rule]], notes: list[str]) -> ModelConfig:
    """The file decides how many multi-token prediction layers the model has; published configs may promise more."""
    layers, found = {slot.layer for slot, _ in slots.values()}, 0
    while config.num_hidden_layers + found in layers:
        found += 1
    stated = config.num_nextn_predict_layers
    if found == stated:
        return config
    if found == 0:
        notes.append(f"config promises {stated} multi-token prediction layer{'s' * (stated > 1)}, the files hold none")
    else:
        notes.append(
            f"the files hold {found} layers past num_hidden_layers, config says {stated} for multi-token prediction"
        )
    return dataclasses.replace(config, num_nextn_predict_layers=found)


def _tie_copies(
    files: TensorFiles,
    config: ModelConfig,
    layout: Layout,
    slots: dict[str, tuple[Slot, Rule]],
    origin: Origin,
    notes: list[str],
) -> None:
    """Copies of the embedding and head, equal byte for byte, are tied: not loaded, and written again on export.

    They are found in multi-token prediction layers and beside `tie_word_embeddings`. Copies that differ stay slots.
    """
    names = {slot: name for name, (slot, _) in slots.items()}
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    pairs = [("lm_head", "embed_tokens", TOP)] if config.tie_word_embeddings else []
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        pairs += [("embed_tokens", "embed_tokens", layer), ("shared_head.head", head, layer)]
    for copy, original, layer in pairs:
        for suffix in (".weight", f".weight{SCALE}"):
            name, main = names.get(Slot(layer, copy + suffix)), names.get(Slot(TOP, original + suffix))
            if name and main and same_bytes(files, name, main):
                origin.tied[name] = Slot(TOP, original + suffix)
                del slots[name]
                notes.append(f"{name} equals {main}: tied")


def same_bytes(files: TensorFiles, a: str, b: str) -> bool:
    """Whether two tensors are equal bit for bit, compared a few MiB at a time."""
    first, second = files.tensors[a], files.tensors[b]
    if (first.dtype, first.shape) != (second.dtype, second.shape) or not first.shape:
        return False
    rows = max(1, (8 << 20) // max(1, first.nbytes // max(1, first.shape[0])))
    for start in range(0, first.shape[0], rows):
        index = (slice(start, min(start + rows, first.shape[0])), *(slice(0, n) for n in first.shape[1:]))
        pieces = [np.empty((index[0].stop - start, *first.shape[1:]), first.dtype) for _ in range(2)]
        for name, piece in zip((a, b), pieces, strict=True):
            files.read_into(name, index, piece)
        if not np.array_equal(*(piece.view(np.uint8) for piece in pieces)):
            return False
    return True


def _group(slots: Mapping[str, tuple[Slot, Rule]]):
    """Tensors by layer and path, and the rule that named them."""
    sources: dict[tuple[int, str], dict[tuple[int, ...], str]] = {}
    rules: dict[tuple[int, str], Rule] = {}
    for name, (slot, rule) in slots.items():
        sources.setdefault((slot.layer, slot.path), {})[slot.index] = name
        rules[slot.layer, slot.path] = rule
    return sources, rules


def _take_scales(files: TensorFiles, sources) -> tuple[dict[str, str], list[str]]:
    """Remove the block scales of quantized weights from the sources: they are applied while the weights are read.

    Also complaints about weights without scales.
    """
    scales, unscaled = {}, []
    for (layer, path), weights in list(sources.items()):
        found = sources.get((layer, path + SCALE), {})
        quantized = {index: name for index, name in weights.items() if files.tensors[name].dtype in QUANTIZED}
        scales |= {name: found.pop(index) for index, name in quantized.items() if index in found}
        unscaled += [name + SCALE for name in quantized.values() if name not in scales]
        if not found:
            sources.pop((layer, path + SCALE), None)
    return scales, [shorten(sorted(unscaled, key=natural), "missing tensor")] if unscaled else []


def _storage(
    files: TensorFiles, config: ModelConfig, sources, dtype: jnp.dtype | None, origin: Origin
) -> tuple[list[dict[str, jnp.dtype]], list[str]]:
    """Stored dtypes for `Model`, and complaints about parameters that cannot be kept as stored."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    storage: list[dict[str, jnp.dtype]] = [{} for _ in range(layers + 1)]
    complaints = []
    for (layer, path), tensors in sources.items():
        if layer >= layers:
            continue  # reported as unexpected
        first = {files.tensors[name].dtype: name for name in sorted(tensors.values(), key=natural, reverse=True)}
        if wrong := {dtype: wanted for dtype in first if (wanted := _wrong_kind(path, dtype)) is not None}:
            complaints += [
                f"{first[dtype]} is {dtype} where the model needs {wanted}" for dtype, wanted in wrong.items()
            ]
            continue
        stored = sorted(first, key=str)
        held = jnp.dtype(_NARROW.get(stored[0], stored[0]))  # JAX has 32 bits unless asked for more
        if jnp.issubdtype(stored[0], jnp.integer) and stored[0] != PACKED_FP4:
            if held != stored[0]:
                origin.dtypes[layer, path] = stored[0].name
        elif dtype is not None:
            if layer < config.num_hidden_layers or not path.startswith(("embed_tokens.", "shared_head.head.")):
                continue  # the model's dtype decides
            held = jnp.dtype(dtype)  # the layer has an embedding or head of its own
        elif held != stored[0]:
            complaints.append(f"{first[stored[0]]} is {stored[0]}, more than JAX keeps: load with a dtype")
        elif len(stored) > 1:
            names = ", ".join(f"{dtype} {name}" for dtype, name in first.items())
            complaints.append(f"one parameter is stored in different dtypes ({names}): load with a dtype")
        storage[layer][path] = held
    return storage, complaints


def _wrong_kind(path: str, stored: np.dtype) -> str | None:
    """What kind of numbers a parameter needs, if it is stored as another; packed FP4 looks like integers."""
    if path.endswith(INTEGER_PARAMETER):
        return None if jnp.issubdtype(stored, jnp.integer) else "integers"
    return None if jnp.issubdtype(stored, jnp.floating) or stored == PACKED_FP4 else "floating point"


def _compare(files, layout, parameters, sources, rules, slots, origin) -> list[str]:
    """Complaints about missing, unexpected and wrongly shaped tensors; fills in the origin's unusual names."""
    missing, misshapen, used = [], [], set()
    for parameter in parameters:
        for layer in parameter.layers:
            for name, slot, shape in _expected(layout, sources, rules, layer, parameter):
                actual = sources.get((layer, parameter.path), {}).get(slot.index)
                if actual is None:
                    missing.append(name)
                    continue
                used.add(actual)
                if actual != name:
                    origin.names[slot] = actual
                info = files.tensors[actual]
                if info.dtype == PACKED_FP4 and parameter.dtype != PACKED_FP4:  # unpacked while it is read
                    if info.shape != (*shape[:-1], shape[-1] // 2):
                        wanted = f"where the config asks for {list(shape)} in 4 bits"
                        misshapen.append(f"{actual} is {list(info.shape)} {wanted}")
                    continue
                if info.shape != shape:
                    misshapen.append(f"{actual} is {list(info.shape)} where the config asks for {list(shape)}")
                else:  # a tensor that holds axes merged is read as the parameter is shaped
                    files.tensors[actual] = dataclasses.replace(info, shape=parameter.layer_shape[len(slot.index) :])
    taken = {name for tensors in sources.values() for name in tensors.values()}
    unexpected = sorted((name for name in slots if name in taken and name not in used), key=natural)
    return _report(sorted(missing, key=natural), unexpected, misshapen)


def _expected(
    layout: Layout, sources, rules, layer: int, parameter: Parameter
) -> Iterator[tuple[str, Slot, tuple[int, ...]]]:
    """Names, slots and shapes a parameter's tensors should have, in the spelling found in the files."""
    found = sources.get((layer, parameter.path), {})
    if () in found and layout.rule(layer, parameter.path).choices:  # the whole parameter in one tensor
        shape = rules[layer, parameter.path].tensor_shape(parameter.layer_shape)
        yield layout.rule(layer, parameter.path).name, Slot(layer, parameter.path), shape
    else:
        yield from layout.tensors(layer, parameter.path, parameter.layer_shape)


def _report(missing: list[str], unexpected: list[str], misshapen: list[str]) -> list[str]:
    errors = []
    if missing:
        errors.append(shorten(missing, "missing tensor"))
    if unexpected:
        errors.append(
            shorten(
                [_suggest(name, missing) if i < 3 else name for i, name in enumerate(unexpected)], "unexpected tensor"
            )
        )
    if misshapen:
        errors.append(shorten(misshapen, "wrong shape"))
    return errors


def _suggest(name: str, missing: list[str]) -> str:
    close = difflib.get_close_matches(name, missing[:2000], n=1, cutoff=0.8)
    return f"{name}: renamed from {close[0]}?" if close else name
