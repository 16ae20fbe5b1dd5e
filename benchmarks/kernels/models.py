"""Whole models through the kernels: `python -m benchmarks.kernels.models --models FOLDER ...`.

For each checkpoint, against the same model in float32 on plain XLA: relative norm errors of logits (a whole pass, and
through a cache: a first chunk, a second one, then token by token) and of the loss's gradient, how often the most likely
token is the same, and how long greedy continuations are. Each stands beside what the bfloat16 model makes of it on plain
XLA: the kernels may not be worse than bfloat16 is. Says which implementation served each op.
"""

import concurrent.futures
import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsparse
from benchmarks.kernels import measure
from dsparse import dispatch
from dsparse.tokenizer import Tokenizer
from dsparse.training.loss import cross_entropy

TEXT = Path(__file__).parent.parent.parent / "examples" / "demo" / "text.txt"
ROWS, LENGTH = 2, 512
PIECES = (0, 384, 496, *range(497, 505))  # through the cache
PROMPTS, PROMPT, NEW = 8, 128, 24
AS_NEAR = 1.25  # errors of the kernels over those of plain XLA in bfloat16


def sample(folder: Path, data: Path | None) -> np.ndarray:
    ids = np.load(data) if data else Tokenizer(folder).encode(TEXT.read_text(encoding="utf-8"))
    return np.asarray(ids[: ROWS * LENGTH], np.int32).reshape(ROWS, LENGTH)


@functools.partial(jax.jit, static_argnums=0)
def whole_pass(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    return model.logits(model.hidden_states(tokens)[0])


@functools.partial(jax.jit, static_argnums=(0, 5))
def piece(graphdef, state, tokens, start, cache, first: bool):
    model = nnx.merge(graphdef, state)
    positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache, _ = model.hidden_states(tokens, positions, cache=cache, empty_cache=first)
    return model.logits(hidden), cache


def cached_passes(graphdef, state, tokens) -> jax.Array:
    cache, logits = nnx.merge(graphdef, state).init_cache(ROWS, LENGTH), []
    for start, stop in itertools.pairwise(PIECES):
        out, cache = piece(graphdef, state, tokens[:, start:stop], start, cache, start == 0)
        logits.append(out)
    return jnp.concatenate(logits, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def gradient(graphdef, floating, rest, tokens):
    """Of the next token's loss, in the parameters that are stored as numbers of 16 or 32 bits; float32, one vector."""

    def loss(floating):
        model = nnx.merge(graphdef, floating, rest)
        hidden = model.norm(model.hidden_states(tokens[:, :-1])[0])
        return cross_entropy(hidden, model.head_weight(), tokens[:, 1:], jnp.ones(tokens[:, 1:].shape))

    return jnp.concatenate([g.astype(jnp.float32).ravel() for g in jax.tree.leaves(jax.grad(loss)(floating))])


def trained(path, variable) -> bool:
    return type(variable) is nnx.Param and variable.dtype in (jnp.float32, jnp.bfloat16) and "mtp" not in path


class Variant(NamedTuple):
    """A model of the checkpoint, computed as asked."""

    dtype: str | None
    implementation: str | None


FLOAT32, PLAIN, KERNELS = Variant("float32", "xla"), Variant("bfloat16", "xla"), Variant(None, None)


def of_each(
    variants: Sequence[Variant], compute: Callable[[dsparse.Model], jax.Array], folder: Path
) -> list[np.ndarray]:
    """compute(model) for each variant, side by side: most of the time goes into compiling."""

    def one(variant: Variant) -> np.ndarray:
        chosen = dispatch.prefer(variant.implementation) if variant.implementation else contextlib.nullcontext()
        with chosen, jax.default_matmul_precision("highest" if variant.dtype == "float32" else "default"):
            return np.asarray(compute(dsparse.from_pretrained(folder, dtype=variant.dtype)))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(one, variants))


def same_tokens(text: np.ndarray, expected: np.ndarray) -> list[int]:
    """For each continuation, how many of its tokens are the same before one differs."""
    return [int(np.argmin(np.append(a == b, False))) for a, b in zip(text, expected, strict=True)]


def check(folder: Path, data: Path | None, records: measure.Records) -> bool:
    tokens, passed = sample(folder, data), []
    dispatch.served.clear()
    variants = (FLOAT32, PLAIN, KERNELS)

    def compare(case: str, expected: np.ndarray, plain: np.ndarray, ours: np.ndarray, **figures) -> None:
        error, error_xla = (measure.relative_error(x, expected) for x in (ours, plain))
        passed.append(error < AS_NEAR * error_xla)
        records.add(f"{folder.name}: {case}", passed=passed[-1], error=error, error_xla=error_xla, **figures)

    expected, plain, ours = of_each(variants, lambda model: whole_pass(*nnx.split(model), tokens), folder)
    best = expected.argmax(-1)
    agreeing = {name: float((x.argmax(-1) == best).mean()) for name, x in (("", ours), ("_xla", plain))}
    compare("logits", expected, plain, ours, **{f"best_token{name}": share for name, share in agreeing.items()})
    (cached,) = of_each((KERNELS,), lambda model: cached_passes(*nnx.split(model), tokens), folder)
    compare("logits through the cache", *(x[:, : PIECES[-1]] for x in (expected, plain)), cached)

    prompts = tokens.reshape(-1)[: PROMPTS * PROMPT].reshape(PROMPTS, PROMPT)
    expected, plain, ours = of_each(
        variants, lambda model: dsparse.generate(model, prompts, max_new_tokens=NEW, stop_tokens=()), folder
    )
    same = {"same": (ours, expected), "same_xla": (plain, expected), "same_as_xla": (ours, plain)}
    records.add(f"{folder.name}: greedy text", of=NEW, **{name: str(same_tokens(*pair)) for name, pair in same.items()})
    slopes = of_each(variants, lambda model: gradient(*nnx.split(model, trained, ...), tokens), folder)
    if len({slope.shape for slope in slopes}) == 1:  # weights that are stored in 8 bits have no gradient
        compare("gradient", *slopes)
    served = [f"{op} {name}" + (f" ({why})" if why else "") for (op, name), why in dispatch.served.items()]
    records.add(f"{folder.name}: served by", served="; ".join(served))
    return all(passed)


def main() -> None:
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path, metavar="TOKENS.npy", help="text to read (default: the demo's)")
    arguments = parser.parse_args()
    records = measure.Records("models", arguments.results)
    passed = [check(folder, arguments.data, records) for folder in arguments.models]
    raise SystemExit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
