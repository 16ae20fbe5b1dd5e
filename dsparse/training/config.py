"""Every option of a training run: one frozen dataclass, from which the command line and the config file follow."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dsparse.errors import DsparseError


def option(help: str, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. Steps are optimizer updates; a row is `sequence_length` tokens of packed documents."""

    model: str = option("folder of the checkpoint to fine-tune (Hugging Face or dsparse format)")
    data: tuple[str, ...] = option(
        "files: .txt or .md text; .jsonl with text, messages, or prompt and completion in each line; "
        ".npy with one dimension of token ids, documents ended by the end-of-sequence token"
    )
    output_dir: str = option("where saved states, metrics and the config go", "runs/train")
    export_dir: str | None = option("write the fine-tuned model here at the end, in Hugging Face format", None)
    resume: bool = option("go on from the last state saved in output_dir", False)
    # Batches
    steps: int = option("optimizer updates in total, those before a resume included", 100)
    batch_size: int = option("rows in one update", 8)
    sequence_length: int = option("tokens in a row", 512)
    gradient_accumulation: int = option(
        "parts one update's rows are computed in, one after the other, to save memory", 1
    )
    seed: int = option("order of the data", 0)
    # Optimizer: AdamW (Loshchilov and Hutter 2019)
    learning_rate: float = option("highest learning rate", 1e-4)
    schedule: Literal["cosine", "linear", "constant"] = option(
        "how the learning rate falls after the warm-up", "cosine"
    )
    warmup_steps: int = option("updates over which the learning rate rises", 0)
    final_learning_rate: float = option("learning rate at the last update, as a fraction of the highest", 0.1)
    adam_beta1: float = option("decay of the mean of gradients", 0.9)
    adam_beta2: float = option("decay of the mean of squared gradients", 0.95)
    adam_epsilon: float = option("added to the root of the squared gradients", 1e-8)
    weight_decay: float = option("decoupled weight decay of matrices (norms and biases are not decayed)", 0.1)
    max_grad_norm: float = option("gradients of a larger global norm are scaled down to it; 0: never", 1.0)
    # Losses beside the cross-entropy
    router_bias_update_rate: float = option(
        "step of the routers' bias towards underused experts, outside the gradient (arXiv:2408.15664); 0: fixed",
        1e-3,
    )
    balance_loss_weight: float = option("weight of the sequence-wise balance loss (DeepSeek-V3, equation 17)", 0.0)
    mtp_loss_weight: float = option("weight of the multi-token prediction loss; 0: those layers stay as they are", 0.0)
    # Precision, memory, devices
    dtype: Literal["float32", "bfloat16"] = option(
        "of activations and products; weights are kept in float32", "float32"
    )
    remat: Literal["none", "selective", "full"] = option(
        "what the backward pass computes again of each layer instead of keeping it: nothing, what costs less than its "
        "memory, or all",
        "selective",
    )
    mesh: str | None = option("devices to spread over, such as data=2,tensor=4 (axes data, fsdp, expert, tensor)", None)
    # Saving and reporting
    save_every: int = option("updates between saved states; 0: only at the end and when stopped", 100)
    keep_last: int = option("saved states to keep", 2)
    log_every: int = option("updates between reports", 1)
    tensorboard: bool = option("write TensorBoard events to output_dir/tensorboard", True)

    def __post_init__(self):
        validate(self)


_AT_LEAST_ONE = ("steps", "batch_size", "sequence_length", "gradient_accumulation", "keep_last", "log_every")
_NOT_NEGATIVE = (
    "seed", "warmup_steps", "save_every", "learning_rate", "final_learning_rate", "adam_beta1", "adam_beta2",
    "adam_epsilon", "weight_decay", "max_grad_norm", "router_bias_update_rate", "balance_loss_weight",
    "mtp_loss_weight",
)  # fmt: skip


def validate(config: TrainConfig) -> None:
    """Raise DsparseError naming the first option with an impossible value."""
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for name in names:
            if not getattr(config, name) >= least:
                raise DsparseError(f"training option {name} must be at least {least}, found {getattr(config, name)!r}")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(config, name) >= 1:
            raise DsparseError(f"training option {name} must be below 1, found {getattr(config, name)!r}")
    if config.batch_size % config.gradient_accumulation:
        raise DsparseError(
            f"training option gradient_accumulation ({config.gradient_accumulation}) does not divide "
            f"batch_size ({config.batch_size})"
        )
    if config.warmup_steps > config.steps:
        raise DsparseError(f"training option warmup_steps ({config.warmup_steps}) exceeds steps ({config.steps})")
    if not config.data:
        raise DsparseError("training option data names no file")


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config of a command line; what it leaves out comes from its `--config` file, then from the defaults.

    Raises:
        DsparseError: the file is unreadable or has an unknown key, or a value is impossible.
    """
    stated = vars(_parser().parse_args(argv))
    file = stated.pop("config", None)
    values = (read_config(Path(file)) if file else {}) | stated
    missing = [
        f.name for f in dataclasses.fields(TrainConfig) if f.default is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise DsparseError(
            f"training option {missing[0]} is missing: give {_flag(missing[0])} or set it in a --config file"
        )
    return TrainConfig(**values)


def read_config(file: Path) -> dict[str, Any]:
    """Options set in a TOML file, whose keys are the fields of `TrainConfig`."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DsparseError(f"{file}: cannot be read as TOML ({error})") from error
    kinds = typing.get_type_hints(TrainConfig)
    for name, value in values.items():
        if name not in kinds:
            raise DsparseError(f"{file}: unknown key {name!r} (known: {', '.join(kinds)})")
        if isinstance(value, list):
            values[name] = value = tuple(value)
        if kinds[name] is float and type(value) is int:
            values[name] = value = float(value)
        if not _is(value, kinds[name]):
            raise DsparseError(f"{file}: {name}: expected {_describe(kinds[name])}, found {value!r}")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", description="Fine-tune a checkpoint.", argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of these options (dashes written as underscores)")
    kinds = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind, described = kinds[field.name], field.metadata["help"].replace("%", "%%")
        if field.default is not dataclasses.MISSING and field.default is not None:
            described += (
                f" (default {str(field.default).lower() if isinstance(field.default, bool) else field.default})"
            )
        parser.add_argument(_flag(field.name), help=described, **_argument(kind))
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _argument(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of type `kind`."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": "FILE", "action": _TupleAction}
    if isinstance(kind, types.UnionType):
        return {"metavar": "TEXT"}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


class _TupleAction(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    return type(value) is kind


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of file names"
    if isinstance(kind, types.UnionType):
        return _describe(typing.get_args(kind)[0])
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
