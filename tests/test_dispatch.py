"""Which implementation serves an op, and whole models through kernels that the references stand in for."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins
from flax import nnx

import dsparse
from dsparse import dispatch, grouped, ops, reference
from dsparse.kernels import mosaic

KERNELS = {
    "deepseek_v3": {"causal_attention": "cudnn", "cached_attention": "cudnn", "latent_attention": "mosaic_gpu"},
    "deepseek_v32": {"indexer_topk": "mosaic_gpu", "sparse_attention": "mosaic_gpu"},
    "deepseek_v4": {"indexer_topk": "mosaic_gpu", "sparse_attention": "mosaic_gpu", "window_attention": "mosaic_gpu"},
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(dispatch, "served", {})


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that the references stand in for; compiled programs that were made without them are not used."""
    monkeypatch.setattr(dispatch, "kernel", stand_ins.kernel)
    jax.clear_caches()
    yield
    jax.clear_caches()


def served() -> dict[str, set[str]]:
    names = {}
    for op, name in dispatch.served:
        names.setdefault(op, set()).add(name)
    return names


@pytest.fixture(scope="module", params=KERNELS)
def family(request, tmp_path_factory):
    """A family, a folder with a random model of it in float32, its logits, and its continuations."""
    config = dsparse.ModelConfig.tiny(request.param, moe_intermediate_size=48)
    model = dsparse.Model(config, rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp(request.param) / "model"
    dsparse.save_pretrained(model, folder, format="dsparse")
    with dispatch.prefer("xla"):
        segments = np.repeat([[0, 1, 2], [0, 0, 1]], 16, axis=1)
        packed = model(tokens(), segment_ids=segments)
        return request.param, folder, model(tokens()), packed, segments, generated(model)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 250, (2, 48))


def generated(model) -> np.ndarray:
    return dsparse.generate(model, tokens(), lengths=[48, 19], max_new_tokens=6, stop_tokens=())


@pytest.mark.parametrize("mesh", [None, "data=2,expert=2,tensor=2"])
def test_models_through_kernels(kernels, monkeypatch, family, mesh):
    name, folder, logits, packed, segments, continuation = family
    monkeypatch.setattr("dsparse.generation.PREFILL_CHUNK", 32)
    model = dsparse.from_pretrained(folder, dtype="float32", mesh=mesh)
    np.testing.assert_allclose(model(tokens()), logits, atol=1e-4)
    np.testing.assert_allclose(model(tokens(), segment_ids=segments), packed, atol=1e-4)
    np.testing.assert_array_equal(generated(model), continuation)
    assert served() == {op: {kernel} for op, kernel in (KERNELS[name] | {"expert_mlp": "mosaic_gpu"}).items()}


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2"])
def test_gradients_through_kernels(kernels, family, mesh):
    _, folder, *_ = family

    def gradients(model):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            hidden = nnx.merge(graphdef, params, rest).hidden_states(tokens())[0]
            return jnp.sum(jnp.sin(hidden))

        return jax.jit(jax.grad(loss))(params)

    ours = gradients(dsparse.from_pretrained(folder, dtype="float32", mesh=mesh))
    assert "xla" not in set.union(*served().values())
    with dispatch.prefer("xla"):
        expected = gradients(dsparse.from_pretrained(folder, dtype="float32"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, expected)


def test_fp8_experts_through_kernels(kernels):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (30, 192)).astype(jnp.bfloat16)
    choice, weights = jax.random.randint(keys[1], (30, 2), 0, 5), jnp.ones((30, 2))
    gate_up, down = (
        jax.random.normal(k, s).astype(jnp.float8_e4m3fn) for k, s in zip(keys[2:], ((4, 2, 96, 192), (4, 192, 96)))
    )
    scales = (jnp.full(shape, 0.1).astype(jnp.float8_e8m0fnu) for shape in ((4, 2, 1, 2), (4, 2, 1)))
    experts = grouped.Experts(gate_up, down, *scales)
    out = ops.expert_mlp(x, choice, weights, experts, limit=10.0)
    expected = ops.expert_mlp(x, choice, weights, experts, limit=10.0, implementation="xla")
    difference = np.linalg.norm((out - expected).astype(jnp.float32))
    assert difference < 0.06 * np.linalg.norm(expected.astype(jnp.float32))  # rows too are rounded to 3 bits
    assert served() == {"expert_mlp": {"mosaic_gpu"}}

    def loss(x, implementation):
        return jnp.sum(ops.expert_mlp(x, choice, weights, experts, implementation=implementation).astype(jnp.float32))

    ours, expected = (jax.grad(loss)(x, name) for name in ("mosaic_gpu", "xla"))
    np.testing.assert_array_equal(ours, expected)


