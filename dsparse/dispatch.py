"""Choosing among an op's implementations: the best that serves the arguments here, or the one that was asked for.

An implementation is a function with its op's signature that raises NotImplementedError, with the reason, for what it
cannot serve.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence

import jax
from jaxtyping import Array

from dsparse import sharding

logger = logging.getLogger("dsparse.ops")
served: dict[tuple[str, str], str] = {}  # (op, implementation) -> why not a better one, where nobody asked for one

Axes = Sequence[str | None]  # logical axis names, as in `sharding.RULES`

_preferred = jax.make_user_context(default_value=None)  # part of what jit's caches go by


@contextlib.contextmanager
def prefer(implementation: str) -> Iterator[None]:
    """Every op that has an implementation of this name takes it, or raises what speaks against it."""
    with _preferred(implementation):
        yield


def call(op: str, implementation: str | None, choices: dict[str, Callable], *args, **kwargs):
    """Call the named (or else the preferred) implementation, or the first of `choices` that does not refuse.

    Raises:
        NotImplementedError: there is no implementation of that name, or it refuses.
    """
    if implementation is None and _preferred.value in choices:
        implementation = _preferred.value
    if implementation is not None and implementation not in choices:
        raise NotImplementedError(f"{op} has no implementation {implementation!r} (known: {', '.join(choices)})")
    names = [implementation] if implementation else list(choices)
    reasons = []
    for name in names:
        try:
            result = choices[name](*args, **kwargs)
        except NotImplementedError as refusal:
            if name == names[-1]:
                raise
            reasons.append(f"{name}: {refusal}")
            continue
        if implementation is None and (op, name) not in served:
            served[op, name] = "; ".join(reasons)
            logger.info("%s is served by %s%s", op, name, f" ({'; '.join(reasons)})" if reasons else "")
        return result
    raise AssertionError("unreachable")


def summary() -> str:
    """Which implementation served each op so far, in one line; of reasons why not a better one, each once."""
    reasons = dict.fromkeys(reason for reason in served.values() if reason)
    ops = ", ".join(f"{op} {name}" for op, name in served)
    return f"{ops} ({'; '.join(reasons)})" if reasons else ops


def kernel(module: str, name: str) -> Callable:
    """A function of `dsparse.kernels`, imported when it is called; refuses where there is no GPU."""

    def run(*args, **kwargs):
        if jax.default_backend() != "gpu":
            raise NotImplementedError(f"needs a GPU, found {jax.default_backend()}")
        try:
            found = getattr(importlib.import_module(f"dsparse.kernels.{module}"), name)
        except (ImportError, AttributeError) as error:
            raise NotImplementedError(f"kernel {module}.{name} is not there ({error})") from error
        return found(*args, **kwargs)

    return run


def on_each_device(run: Callable, inputs: Sequence[Axes], outputs: Sequence[Axes] | Axes, *args: Array | None):
    """run(*args) on every device's share of the arrays: XLA cannot split a kernel over a mesh by itself.

    inputs, outputs: the axis names of every argument (None for an argument that is None) and result; an axis
    is split as `sharding.RULES` say. `run` must need no other device's part of any split axis. Without a mesh, just
    run(*args).
    """
    mesh = sharding.current_mesh()
    if mesh is None or mesh.size == 1:
        return run(*args)
    sizes = {}
    for axes, array in zip(inputs, args, strict=True):
        if array is not None:
            sizes |= {name: size for name, size in zip(axes, array.shape, strict=True) if name}

    def spec(axes: Axes) -> jax.sharding.PartitionSpec:
        return sharding.partition_spec(axes, [sizes.get(name, 1) for name in axes], mesh)

    def alone(*args):
        with sharding.use_mesh(None):
            return run(*args)

    several = not isinstance(outputs[0], str | None)
    out_specs = tuple(map(spec, outputs)) if several else spec(outputs)
    in_specs = tuple(spec(axes) for axes in inputs)
    return jax.shard_map(alone, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)
