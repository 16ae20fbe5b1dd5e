"""From a plan to a model: each device's shard of each array is filled from the slices of the files it holds."""

from __future__ import annotations

import concurrent.futures
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from dsparse.checkpoints.plan import Parameter, Plan
from dsparse.checkpoints.precision import read_as
from dsparse.checkpoints.tensorfiles import TensorFiles, natural, shorten
from dsparse.model import Model
from dsparse.sharding import named_sharding

logger = logging.getLogger("dsparse.checkpoints")

STAGING_BYTES = 256 << 20  # host memory for what is on its way to an accelerator
MAP_BYTES = 1 << 20  # arrays from this size on are mapped on their own, so that freeing them gives the memory back
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
THREADS = min(8, 2 * (os.cpu_count() or 1))

Box = tuple[slice, ...]  # a slice with a start and a stop for each dimension


class Read(NamedTuple):
    """Copy `tensor[index]` into `out`."""

    name: str
    index: Box
    out: np.ndarray


def load_model(
    files: TensorFiles, plan: Plan, mesh: Mesh | None, progress: Callable[[int], None] = lambda done: None
) -> Model:
    """Read every parameter of the plan into device arrays; `progress` is told the bytes of each finished read."""
    flat = dict(nnx.to_flat_state(plan.state))
    on_host = (mesh.devices.flat[0] if mesh is not None else jax.devices()[0]).platform == "cpu"
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        reader = Reader(files, plan, pool, progress)
        if on_host:
            arrays = _load_on_host(reader, plan, mesh)
        else:
            arrays = {p.key: _load_on_accelerator(reader, p, _sharding(p, mesh)) for p in plan.parameters}
    for key, array in arrays.items():
        flat[key] = flat[key].replace(array)
    warn_nonfinite(files)
    model = nnx.merge(plan.graphdef, nnx.from_flat_state(flat))
    model.origin = plan.origin
    return model


def warn_nonfinite(files: TensorFiles) -> None:
    if files.nonfinite:
        logger.warning("%s", shorten(sorted(files.nonfinite, key=natural), "tensor") + " with NaN or infinite values")


