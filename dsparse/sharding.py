"""From logical axis names to devices: one table for parameters, caches and activations.

Parameters, caches and activations name their dimensions ("embed", "heads", ...); `RULES` says which mesh axes each
name is split over. A mesh axis that does not divide the dimension is left out, so small models run on any mesh.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsparse.errors import DsparseError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations and caches
    "batch": ("data", "fsdp", "expert"),
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "latent": (),
}

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("dsparse_mesh", default=None)


def make_mesh(description: str | Mesh | None) -> Mesh | None:
    """A device mesh from a description such as "data=2,tensor=4" (axes: data, fsdp, expert, tensor).

    Raises:
        DsparseError: unknown axis, or the sizes need more devices than there are.
    """
    if description is None or isinstance(description, Mesh):
        return description
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in description.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise DsparseError(
                f"mesh {description!r}: expected axis=size with axes {', '.join(MESH_AXES)}, found {part!r}"
            )
        sizes[name] = int(size)
    needed, devices = math.prod(sizes.values()), jax.devices()
    if needed > len(devices):
        raise DsparseError(f"mesh {description!r} needs {needed} devices, {len(devices)} {devices[0].platform} found")
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices[:needed])


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The `PartitionSpec` of an array whose dimensions carry the logical names `axes` (None: not split)."""
    entries, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        for mesh_axis in RULES[name] if name else ():
            ways = math.prod(mesh.shape[a] for a in chosen) * mesh.shape.get(mesh_axis, 1)
            if mesh.shape.get(mesh_axis, 1) > 1 and mesh_axis not in used and size % ways == 0:
                chosen.append(mesh_axis)
        used.update(chosen)
        entries.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    return PartitionSpec(*entries)


def named_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def batch_ways(mesh: Mesh | None) -> int:
    """Parts a batch is split into over the mesh."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Make `mesh` the one that `constrain` and the sharded ops refer to while a computation is traced."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def current_mesh() -> Mesh | None:
    return _mesh.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask for the sharding that `axes` stand for; without a mesh, `x` as it is."""
    mesh = _mesh.get()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, named_sharding(axes, x.shape, mesh))
