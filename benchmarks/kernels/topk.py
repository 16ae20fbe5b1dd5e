"""Exact top-k on the H100 beside torch's: `python -m benchmarks.kernels.topk [--check]`."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import measure
from dsparse.kernels.topk import SM_COUNT, topk

SHAPES = [(2048, 32768, 2048), (2048, 8192, 512), (2048, 32768, 512), (512, 131072, 2048), (512, 131072, 4096)]


def reference(scores: np.ndarray, k: int, lengths: np.ndarray) -> np.ndarray:
    """Rising positions of the k largest, ties broken by the lowest; -1 at the end."""
    out = np.full((scores.shape[0], k), -1)
    for row, length in enumerate(lengths):
        best = np.sort(np.argsort(-(scores[row, :length] + 0.0), kind="stable")[:k])
        out[row, : len(best)] = best
    return out


def unlike_rows(scores):
    """Scaled, moved and constant rows in turns."""
    row = np.arange(scores.shape[0])[:, None]
    return np.where(row % 5 == 4, row, scores * 4.0 ** (row % 5) + row % 7).astype(np.float32)


def check(chosen: list[int]) -> None:
    for case, (rows, width, k) in enumerate(
        [
            (9, 700, 512),
            (5, 5000, 512),
            (133, 8192, 2048),
            (7, 32768, 2048),
            (3, 33000, 2048),
            (4, 131072, 4096),
            (3, 65536, 1),
            (2, 131072, 513),
            (3, 4096, 4096),
            (400, 8192, 1024),  # several rows a block: the last one's threshold is where the next is looked for first
            (140, 40000, 512),
        ]
    ):
        if chosen and case not in chosen:
            continue
        rng = np.random.default_rng(case)
        normal = rng.standard_normal((rows, width)).astype(np.float32)
        row = np.arange(rows)[:, None] // SM_COUNT  # of a block
        signed_zeros = np.where(rng.random((rows, width)) < 0.5, -0.0, 0.0)
        for name, scores in {
            "normal": normal,
            "relu": np.where(normal > 2, normal, signed_zeros).astype(np.float32),
            "few values": np.round(normal * 2),
            "constant": np.full_like(normal, -3.0),
            "infinite": np.where(normal > 0, -np.inf, normal),
            "wide range": np.exp(normal * 20).astype(np.float32),
            "unlike rows": unlike_rows(normal),
            "unlike rows of a block": np.where(row % 2 == 0, normal, np.round(normal) - 50 * row).astype(np.float32),
        }.items():
            for lengths in (None, rng.integers(0, width + 1, rows)):
                out = topk(jnp.asarray(scores), k, None if lengths is None else jnp.asarray(lengths))
                expected = reference(scores, k, np.full(rows, width) if lengths is None else lengths)
                wrong = (np.asarray(out) != expected).any(axis=1).sum()
                if wrong or name == "relu":
                    print(f"check {rows}x{width} k {k} {name} lengths {lengths is not None}: {wrong} wrong", flush=True)
                assert not wrong
    print("check passed")


def main() -> None:
    import torch

    parser = measure.parser(__doc__)
    parser.add_argument(
        "--check", nargs="*", type=int, metavar="CASE", help="only compare with numpy (of all cases or these)"
    )
    arguments = parser.parse_args()
    records = measure.Records("topk", arguments.results)
    if arguments.check is not None:
        return check(arguments.check)
    for rows, width, k in SHAPES:
        scores = jax.random.normal(jax.random.key(0), (rows, width))
        ours = measure.jax_milliseconds(lambda s, k=k: topk(s, k), scores)
        relu = jnp.maximum(scores - 1.6, 0)
        ties = measure.jax_milliseconds(lambda s, k=k: topk(s, k), relu)
        unlike = measure.jax_milliseconds(lambda s, k=k: topk(s, k), jnp.asarray(unlike_rows(np.asarray(scores))))
        xla = measure.jax_milliseconds(lambda s, k=k: jax.lax.top_k(s, k)[1], scores)
        scores_torch = measure.to_torch(scores)
        torch_ms = measure.torch_milliseconds(lambda s=scores_torch, k=k: torch.topk(s, k, sorted=False))
        floor = scores.nbytes / 3e9
        records.add(
            f"{k} of {width}, {rows} rows",
            ms=ours,
            ties_ms=ties,
            unlike_rows_ms=unlike,
            torch_ms=torch_ms,
            xla_ms=xla,
            read_ms=floor,
        )


if __name__ == "__main__":
    main()
