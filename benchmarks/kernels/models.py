"""Whole models through the kernels: `python -m benchmarks.kernels.models --models FOLDER ... [--fp8] [--meshes tensor=2]`.

For each checkpoint, against the same model in float32 on plain XLA: relative norm errors of logits (a whole pass, and
through a cache: a first chunk, a second one, then token by token) and of the loss's gradient, how often the most likely
token is the same, and how long greedy continuations are. Each stands beside what the bfloat16 model makes of it on plain
XLA: the kernels may not be worse than bfloat16 is. The same kernels in float16, whose numbers have three bits more, must
come nearer to float32. Where a continuation differs from float32's, the margin by which float32 preferred its token
stands beside the error of the logits there, computed as they were for that token: token by token, since an expert whose
score is nearly a tie may be chosen so and not in a whole pass. Says which implementation served each op.

--fp8: a copy of each checkpoint with experts in FP8 blocks, against float32 with the same dequantized weights.
--meshes: the kernels on several GPUs instead of plain XLA: they may not be worse than on one.

Most of the time goes into compiling, side by side; XLA_FLAGS="--xla_gpu_autotune_level=0
--xla_gpu_enable_triton_gemm=false" keeps XLA from trying algorithms for each product.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsparse
from benchmarks.kernels import fp8_checkpoint, measure
from dsparse import dispatch
from dsparse.tokenizer import Tokenizer
from dsparse.training.loss import cross_entropy

TEXT = Path(__file__).parent.parent.parent / "examples" / "demo" / "text.txt"
ROWS, LENGTH = 2, 512
PIECES = (0, 384, 496, *range(497, 505))  # through the cache
PROMPTS, PROMPT, NEW = 8, 128, 24
CONTINUED = (0, *range(PROMPT, PROMPT + NEW))
NEARER = 0.8  # errors of the kernels in float16 over those of plain XLA in bfloat16
AS_NEAR = 1.25  # errors of the kernels over those of plain XLA in bfloat16, or of one GPU
FP8_ERROR = 0.05  # of logits; rows of the experts' products are rounded to 4 significant bits
NEAR_TIE = 6.0  # margin of a tie that bfloat16 may decide otherwise, over the standard error of the logits there


def sample(folder: Path, data: Path | None) -> np.ndarray:
    ids = np.load(data) if data else Tokenizer(folder).encode(TEXT.read_text(encoding="utf-8"))
    return np.asarray(ids[: ROWS * LENGTH], np.int32).reshape(ROWS, LENGTH)


class Variant(NamedTuple):
    """A model of the checkpoint, computed as asked."""

    name: str
    dtype: str | None = None
    implementation: str | None = None
    mesh: str | None = None

    def run(self, work: Callable, tokens: np.ndarray, folder: Path) -> tuple[np.ndarray, dict[tuple[str, str], str]]:
        """work(model, tokens), and what served it."""
        chosen = dispatch.prefer(self.implementation) if self.implementation else contextlib.nullcontext()
        with chosen, jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
            model = dsparse.from_pretrained(folder, dtype=self.dtype, mesh=self.mesh)
            return np.asarray(work(model, tokens)), dispatch.served


Work = dict[Variant, concurrent.futures.Future]
FLOAT32, PLAIN = Variant("float32", "float32", "xla"), Variant("plain XLA", "bfloat16", "xla")
KERNELS, FLOAT16 = Variant("kernels"), Variant("kernels in float16", "float16")


@functools.partial(jax.jit, static_argnums=0)
def whole_pass(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    return model.logits(model.hidden_states(tokens)[0])


def logits(model: dsparse.Model, tokens: np.ndarray) -> jax.Array:
    return whole_pass(*nnx.split(model), tokens)


@functools.partial(jax.jit, static_argnums=(0, 5))
def piece(graphdef, state, tokens, start, cache, first: bool):
    model = nnx.merge(graphdef, state)
    positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache, _ = model.hidden_states(tokens, positions, cache=cache, empty_cache=first)
    return model.logits(hidden), cache


def cached_logits(model: dsparse.Model, tokens: np.ndarray, cuts: Sequence[int]) -> jax.Array:
    """Of the tokens up to the last cut, a piece after another through the cache."""
    graphdef, state = nnx.split(model)
    cache, parts = model.init_cache(*tokens.shape), []
    for start, stop in itertools.pairwise(cuts):
        out, cache = piece(graphdef, state, tokens[:, start:stop], start, cache, start == 0)
        parts.append(out)
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def loss_gradient(graphdef, floating, rest, tokens):
    """Of the next token's loss, in the parameters that are stored as numbers of 16 or 32 bits; float32, one vector."""

    def loss(floating):
        model = nnx.merge(graphdef, floating, rest)
        hidden = model.norm(model.hidden_states(tokens[:, :-1])[0])
        return cross_entropy(hidden, model.head_weight(), tokens[:, 1:], jnp.ones(tokens[:, 1:].shape))

    return jnp.concatenate([g.astype(jnp.float32).ravel() for g in jax.tree.leaves(jax.grad(loss)(floating))])