# ---- decisions ------------------------------------------------------------------------------------------------------


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def chosen(op, *args, **options) -> dict[str, set[str]]:
    dispatch.served.clear()
    jax.eval_shape(functools.partial(op, **options), *args)
    return served()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with mosaic.assume_hopper():
        yield


INT = functools.partial(shaped, dtype=jnp.int32)
SPARSE = functools.partial(ops.sparse_attention, scale=0.1)


@pytest.mark.parametrize(
    ("op", "args", "options", "implementation"),
    [
        (SPARSE, (shaped(1, 8, 128, 576), shaped(1, 900, 576), INT(1, 8, 256)), {"v_head_dim": 512}, "mosaic_gpu"),
        (SPARSE, (shaped(1, 8, 4, 96), shaped(1, 900, 96), INT(1, 8, 256)), {"v_head_dim": 64}, "mosaic_gpu"),
        (SPARSE, (shaped(1, 8, 4, 640), shaped(1, 900, 640), INT(1, 8, 256)), {"v_head_dim": 512}, "xla"),
        (
            SPARSE,
            (shaped(1, 8, 4, 96, dtype=jnp.float32), shaped(1, 90, 96, dtype=jnp.float32), INT(1, 8, 25)),
            {"v_head_dim": 64},
            "xla",
        ),
        (
            ops.indexer_topk,
            (shaped(1, 8, 4, 32), shaped(1, 900, 32), shaped(1, 8, 4)),
            {"topk": 64, "ends": jnp.full((1, 8), 900), "starts": jnp.zeros((1, 8), jnp.int32)},
            "mosaic_gpu",
        ),
        (
            ops.indexer_topk,
            (shaped(1, 8, 4, 160), shaped(1, 900, 160), shaped(1, 8, 4)),
            {"topk": 64, "ends": jnp.full((1, 8), 900)},
            "xla",
        ),
        (ops.grouped_matmul, (shaped(64, 96), shaped(4, 96, 96), INT(4)), {}, "mosaic_gpu"),
        (ops.topk, (shaped(4, 9000, dtype=jnp.float32),), {"k": 512}, "mosaic_gpu"),
        (ops.topk, (shaped(4, 9000, dtype=jnp.float32),), {"k": 5000}, "xla"),
    ],
)
def test_choices_on_hopper(hopper, op, args, options, implementation):
    assert next(reversed(chosen(op, *args, **options).values())) == {implementation}


def experts(dtype, down=None, scales=None):
    return grouped.Experts(shaped(4, 2, 96, 64, dtype=dtype), shaped(4, 64, down or 96, dtype=dtype), *(scales or ()))


FP8_SCALES = (shaped(4, 2, 1, 1, dtype=jnp.float32), shaped(4, 1, 1, dtype=jnp.float32))
FP4_SCALES = (shaped(4, 2, 96, 4, dtype=jnp.float32), shaped(4, 64, 3, dtype=jnp.float32))


@pytest.mark.parametrize(
    ("weights", "dtype", "implementation", "reason"),
    [
        (experts(jnp.bfloat16), jnp.bfloat16, "mosaic_gpu", ""),
        (experts(jnp.float32), jnp.bfloat16, "mosaic_gpu", ""),  # master weights: cast once a step
        (experts(jnp.bfloat16), jnp.float32, "xla", "takes bfloat16"),
        (experts(jnp.float8_e4m3fn, scales=FP8_SCALES), jnp.bfloat16, "mosaic_gpu", ""),
        (experts(jnp.float8_e5m2, scales=FP8_SCALES), jnp.bfloat16, "xla", "stored as float8_e5m2"),
        (experts(jnp.int8, down=48, scales=FP4_SCALES), jnp.bfloat16, "xla", "stored as int8"),
    ],
)
def test_choices_of_experts_on_hopper(hopper, weights, dtype, implementation, reason):
    if weights.gate_up.dtype == jnp.int8:
        weights = weights._replace(gate_up=shaped(4, 2, 96, 32, dtype=jnp.int8))
    args = shaped(30, 64, dtype=dtype), INT(30, 2), shaped(30, 2, dtype=jnp.float32), weights
    assert chosen(ops.expert_mlp, *args, limit=10.0) == {"expert_mlp": {implementation}}
    assert reason in dispatch.served["expert_mlp", implementation]


