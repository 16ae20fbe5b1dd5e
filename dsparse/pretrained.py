"""Loading and saving models: Hugging Face folders and dsparse's own checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from dsparse.errors import DsparseError
from dsparse.model import Model
from dsparse.sharding import make_mesh

FORMATS = ("huggingface", "dsparse")
NAMES = ("stored", "transformers", "published")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def parse_dtype(dtype) -> jnp.dtype | None:
    """A weight dtype from its name ("bfloat16") or a JAX or NumPy dtype; None stays None."""
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise DsparseError(
            f"dtype {name!r} is not supported (known: {', '.join(DTYPES)}; leave it out to keep weights as stored)"
        )
    return jnp.dtype(DTYPES[name])


def parse_size(size: int | str) -> int:
    """Bytes from a number or a string such as "5GB" or "512MiB"."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B\s*", size, re.IGNORECASE)
    if match is None:
        raise DsparseError(f"max_shard_size {size!r}: expected a size such as '5GB' or '512MiB'")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def from_pretrained(
    path: str | Path,
    dtype: str | jnp.dtype | None = None,
    mesh: Mesh | str | None = None,
    quantization: str | None = None,
    *,
    allow_pickle: bool = False,
) -> Model:
    """Load a model from a Hugging Face folder or a dsparse checkpoint.

    dtype: to cast the weights to and compute in. None keeps every tensor as stored (FP8 weights stay FP8 and are
        scaled inside the products) and computes in the config's dtype.
    mesh: devices to shard over, such as "data=2,tensor=4"; each device's slices are read straight into its arrays.
    allow_pickle: read legacy `.bin` files, which are Python pickles.

    Raises:
        DsparseError: the folder, a file or a tensor is missing, damaged or does not fit the config.
    """
    from dsparse.checkpoints.loading import load_model
    from dsparse.checkpoints.plan import make_plan
    from dsparse.checkpoints.sources import open_checkpoint

    if quantization is not None:
        raise DsparseError(f"quantization {quantization!r} is not supported")
    dtype, mesh = parse_dtype(dtype), make_mesh(mesh)
    source = open_checkpoint(Path(path), allow_pickle=allow_pickle)
    with source.files as files:
        plan = make_plan(files, source.config, source.layout, source.origin, dtype, mesh)
        return load_model(files, plan, mesh)


def save_pretrained(
    model: Model,
    path: str | Path,
    format: str = "huggingface",
    *,
    max_shard_size: int | str = "5GB",
    force: bool = False,
    names: str = "stored",
) -> None:
    """Write a model: "huggingface" is what transformers' AutoModelForCausalLM loads, "dsparse" an Orbax checkpoint.

    Tensors are written in the dtypes the model holds, under the names they came with, beside config.json with all its
    original entries and the tokenizer's files. The folder appears when it is complete.
    names: "stored" (those it came with), "transformers" (those it would write) or "published" (DeepSeek's own), where a
        family has several.

    Raises:
        DsparseError: the folder exists (unless `force`), or the disk is too small.
    """
    from dsparse.checkpoints import saving

    if format not in FORMATS:
        raise DsparseError(f"format {format!r} is not supported (known: {', '.join(FORMATS)})")
    if names not in NAMES:
        raise DsparseError(f"names {names!r} is not supported (known: {', '.join(NAMES)})")
    if format == "dsparse":
        saving.save_native(model, Path(path), force)
    else:
        saving.save_huggingface(model, Path(path), parse_size(max_shard_size), force, names)