def gradient(model: dsparse.Model, tokens: np.ndarray) -> jax.Array:
    return loss_gradient(*nnx.split(model, trained, ...), tokens)


def trained(path, variable) -> bool:
    return type(variable) is nnx.Param and variable.dtype in (jnp.float32, jnp.bfloat16) and "mtp" not in path


def greedy(model: dsparse.Model, prompts: np.ndarray) -> np.ndarray:
    return dsparse.generate(model, prompts, max_new_tokens=NEW, stop_tokens=())


def same_tokens(text: np.ndarray, expected: np.ndarray) -> list[int]:
    """For each continuation, how many of its tokens are the same before one differs."""
    return [int(np.argmin(np.append(a == b, False))) for a, b in zip(text, expected, strict=True)]


class Checks:
    """Of one checkpoint: work on its variants starts at once, each in a process of its own, and is compared in turn."""

    def __init__(self, folder: Path, data: Path | None, records: measure.Records, name: str, fp8: bool):
        self.folder, self.records, self.name, self.fp8 = folder, records, name, fp8
        self.tokens = sample(folder, data)
        self.prompts = self.tokens.reshape(-1)[: PROMPTS * PROMPT].reshape(PROMPTS, PROMPT)
        self.passed: list[bool] = []
        self.served: dict[tuple[str, str], str] = {}
        workers = multiprocessing.get_context("spawn")
        self.pool = concurrent.futures.ProcessPoolExecutor(mp_context=workers, max_tasks_per_child=1)

    def start(self, variant: Variant, work: Callable, tokens: np.ndarray) -> concurrent.futures.Future:
        return self.pool.submit(variant.run, work, tokens, self.folder)

    def start_all(self, variants: Sequence[Variant], work: Callable, tokens: np.ndarray) -> Work:
        return {variant: self.start(variant, work, tokens) for variant in variants}

    def result(self, variant: Variant, work: Work) -> np.ndarray:
        value, served = work[variant].result()
        if variant.implementation is None:
            self.served |= served
        return value

    def compare(self, case: str, expected, beside, ours, near: float = AS_NEAR, **figures) -> None:
        error, error_beside = (measure.relative_error(x, expected) for x in (ours, beside))
        most = max(near * error_beside, FP8_ERROR if self.fp8 else 0.0)
        self.passed.append(error < most)
        self.records.add(
            f"{self.name}: {case}", passed=self.passed[-1], error=error, error_beside=error_beside, **figures
        )

    def texts(self, cases: dict[str, Variant], text: dict[Variant, np.ndarray], reference: Variant) -> None:
        """How much of each case's texts is the reference's, and the margins where they part."""
        expected = text[reference]
        whole = np.concatenate([self.prompts, expected], axis=1)
        variants = (reference, *cases.values())
        seen = self.start_all(variants, functools.partial(cached_logits, cuts=CONTINUED), whole)
        exact, *found_there = (self.result(variant, seen)[:, PROMPT - 1 :] for variant in variants)
        for (case, ours), found in zip(cases.items(), found_there, strict=True):
            self.parted(case, expected, text[ours], exact, found, text.get(PLAIN))

    def parted(self, case: str, expected, found, exact, found_there, beside) -> None:
        """Texts, and the logits of each of the expected tokens as both models computed them."""
        errors = np.std(exact - found_there, axis=-1)
        top = np.sort(exact, axis=-1)[..., -2:]
        margins, errors_there = [], []
        for row, count in enumerate(same_tokens(found, expected)):
            if count < NEW:
                one, other = exact[row, count, expected[row, count]], exact[row, count, found[row, count]]
                margins.append(round(float(one - other), 4))
                errors_there.append(round(float(errors[row, count]), 4))
        self.passed.append(all(m < NEAR_TIE * e for m, e in zip(margins, errors_there, strict=True)))
        self.records.add(
            f"{self.name}: {case}",
            passed=self.passed[-1],
            of=NEW,
            same=str(same_tokens(found, expected)),
            margins=str(margins),
            errors_there=str(errors_there),
            logit_error=float(np.median(errors)),
            near_ties=int(np.sum(top[..., 1] - top[..., 0] < NEAR_TIE * errors)),
            **({} if beside is None else {"same_beside": str(same_tokens(beside, expected))}),
        )

    def on_one_gpu(self) -> None:
        variants = (FLOAT32, PLAIN, KERNELS)
        slopes = {} if self.fp8 else self.start_all(variants, gradient, self.tokens)  # 8-bit weights have none
        nearer = () if self.fp8 else (FLOAT16,)
        text = self.start_all((*variants, *nearer), greedy, self.prompts)
        cached = self.start_all((KERNELS,), functools.partial(cached_logits, cuts=PIECES), self.tokens)
        whole = self.start_all((*variants, *nearer), logits, self.tokens)
        expected, plain, ours = (self.result(v, whole) for v in variants)
        best = expected.argmax(-1)
        agreeing = {n: float((x.argmax(-1) == best).mean()) for n, x in (("", ours), ("_beside", plain))}
        self.compare("logits", expected, plain, ours, **{f"best_token{n}": share for n, share in agreeing.items()})
        for variant in nearer:
            in_float16 = self.result(variant, whole)
            share = float((in_float16.argmax(-1) == best).mean())
            self.compare("logits in float16", expected, plain, in_float16, NEARER, best_token=share)
        first = [x[:, : PIECES[-1]] for x in (expected, plain)]
        self.compare("logits through the cache", *first, self.result(KERNELS, cached))
        cases = dict(zip(("greedy text", "greedy text in float16"), (KERNELS, *nearer), strict=False))
        self.texts(cases, {v: self.result(v, text) for v in (*variants, *nearer)}, FLOAT32)
        if slopes:
            self.compare("gradient", *(self.result(v, slopes) for v in variants))
        served = [f"{op} {name}" + (f" ({why})" if why else "") for (op, name), why in self.served.items()]
        self.records.add(f"{self.name}: served by", served="; ".join(served))

    def on_meshes(self, meshes: list[str]) -> None:
        """Kernels on every mesh against float32 on one GPU, beside kernels on one GPU."""
        spread = [Variant(f"kernels on {mesh}", mesh=mesh) for mesh in meshes]
        variants = (FLOAT32, KERNELS, *spread)
        slopes = {} if self.fp8 else self.start_all(variants, gradient, self.tokens)
        text = self.start_all((KERNELS, *spread), greedy, self.prompts)
        whole = self.start_all(variants, logits, self.tokens)
        for work, case in ((whole, "logits"), (slopes, "gradient")):
            for variant in spread if work else ():
                found = (self.result(v, work) for v in (FLOAT32, KERNELS, variant))
                self.compare(f"{case}, {variant.mesh}", *found)
        texts = {v: self.result(v, text) for v in (KERNELS, *spread)}
        self.texts({f"greedy text, {variant.mesh}": variant for variant in spread}, texts, KERNELS)


def check(folder: Path, arguments, records: measure.Records) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        name = f"{folder.name} in FP8" if arguments.fp8 else folder.name
        if arguments.fp8:
            folder = fp8_checkpoint.write(folder, Path(scratch, folder.name))
        checks = Checks(folder, arguments.data, records, name, arguments.fp8)
        checks.on_meshes(arguments.meshes) if arguments.meshes else checks.on_one_gpu()
    return all(checks.passed)


def main() -> None:
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path, metavar="TOKENS.npy", help="text to read (default: the demo's)")
    parser.add_argument("--fp8", action="store_true", help="experts in FP8 blocks")
    parser.add_argument("--meshes", nargs="+", metavar="MESH", help="such as tensor=2")
    arguments = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share the GPU
    records = measure.Records("models", arguments.results)
    passed = [check(folder, arguments, records) for folder in arguments.models]
    raise SystemExit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