def _sharding(parameter: Parameter, mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return named_sharding(parameter.axes, parameter.shape, mesh)


class Reader:
    """Runs reads in the order they lie in the files, on several threads."""

    def __init__(
        self, files: TensorFiles, plan: Plan, pool: concurrent.futures.Executor, progress: Callable[[int], None]
    ):
        self.files, self.plan, self.pool, self.progress = files, plan, pool, progress

    def run(self, reads: list[Read]) -> None:
        def place(read: Read):
            info = self.files.tensors[read.name]
            return str(info.file), info.offset

        def one(read: Read) -> int:
            self.read_now([read])
            return read.out.nbytes

        for done in self.pool.map(one, sorted(reads, key=place)):
            self.progress(done)

    def read_now(self, reads: Iterable[Read]) -> None:
        """On the calling thread."""
        for read in reads:
            read_as(self.files, read.name, self.plan.scales.get(read.name), read.index, read.out)

    def reads(self, parameter: Parameter, box: Box, out: np.ndarray) -> Iterator[Read]:
        """What fills `out` with `variable[box]`."""
        if not parameter.stacked:
            yield from self.layer_reads(parameter.layers[0], parameter.path, box, out)
            return
        for row in range(box[0].start, box[0].stop):
            yield from self.layer_reads(parameter.layers[row], parameter.path, box[1:], out[row - box[0].start])

    def layer_reads(self, layer: int, path: str, box: Box, out: np.ndarray) -> Iterator[Read]:
        """What fills `out` with `parameter[box]` of one layer."""
        for index, name in self.plan.sources[layer, path].items():
            if all(s.start <= i < s.stop for i, s in zip(index, box, strict=False)):
                inside = tuple(i - s.start for i, s in zip(index, box, strict=False))
                yield Read(name, box[len(index) :], out[(*inside, ...)])


def _load_on_host(reader: Reader, plan: Plan, mesh: Mesh | None) -> dict[tuple, jax.Array]:
    """All shards are buffers of this process: filled in one pass over the files, then handed over without a copy."""
    shards, reads = [], []
    for parameter in plan.parameters:
        for box, devices in device_boxes(_sharding(parameter, mesh), parameter.shape).items():
            buffer = aligned_empty([s.stop - s.start for s in box], parameter.dtype)
            reads += reader.reads(parameter, box, buffer)
            shards.append((parameter, buffer, devices))
    reader.run(reads)
    arrays: dict[tuple, list[jax.Array]] = {}
    for parameter, buffer, devices in shards:
        first, *others = devices
        arrays.setdefault(parameter.key, []).append(jax.device_put(buffer, first, may_alias=True))
        arrays[parameter.key] += [jax.device_put(buffer, device, may_alias=False) for device in others]
    return {
        p.key: jax.make_array_from_single_device_arrays(p.shape, _sharding(p, mesh), arrays[p.key])
        for p in plan.parameters
    }


def _load_on_accelerator(reader: Reader, parameter: Parameter, sharding: Sharding) -> jax.Array:
    """Shards pass through a bounded host buffer: whole if they fit, else in parts written into the device's array."""
    arrays = []
    for box, devices in device_boxes(sharding, parameter.shape).items():
        arrays += _fill_devices(reader, parameter, box, devices)
    return jax.make_array_from_single_device_arrays(parameter.shape, sharding, arrays)


def _fill_devices(reader: Reader, parameter: Parameter, box: Box, devices: list[jax.Device]) -> list[jax.Array]:
    shape = tuple(s.stop - s.start for s in box)
    parts = list(split_box(box, STAGING_BYTES // parameter.dtype.itemsize))
    targets = None if len(parts) == 1 else [jnp.zeros(shape, parameter.dtype, device=device) for device in devices]
    for part in parts:
        buffer = aligned_empty([s.stop - s.start for s in part], parameter.dtype)
        reader.run(list(reader.reads(parameter, part, buffer)))
        values = [jax.device_put(buffer, device, may_alias=False) for device in devices]
        if targets is None:
            return jax.block_until_ready(values)
        start = [np.int32(p.start - s.start) for p, s in zip(part, box, strict=True)]
        targets = jax.block_until_ready(
            [_write(target, value, *start) for target, value in zip(targets, values, strict=True)]
        )
    return targets


@jax.jit(donate_argnums=0)
def _write(target: jax.Array, value: jax.Array, *start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(target, value, start)


def device_boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[Box, list[jax.Device]]:
    """The distinct shards of this process's devices, and the devices that hold each."""
    boxes: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        boxes.setdefault(box, []).append(device)
    return boxes


def whole_box(shape: Sequence[int]) -> Box:
    return tuple(slice(0, n) for n in shape)


def split_box(box: Box, elements: int) -> Iterator[Box]:
    """Cut a box along its leading axes into boxes of at most about `elements` elements."""
    sizes = [s.stop - s.start for s in box]
    if math.prod(sizes) <= elements or len(box) < 1:
        yield box
        return
    axis = next((i for i, n in enumerate(sizes) if n > 1), 0)
    step = max(1, elements // max(1, math.prod(sizes[axis + 1 :])))
    for start in range(box[axis].start, box[axis].stop, step):
        part = (*box[:axis], slice(start, min(start + step, box[axis].stop)), *box[axis + 1 :])
        if step == 1 and math.prod(sizes[axis + 1 :]) > elements and axis + 1 < len(box):
            yield from split_box(part, elements)
        else:
            yield part


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that JAX on a CPU takes over without a copy (64-byte aligned)."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (
        np.empty(size + 64, np.uint8) if size < MAP_BYTES else np.frombuffer(mmap.mmap(-1, size, **_PRIVATE), np.uint8)
    )
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
