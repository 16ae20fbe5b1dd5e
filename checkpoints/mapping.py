"""Tensor names on disk <-> parameters of the model.

Every tensor of a published checkpoint is one contiguous slice of one of our parameters: a `Slot` names the layer, the
parameter's path inside it and the leading index. A `Layout` is a table of rules that translate both ways; another
family's names are another table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsparse.config import ModelConfig

TOP = -1  # the `layer` of tensors outside the layers


class Slot(NamedTuple):
    """Where a tensor lives: `parameter[index]` of a layer.

    layer: 0-based; multi-token prediction layers follow the main model's; TOP for tensors outside the layers.
    """

    layer: int
    path: str
    index: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a name table.

    name: template of the tensor's name inside its layer. `{}` stands for a number, `{a|b}` for one of the words; in
        order of appearance they are the leading index of the parameter at `path`.
    merged: the axis of the parameter that the tensor holds merged with the next one.
    """

    name: str
    path: str
    merged: int | None = None

    @functools.cached_property
    def choices(self) -> tuple[tuple[str, ...] | None, ...]:
        """Of each field of the template: its words, or None for a number."""
        return tuple(tuple(f.split("|")) if f else None for f in re.findall(r"\{(.*?)\}", self.name))

    @functools.cached_property
    def pattern(self) -> re.Pattern:
        parts = re.split(r"(\{.*?\})", self.name)
        return re.compile("".join(rf"({p[1:-1] or '[0-9]+'})" if p.startswith("{") else re.escape(p) for p in parts))

    def parse(self, name: str) -> tuple[int, ...] | None:
        """The index that `name` stands for, None if the rule is about other tensors."""
        if (match := self.pattern.fullmatch(name)) is None:
            return None
        fields = zip(self.choices, match.groups(), strict=True)
        return tuple(int(text) if words is None else words.index(text) for words, text in fields)

    def format(self, index: Sequence[int]) -> str:
        fields = iter([str(i) if words is None else words[i] for words, i in zip(self.choices, index, strict=True)])
        return re.sub(r"\{.*?\}", lambda _: next(fields), self.name)

    def tensor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape on disk of one tensor of a parameter of (unstacked) `shape`."""
        shape = tuple(shape[len(self.choices) :])
        if self.merged is None:
            return shape
        axis = self.merged
        return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


class Prefix(NamedTuple):
    """Template of what stands before a layer's names, its number counting from layer `first` on."""

    template: str
    first: int = 0

    def parse(self, name: str) -> tuple[int, str] | None:
        """The layer and the rest of the name."""
        before, after = self.template.split("{}")
        match = re.fullmatch(rf"{re.escape(before)}([0-9]+){re.escape(after)}(.+)", name)
        return match and (self.first + int(match[1]), match[2])

    def format(self, layer: int) -> str:
        return self.template.format(layer - self.first)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of one way to publish a model. A tensor without a rule keeps its name as its path.

    prefixes: of layers' names; a layer is written with the preferred one among those that begin closest before it.
    top, layer: rules. aside: named reasons to keep a tensor without using it, with the pattern of its full name.
    Of several spellings the preferred one comes first.
    """

    prefixes: tuple[Prefix, ...]
    top: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    aside: tuple[tuple[str, str], ...] = ()

    def parse(self, name: str) -> tuple[Slot, Rule]:
        """The slot of a full name, and the rule that says so."""
        layer, rest = next(filter(None, (prefix.parse(name) for prefix in self.prefixes)), (TOP, name))
        for rule in self.top if layer == TOP else self.layer:
            if (index := rule.parse(rest)) is not None:
                return Slot(layer, rule.path, index), rule
        return Slot(layer, rest), _identity(rest)

    def rule(self, layer: int, path: str) -> Rule:
        """The preferred rule for writing a parameter."""
        return self._by_path(layer == TOP).get(path) or _identity(path)

    def tensors(self, layer: int, path: str, shape: Sequence[int]) -> Iterator[tuple[str, Slot, tuple[int, ...]]]:
        """Names, slots and shapes on disk of all tensors of a parameter of (unstacked) `shape`."""
        rule = self.rule(layer, path)
        prefix = "" if layer == TOP else self._prefix(layer).format(layer)
        for index in itertools.product(*(range(n) for n in shape[: len(rule.choices)])):
            yield prefix + rule.format(index), Slot(layer, path, index), rule.tensor_shape(shape)

    def _prefix(self, layer: int) -> Prefix:
        return max((prefix for prefix in self.prefixes if prefix.first <= layer), key=lambda prefix: prefix.first)

    def aside_rule(self, name: str) -> str | None:
        """Why a tensor is kept but not used, None if it is used."""
        return next((reason for reason, pattern in self.aside if re.fullmatch(pattern, name)), None)

    @functools.cached_property
    def _tables(self) -> tuple[dict[str, Rule], dict[str, Rule]]:
        return tuple({rule.path: rule for rule in reversed(rules)} for rules in (self.layer, self.top))

    def _by_path(self, top: bool) -> dict[str, Rule]:
        return self._tables[top]


@functools.cache
def _identity(path: str) -> Rule:
    return Rule(path.replace("{", "").replace("}", ""), path)


def _gated(prefix: str, lead: str = "") -> tuple[Rule, ...]:
    """gate_proj and up_proj, each with what it is stored with, as rows of one parameter."""
    name, path = f"{prefix}.{lead}{{gate|up}}_proj", f"{prefix}.gate_up_proj"
    return (
        Rule(f"{name}.weight", path),
        Rule(f"{name}.weight_scale_inv", f"{path}_scale_inv"),
        Rule(f"{name}.bias", f"{prefix}.gate_up_bias"),
    )


TRANSFORMERS = Layout(
    prefixes=(Prefix("model.layers.{}."),),
    top=(Rule("model.embed_tokens.weight", "embed_tokens.weight"), Rule("model.norm.weight", "norm.weight")),
    layer=(
        *_gated("mlp"),
        *_gated("mlp.shared_experts"),
        *_gated("mlp.experts", "{}."),
        Rule("mlp.experts.{}.down_proj.weight", "mlp.experts.down_proj"),
        Rule("mlp.experts.{}.down_proj.weight_scale_inv", "mlp.experts.down_proj_scale_inv"),
        # transformers' names in memory, on disk where a checkpoint was saved without going back to the published ones
        Rule("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", merged=1),
    ),
    aside=(("rotary frequencies are computed", r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"),),
)


@functools.cache
def layout_of(config: ModelConfig, published: bool = False) -> Layout:
    """The name table of a model's checkpoints.

    published: where DeepSeek's names differ from what transformers writes, prefer DeepSeek's for writing.
    """
    if config.checkpoint_names == "transformers":
        return TRANSFORMERS
    from dsparse.checkpoints import mapping_v4

    return getattr(mapping_v4, config.checkpoint_names)(config, published)
