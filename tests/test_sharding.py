"""Sharded over eight virtual devices: the same numbers, split as the rules say."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from support import DEMO, sample_text_tokens

import dsparse
from dsparse.sharding import make_mesh, partition_spec

MESHES = ["data=2,tensor=4", "data=2,fsdp=2,expert=2", "fsdp=8", "expert=4,tensor=2"]


@pytest.fixture(scope="module")
def single():
    return dsparse.from_pretrained(DEMO, dtype="float32")


@pytest.fixture(scope="module", params=MESHES)
def sharded(request):
    return dsparse.from_pretrained(DEMO, dtype="float32", mesh=request.param)


def test_logits_equal(single, sharded):
    tokens = sample_text_tokens(DEMO, 8, 60)
    np.testing.assert_allclose(sharded(tokens), single(tokens), atol=1e-4, rtol=0)


def test_batch_that_the_mesh_does_not_divide(single, sharded):
    tokens = sample_text_tokens(DEMO, 3, 21)
    np.testing.assert_allclose(sharded(tokens), single(tokens), atol=1e-4, rtol=0)


def test_generated_tokens_equal(single, sharded):
    tokens, lengths = sample_text_tokens(DEMO, 8, 40), [40, 3, 17, 40, 1, 9, 30, 22]
    options = {"lengths": lengths, "max_new_tokens": 10, "stop_tokens": ()}
    ours, expected = (dsparse.generate(m, tokens, **options) for m in (sharded, single))
    np.testing.assert_array_equal(ours, expected)


def test_parameters_are_split_as_their_axes_say(sharded):
    mesh, split = sharded.mesh, 0
    for path, variable in nnx.to_flat_state(nnx.state(sharded)):
        array = variable[...]
        expected = partition_spec(variable.get_metadata("axes"), array.shape, mesh)
        assert array.sharding.is_equivalent_to(jax.NamedSharding(mesh, expected), array.ndim), path
        split += expected != PartitionSpec(*(None,) * array.ndim)
    assert split > 10


def test_rules():
    mesh = make_mesh("data=2,expert=2,tensor=2")
    assert partition_spec(("layers", "experts", None, "mlp", "embed"), (3, 8, 2, 96, 64), mesh) == PartitionSpec(
        None, "expert", None, "tensor", None
    )
    assert partition_spec(("batch", None), (8, 5), mesh) == PartitionSpec(("data", "expert"), None)
    assert partition_spec(("batch", None), (2, 5), mesh) == PartitionSpec("data", None)
    assert partition_spec(("batch", None), (3, 5), mesh) == PartitionSpec(None, None)
    assert partition_spec(("heads", "embed"), (9, 4), mesh) == PartitionSpec(None, None)


def test_caches_are_split_over_the_batch(sharded):
    cache = jax.jit(lambda: sharded.init_cache(8, 16))()
    ways = np.prod([sharded.mesh.shape[a] for a in ("data", "fsdp", "expert")])
    for array in jax.tree.leaves(cache):
        assert array.sharding.shard_shape(array.shape)[1] == 8 // ways


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("data=3x", "expected axis=size"),
        ("rows=2", "rows=2"),
        ("data=16", "needs 16 devices, 8 cpu found"),
        ("", "expected axis=size"),
    ],
)
def test_bad_meshes_are_named(description, message):
    with pytest.raises(dsparse.DsparseError, match=message):
        make_mesh(description)