def test_other_gpus_fall_back_and_say_so(monkeypatch, caplog):
    class Ampere:
        platform, device_kind, compute_capability = "gpu", "NVIDIA A100", "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Ampere()])
    with caplog.at_level(logging.INFO, "dsparse.ops"):
        chosen(SPARSE, shaped(1, 8, 128, 576), shaped(1, 90, 576), INT(1, 8, 16), v_head_dim=512)
    reason = "mosaic_gpu: Mosaic GPU kernels need compute capability 9.0 (Hopper), and NVIDIA A100 has 8.0"
    assert [r.getMessage() for r in caplog.records] == [f"sparse_attention is served by xla ({reason})"]


def test_a_preference_is_not_forgotten_by_jit(monkeypatch):
    q, kv, indices = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 4, 8)), jnp.zeros((1, 2, 3), jnp.int32)
    attend = jax.jit(functools.partial(SPARSE, v_head_dim=8))
    attend(q, kv, indices)
    with dispatch.prefer("mosaic_gpu"), pytest.raises(NotImplementedError, match="needs a GPU"):
        attend(q, kv, indices)
    with dispatch.prefer("reference"):
        ops.grouped_matmul(jnp.ones((4, 8)), jnp.ones((2, 8, 8)), jnp.array([2, 2]))  # has no "reference"
        monkeypatch.setattr(reference, "sparse_attention", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attend(q, kv, indices)
    assert served() == {"sparse_attention": {"xla"}, "grouped_matmul": {"xla"}}


def test_minus_infinity_is_never_taken(kernels):
    scores = jnp.array([[1.0, -jnp.inf, 3.0, -jnp.inf], [-jnp.inf, -jnp.inf, 0.0, 5.0]])
    for implementation in ("mosaic_gpu", "xla"):
        chosen = np.sort(ops.topk(scores, 3, jnp.array([4, 3]), implementation=implementation))
        np.testing.assert_array_equal(chosen, [[-1, 0, 2], [-1, -1, 2]])


def test_window_as_index_lists_equals_the_band():
    from dsparse import banded

    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q, kv, rows, sinks = normal(2, 20, 3, 8), normal(2, 24, 8), normal(2, 5, 8), normal(3)
    segments = jnp.asarray(np.repeat([[0, 1], [3, 3]], 10, axis=1))
    last = jnp.broadcast_to(jnp.arange(20) // 4, (2, 20))
    for indices in (None, jnp.asarray(rng.integers(-1, 5, (2, 20, 1)))):
        entries = banded.Entries(rows, jnp.maximum(last - 3, 0), last, indices)
        for with_entries, segment_ids in ((entries, None), (None, segments), (entries, segments)):
            start = jnp.full(2, 4) if segment_ids is not None else jnp.array([4, 1])
            options = {"window": 5, "start": start, "segment_ids": segment_ids}
            expected = banded.banded_attention(q, kv, with_entries, scale=0.4, sinks=sinks, **options)
            table, lists = banded.index_lists(kv, with_entries, **options)
            out, _ = reference.sparse_attention(q, table, lists, v_head_dim=8, scale=0.4, sinks=sinks)
            np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in KERNELS), ("deepseek_v32", "float16")])
def test_whole_models_lower_for_hopper(hopper, name, dtype):
    """Decode and gradients of 16-bit models: every kernel takes what the models hand it."""
    compressed = {"layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"]}
    compressed |= {"mlp_layer_types": ["hash_moe", "moe"]}
    config = dsparse.ModelConfig.tiny(name, num_hidden_layers=2, **(compressed if name == "deepseek_v4" else {}))
    model = nnx.eval_shape(lambda: dsparse.Model(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    cache = jax.eval_shape(lambda: model.init_cache(2, 64))

    def hidden(params, rest, tokens, positions=None, cache=None):
        return nnx.merge(graphdef, params, rest).hidden_states(tokens, positions, cache=cache)[:2]

    def loss(*args):
        return jnp.sum(hidden(*args)[0].astype(jnp.float32))

    for function, *args in (
        (jax.grad(loss), INT(2, 48)),
        (hidden, INT(2, 1), INT(2, 1), cache),
    ):
        jax.jit(function).trace(params, rest, *args).lower(lowering_platforms=("cuda",))
    expected = {op: {kernel} for op, kernel in KERNELS[name].items() if kernel != "cudnn"}  # cuDNN asks the device
    assert {op: names for op, names in served().items() if "attention" not in op or op in expected} == (
        expected | {"expert_mlp": {"mosaic_gpu"}}
    )
