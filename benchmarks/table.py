"""README's tables of what was measured on GPUs, made of `benchmarks/results/*.jsonl`: `python -m benchmarks.table`.

Rewrites what stands between the markers of each table. Of several lines for one case of a benchmark the last one counts,
so a benchmark that is run again appends its lines (`--results benchmarks/results/NAME.jsonl`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Record = dict[str, Any]


class Row(NamedTuple):
    """A line of a table. measured, beside: templates for each case's record; what they make is joined with " / ".

    peers: the cases that `beside` reads, where they are others. failed: stands for `beside` where a case could not run.
    """

    label: str
    benchmark: str
    cases: tuple[str, ...]
    measured: str
    unit: str
    beside: str = ""
    peers: tuple[str, ...] | None = None
    failed: str = ""


GROUPED = "256 groups, 65536 rows, 7168 to 2048"
KERNELS = (
    Row(
        "sparse attention forward, q 4096, 128 heads, 576/512, top-k 2048, kv 8192 / 32768",
        "sparse_attention",
        ("V3.2, 8k keys", "V3.2, 32k keys"),
        "{forward_tflops:.0f}",
        "TFLOP/s",
        "XLA {xla_forward_tflops:.0f}",
    ),
    Row(
        "sparse attention forward, V4: 64 heads, 512, top-k 512, sinks, kv 8192 / 32768",
        "sparse_attention",
        ("V4, 64 heads, 8k keys", "V4, 64 heads, 32k keys"),
        "{forward_tflops:.0f}",
        "TFLOP/s",
        "XLA {xla_forward_tflops:.0f}",
    ),
    Row(
        "sparse attention backward (5 products), V3.2, kv 8192 / 32768",
        "sparse_attention",
        ("V3.2, 8k keys", "V3.2, 32k keys"),
        "{backward_tflops:.0f}",
        "TFLOP/s",
        "XLA {xla_backward_tflops:.0f}",
    ),
    Row(
        "sparse attention decode, 128 x 2 queries, kv 32768, bf16 / fp8 cache",
        "sparse_attention",
        ("decode 128 x 2 queries, 32k keys, bfloat16", "decode 128 x 2 queries, 32k keys, uint8"),
        "{us:.0f}",
        "us",
    ),
    *(
        Row(
            f"{name}, 256 experts, 65536 rows, 7168x2048, even / routed",
            "grouped_matmul",
            tuple(f"{case}, {GROUPED}, {kind}" for kind in ("even", "routed")),
            "{tflops:.0f}",
            "TFLOP/s",
            beside,
        )
        for name, case, beside in (
            ("grouped matmul", "forward", "torch {torch_tflops:.0f}"),
            ("its gradient of rows", "dgrad", ""),
            ("its gradient of weights", "wgrad", ""),
            ("gate, up and SwiGLU", "swiglu", ""),
            ("grouped matmul fp8", "fp8", ""),
            ("grouped matmul int8", "int8", ""),
        )
    ),
    Row(
        "grouped matmul, 256 experts, 1024 rows (a step of decoding), 7168x2048, bf16 / fp8, weights read",
        "grouped_matmul",
        tuple(f"{name}, 256 groups, 1024 rows, 7168 to 2048, routed" for name in ("forward", "fp8")),
        "{weights_gbs:.0f}",
        "GB/s",
        "torch {torch_weights_gbs:.0f} (bf16)",
        ("forward, 256 groups, 1024 rows, 7168 to 2048, routed",),
    ),
    Row(
        "top-k 2048 of 32768, 2048 rows of one distribution",
        "topk",
        ("2048 of 32768, 2048 rows",),
        "{ms:.3f}",
        "ms",
        "torch {torch_ms:.3f}, XLA {xla_ms:.2f} ms",
    ),
    Row(
        "indexer logits, 64 heads, q 2048, kv 32768, fp8",
        "indexer",
        ("2048 queries, 32768 keys, 64 heads, float8_e4m3fn causal",),
        "{tflops:.0f}",
        "TFLOP/s",
    ),
    Row(
        "the same in bf16",
        "indexer",
        ("2048 queries, 32768 keys, 64 heads, bfloat16 causal",),
        "{tflops:.0f} TFLOP/s, {ms:.2f}",
        "ms",
        "XLA {xla_ms:.1f} ms",
    ),
    *(
        Row(
            f"dense causal attention by cuDNN, 8192 tokens, 128 heads, 192/128, {work}",
            "dense_attention",
            ("8192 tokens, 128 heads of 192 and 128, cudnn",),
            f"{{{work}_tflops:.0f}}",
            "TFLOP/s",
            f"XLA {{{work}_tflops:.0f}}",
            ("8192 tokens, 128 heads of 192 and 128, xla",),
        )
        for work in ("forward", "backward")
    ),
    Row(
        "a whole V3.2 layer, 256 experts, forward, 8192 / 32768 tokens",
        "layer",
        ("8192 tokens, forward, mosaic_gpu", "32768 tokens, forward, mosaic_gpu"),
        "{ms:.0f}",
        "ms",
        "XLA {ms:.0f} ms",
        ("8192 tokens, forward, xla", "32768 tokens, forward, xla"),
    ),
    Row(
        "the same, forward and gradients of all weights, 8192 / 32768 tokens",
        "layer",
        ("8192 tokens, forward and backward, mosaic_gpu", "32768 tokens, forward and backward, mosaic_gpu"),
        "{ms:.0f}",
        "ms",
        "XLA {ms:.0f} ms",
        ("8192 tokens, forward and backward, xla", "32768 tokens, forward and backward, xla"),
        "XLA needs {gib:.0f} GiB",
    ),
)
MODEL_CASES = {
    "logits": "logits",
    "logits in float16": "logits",
    "logits through the cache": "logits through the cache",
    "gradient": "gradient of the loss",
}
MODELS = tuple(
    Row(
        f"{label}: {' / '.join(MODEL_CASES[case] for case in cases)}",
        "models",
        tuple(f"{model}: {what}" for what in cases),
        "{error:.4f}",
        "",
        "{error_beside:.4f}",
    )
    for label, model, cases in (
        *((f"`{model}`", model, ("logits", "logits through the cache", "gradient")) for model in ("v3", "v32", "v4")),
        *((f"`{model}` in fp16", model, ("logits in float16",)) for model in ("v3", "v32", "v4")),
        ("demo, experts in FP8", "demo in FP8", ("logits", "logits through the cache")),
    )
)
MESHES = tuple(
    Row(
        f"`{model}`, data=2 / tensor=2 / expert=2: {what}",
        "models",
        tuple(f"{model}: {case}, {axis}=2" for axis in ("data", "tensor", "expert")),
        "{error:.4f}",
        "",
        "{error_beside:.4f}",
        (f"{model}: {case}, data=2",),
    )
    for model in ("v32", "v4", "demo")
    for case, what in (("logits", "logits"), ("gradient", "gradient of the loss"))
) + tuple(
    Row(
        f"`{model}`, data=2 / tensor=2 / expert=2: of 8 greedy continuations, those equal to one GPU's",
        "models",
        tuple(f"{model}: greedy text, {axis}=2" for axis in ("data", "tensor", "expert")),
        "{whole}",
        "",
    )
    for model in ("v32", "v4", "demo")
)
TEXTS = tuple(
    Row(
        label,
        "models",
        tuple(f"{model}: {case}" for case in cases),
        "{whole}",
        "",
        "{whole_beside}",
        (f"{model}: greedy text",),
    )
    for label, model, cases in (
        *((f"`{model}`", model, ("greedy text", "greedy text in float16")) for model in ("v3", "v32", "v4")),
        ("demo, experts in FP8, bf16 alone", "demo in FP8", ("greedy text",)),
    )
)
TABLES = {
    "kernels": ("| kernel | measured | beside |", KERNELS),
    "models": ("| checkpoint, error to float32 | kernels | plain XLA in bf16 |", MODELS),
    "texts": (
        "| of 8 greedy continuations of 24 tokens, those equal to float32's | kernels in bf16 / fp16 | XLA in bf16 |",
        TEXTS,
    ),
    "meshes": ("| checkpoint on two GPUs, error to float32 | kernels on the mesh | kernels on one GPU |", MESHES),
}


def records() -> dict[tuple[str, str], Record]:
    """The last record of each (benchmark, case)."""
    found = {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for name in ("", "_beside"):
                if f"same{name}" in record:  # tokens of each continuation before one differs
                    record[f"whole{name}"] = json.loads(record[f"same{name}"]).count(record["of"])
            found[record["benchmark"], record["case"]] = record
    return found


def table(name: str) -> str:
    """The named table in Markdown, and where its numbers are from."""
    heading, rows = TABLES[name]
    found = records()
    used = [found[row.benchmark, case] for row in rows for case in (*row.cases, *(row.peers or ()))]
    lines = [heading, "|---|---|---|"]
    for row in rows:
        cases, peers = ([found[row.benchmark, case] for case in some] for some in (row.cases, row.peers or row.cases))
        measured = " / ".join(row.measured.format(**case) for case in cases)
        templates = ((row.failed if "failed" in case else row.beside, case) for case in peers if row.beside)
        beside = " / ".join(template.format(**case) for template, case in templates)
        lines.append(f"| {row.label} | {measured} {row.unit} | {beside} |".replace("  |", " |"))
    sources = sorted({f"{record['device']}, {record['jax']}" for record in used})
    dates = sorted({record["date"] for record in used})
    lines += ["", f"{'; '.join(sources)}; measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."]
    return "\n".join(lines)


def rewritten(text: str) -> str:
    """`text` with every table between its markers made anew."""
    for name in TABLES:
        between = re.compile(rf"(<!-- table {name}[^\n]*-->\n).*?(\n<!-- end of table {name} -->)", re.DOTALL)
        text, count = between.subn(lambda match, name=name: match[1] + table(name) + match[2], text)
        if count != 1:
            raise ValueError(f"expected one pair of markers of table {name}, found {count}")
    return text


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
