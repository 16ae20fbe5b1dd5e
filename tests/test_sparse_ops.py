"""Sparse attention and top-k against dense masked references."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsparse
from dsparse import gathered, indexing, ops, reference, sharding, shared_rows

B, T, S, N, H, V, K = 2, 13, 29, 3, 12, 8, 7
SHORT = 11  # a table that is masked: no more rows than queries


def random_case(rows: int = S, seed: int = 0):
    rng = np.random.default_rng(seed)
    q, kv = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((B, T, N, H), (B, rows, H)))
    indices = np.stack([[rng.permutation(rows)[:K] for _ in range(T)] for _ in range(B)]).astype(np.int32)
    indices[rng.random(indices.shape) < 0.2] = -1
    indices[0, 3] = -1  # a query without any index
    return q, kv, jnp.asarray(indices), jnp.asarray(rng.standard_normal(N), jnp.float32)


def dense_masked(q, kv, indices, *, v_head_dim, scale, sinks=None):
    """Every logit, and a mask that keeps the indexed ones."""
    keep = (indices[..., None] == jnp.arange(kv.shape[1])).any(axis=2)[:, :, None]
    logits = jnp.einsum("BTNH,BSH->BTNS", q, kv) * scale
    sink = (
        jnp.full((*q.shape[:3], 1), reference.NEG_INF)
        if sinks is None
        else jnp.broadcast_to(sinks[:, None], (*q.shape[:3], 1))
    )
    masked = jnp.concatenate([jnp.where(keep, logits, reference.NEG_INF), sink], axis=-1)
    lse = jax.nn.logsumexp(masked, axis=-1)
    weights = jnp.where(keep, jnp.exp(jnp.where(keep, logits - lse[..., None], 0.0)), 0.0)
    return jnp.einsum("BTNS,BSV->BTNV", weights, kv[..., :v_head_dim]), lse


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    """All queries at once, and three at a time (13 queries: the last chunk is padded)."""
    if request.param == "chunks":
        monkeypatch.setattr(gathered, "GATHERED_BYTES", 3 * B * K * H * 4)
        monkeypatch.setattr(shared_rows, "SCORE_BYTES", 3 * B * N * SHORT * 4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("rows", [S, SHORT])
def test_values_and_gradients(chunks, implementation, with_sinks, rows):
    """Output, log-sum-exp, and the gradients of a function of both, in q, kv and sinks."""
    q, kv, indices, sinks = random_case(rows)
    assert gathered.masked(q, kv, indices) == (rows == SHORT)
    sinks = sinks if with_sinks else None
    options = {"v_head_dim": V, "scale": 0.3}
    mix = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, N, V)), jnp.float32)
    some = (indices >= 0).any(axis=-1)[..., None]

    def outputs(attend, q, kv, sinks):
        out, lse = attend(q, kv, indices, sinks=sinks, **options)
        return out, jnp.where(some | with_sinks, lse, 0.0)

    def scalar(attend):
        def of(q, kv, sinks):
            out, lse = outputs(attend, q, kv, sinks)
            return jnp.sum(out * mix) + jnp.sum(jnp.sin(lse))

        return jax.jit(jax.grad(of, argnums=(0, 1, 2) if with_sinks else (0, 1)))

    def ours(*args, **kwargs):
        return ops.sparse_attention(*args, implementation=implementation, **kwargs)

    for a, b in zip(outputs(ours, q, kv, sinks), outputs(dense_masked, q, kv, sinks), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if implementation == "xla":
        for a, b in zip(scalar(ours)(q, kv, sinks), scalar(dense_masked)(q, kv, sinks), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("rows", [S, SHORT])
def test_a_query_without_indices(chunks, rows):
    q, kv, indices, sinks = random_case(rows)
    out, lse = ops.sparse_attention(q, kv, indices, v_head_dim=V, scale=0.3)
    assert not np.any(out[0, 3]) and np.all(np.isneginf(lse[0, 3]))
    out, lse = ops.sparse_attention(q, kv, indices, v_head_dim=V, scale=0.3, sinks=sinks)
    assert not np.any(out[0, 3])
    np.testing.assert_allclose(lse[0, 3], sinks, rtol=1e-6)


def expected_topk(scores, k, lengths) -> list[set[int]]:
    """A stable sort: the largest, the earliest of equals, nothing of -inf."""
    found = []
    for row, length in zip(np.asarray(scores, np.float32) + 0.0, lengths, strict=True):
        order = np.argsort(-row[:length], kind="stable")[:k]
        found.append({int(i) for i in order if row[i] > -np.inf})
    return found


@pytest.mark.parametrize("rows", [S, SHORT])
def test_gradients_in_bfloat16(rows):
    q, kv, indices, _ = random_case(rows)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(dtype, q, kv):
        def loss(q, kv):
            out, _ = ops.sparse_attention(q.astype(dtype), kv.astype(dtype), indices, v_head_dim=V, scale=0.3)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.grad(loss, (0, 1))(q, kv)

    for ours, expected in zip(gradients(jnp.bfloat16, q, kv), gradients(jnp.float32, q, kv), strict=True):
        assert jnp.linalg.norm(ours - expected) < 0.02 * jnp.linalg.norm(expected)


def test_gradients_of_gathered_rows_stay_on_their_devices():
    """The backward pass is traced where `use_mesh` has ended, as in training."""
    mesh = sharding.make_mesh("data=2")
    q, kv, indices, _ = random_case()
    args = [jax.device_put(x, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))) for x in (q, kv, indices)]

    def loss(q, kv, indices):
        with sharding.use_mesh(mesh):
            out, _ = ops.sparse_attention(q, kv, indices, v_head_dim=V, scale=0.3)
        return jnp.sum(jnp.sin(out))

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
    assert "scatter" in compiled.as_text()
    assert not {"all-gather", "all-reduce"} & set(re.findall(r"[a-z]+-[a-z]+", compiled.as_text()))
    for ours, alone in zip(compiled(*args), jax.grad(loss, (0, 1))(q, kv, indices), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-5)


ROWS_AND_SIZES = [
    (20, 64, 16),
    (40, 64, 16),
    (70, 300, 64),
    (64, 1000, 1),
    (64, 100, 100),
    (65, 2100, 64),
    (64, 9000, 33),
]


@pytest.mark.parametrize(("rows", "size", "k"), ROWS_AND_SIZES)
def test_topk_breaks_ties_by_position(rows, size, k):
    """Few rows, rows of one pass, and rows of which blocks are chosen first, once and several times."""
    rng = np.random.default_rng(size)
    scores = rng.standard_normal((rows, size)).astype(np.float32)
    scores[::2] = np.maximum(scores[::2], 0)
    scores[1::4] = np.minimum(scores[1::4], 0.5)  # ties at the top
    scores[:, ::5] *= -1.0  # -0.0 among the zeros
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    scores[3], scores[7], scores[5, 2] = -np.inf, np.arange(size), np.inf
    lengths = rng.integers(0, size + 1, rows).astype(np.int32)
    lengths[3:8] = size
    indices = np.asarray(jax.jit(ops.topk, static_argnums=1)(scores, k, lengths))
    for row, expected in zip(indices, expected_topk(scores, k, lengths), strict=True):
        kept = [int(i) for i in row if i >= 0]
        assert len(kept) == len(set(kept)) and set(kept) == expected
    whole = np.asarray(ops.topk(jnp.asarray(scores), k))
    assert [{int(i) for i in row if i >= 0} for row in whole] == expected_topk(scores, k, [size] * rows)


@pytest.mark.parametrize("heads", [3, 20])
def test_indexer_logits_head_by_head(heads):
    rng = np.random.default_rng(0)
    q, k, weights = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((B, T, heads, H), (B, S, H), (B, T, heads))
    )
    np.testing.assert_allclose(
        indexing.indexer_logits(q, k, weights), reference.indexer_logits(q, k, weights), atol=1e-4
    )


@pytest.mark.parametrize("rate", [1, 3])
@pytest.mark.parametrize("bounded", [False, True])
def test_indexer_topk_in_chunks_and_prefixes(monkeypatch, bounded, rate):
    """Neither the chunks of queries nor the prefixes of keys change what is selected, a key being of `rate` tokens."""
    rng = np.random.default_rng(0)
    length, topk = 41, 6
    keys = length // rate
    q, k, weights = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((B, length, N, H), (B, keys, H), (B, length, N))
    )
    ends = jnp.broadcast_to(jnp.arange(1, length + 1), (B, length)) // rate
    starts = jnp.maximum(ends - 20 // rate, 0) if bounded else None
    scores = np.array(reference.indexer_logits(q, k, weights)).reshape(-1, keys)
    if bounded:
        scores[np.arange(keys) < np.asarray(starts).reshape(-1, 1)] = -np.inf
    expected = expected_topk(scores, topk, np.asarray(ends).reshape(-1))
    for score_bytes, shortest in ((1 << 30, 1 << 30), (3 * 4 * B * length, 8)):
        monkeypatch.setattr(indexing, "SCORE_BYTES", score_bytes)
        monkeypatch.setattr(indexing, "SHORTEST_PREFIX", shortest)
        monkeypatch.setattr(indexing, "SHORTEST_PART", shortest)
        for own_keys in (False, True):
            choose = functools.partial(ops.indexer_topk, topk=topk, ends=ends, starts=starts, own_keys=own_keys)
            indices = np.asarray(jax.jit(choose)(q, k, weights))
            assert [{int(i) for i in row if i >= 0} for row in indices.reshape(-1, topk)] == expected


def test_model_gradients_equal_dense_masked_attention(monkeypatch):
    """Every parameter's gradient, with the sparse path and with a mask over all logits in its place."""
    config = dsparse.ModelConfig.tiny("glm_moe_dsa", num_hidden_layers=4, index_topk_freq=2, initializer_range=0.1)
    model = dsparse.Model(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 256, (2, 30)), jnp.int32)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def gradients():
        def loss(params):
            merged = nnx.merge(graphdef, params, rest)
            log_softmax = jax.nn.log_softmax(merged.logits(merged.hidden_states(tokens)[0])[:, :-1])
            return -jnp.mean(jnp.take_along_axis(log_softmax, tokens[:, 1:, None], axis=-1))

        return jax.tree.map(np.asarray, dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(params))))

    sparse = gradients()
    monkeypatch.setattr(ops, "sparse_attention", dense_masked)
    dense = gradients()
    for path, gradient in dense.items():
        np.testing.assert_allclose(sparse[path][...], gradient[...], atol=1e-5, err_msg=str(path))
        if "indexer" in path:
            assert not np.any(gradient[...])
    assert sum(np.any(g[...]) for g in dense.values()) > 20


COMPRESSED = {
    "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"], "mlp_layer_types": ["moe"] * 2,
    "num_hidden_layers": 2,
}  # fmt: skip


@pytest.mark.parametrize(("family", "options"), [("deepseek_v32", {}), ("deepseek_v4", COMPRESSED)])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_32k_tokens(family, options, backward):
    """Compiled, not run: scratch memory of a prefill and a gradient, far below one 32k x 32k score matrix (4 GiB)."""
    config = dsparse.ModelConfig.tiny(family, index_topk=64, max_position_embeddings=1 << 15, **options)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: dsparse.Model(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((1, 1 << 15), jnp.int32)

    def total(state, tokens):
        model = nnx.merge(graphdef, state)
        model.remat = "full"
        return jnp.sum(model.hidden_states(tokens)[0])

    program = jax.grad(total, allow_int=True) if backward else total
    memory = jax.jit(program).lower(state, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 30
