"""The `dsparse` command. Every subcommand prints one clear line and exits with status 1 on bad input."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsparse import dispatch
from dsparse.errors import DsparseError, one_line


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    argv = list(sys.argv[1:] if argv is None else argv)
    # A run of hours says at once what serves it; elsewhere it would stand in the middle of the text.
    logging.getLogger("dsparse.ops").setLevel(logging.INFO if argv[:1] == ["train"] else logging.WARNING)
    # What a checkpoint holds beside the model matters to those who convert it, not before every answer.
    logging.getLogger("dsparse.checkpoints").setLevel(logging.INFO if argv[:1] == ["convert"] else logging.WARNING)
    if argv[:1] == ["train"]:  # has a parser of its own, one option for each field of its config
        from dsparse.training import main as train

        return train(argv[1:]) or 0
    arguments = build_parser().parse_args(argv)
    try:
        status = arguments.run(arguments) or 0
        if dispatch.served:
            print(f"served by: {dispatch.summary()}", file=sys.stderr)
        return status
    except (DsparseError, OSError) as error:
        print(f"dsparse {arguments.command}: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"dsparse {arguments.command}: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsparse", description="DeepSeek-family sparse transformers in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="convert between Hugging Face and dsparse checkpoints")
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("destination", metavar="DST")
    convert.add_argument("--format", choices=("huggingface", "dsparse"), help="of DST (default: the one SRC is not in)")
    convert.add_argument("--dtype", help="cast weights: float32, bfloat16 or float16 (default: as stored)")
    convert.add_argument("--quantization", help="quantize weights")
    convert.add_argument("--allow-pickle", action="store_true", help="read legacy .bin files, which can run code")
    convert.add_argument("--force", action="store_true", help="replace DST if it exists")
    convert.set_defaults(run=run_convert)

    inspect = commands.add_parser("inspect", help="print what a checkpoint is made of")
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--text", help="show which of its tokens each layer selects")
    inspect.add_argument("--heat-map", metavar="PNG", help="draw what each layer selects in --text")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=run_inspect)

    generate = commands.add_parser("generate", help="continue a prompt")
    _add_model(generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=32)
    generate.add_argument("--temperature", type=float, default=0.0, help="0: most likely token (default)")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--min-p", type=float)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--speculative", choices=("mtp",), help="let the prediction layers draft; says how often right"
    )
    generate.set_defaults(run=run_generate)

    evaluate = commands.add_parser("eval", help="perplexity on a .txt, .jsonl or .npy file")
    _add_model(evaluate)
    evaluate.add_argument("--data", required=True, metavar="FILE")
    evaluate.add_argument("--context-length", type=int, help="tokens a window (default: 1024, or all the model takes)")
    evaluate.add_argument("--batch-size", type=int, default=4, help="windows at once (default: 4)")
    evaluate.set_defaults(run=run_eval)

    commands.add_parser("train", help="fine-tune (the same as train.py; see `dsparse train --help`)")
    bench = commands.add_parser("bench", help="time generation, prefill and a training step on this machine")
    _add_model(bench)
    bench.set_defaults(run=run_bench)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="Hugging Face folder or dsparse checkpoint")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--mesh", help="devices to shard over, such as data=2,tensor=4")
    parser.add_argument("--allow-pickle", action="store_true", help="read legacy .bin files, which can run code")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _load(arguments: argparse.Namespace):
    from dsparse.pretrained import from_pretrained

    return from_pretrained(
        arguments.path, dtype=arguments.dtype, mesh=arguments.mesh, allow_pickle=arguments.allow_pickle
    )


def run_convert(arguments: argparse.Namespace) -> None:
    from dsparse.checkpoints.convert import convert

    with _terminated_as_interrupted():
        report = convert(
            arguments.source, arguments.destination, format=arguments.format, dtype=arguments.dtype,
            quantization=arguments.quantization, allow_pickle=arguments.allow_pickle, force=arguments.force,
        )  # fmt: skip
    print(report)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as schedulers send it, ends the work like an interruption from the keyboard: with its explanation."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_inspect(arguments: argparse.Namespace) -> None:
    from dsparse.inspect import inspect_checkpoint

    report = inspect_checkpoint(Path(arguments.path), arguments.text, heat_map=arguments.heat_map)
    print(json.dumps(dataclasses.asdict(report), indent=2) if arguments.json else report)


def run_generate(arguments: argparse.Namespace) -> None:
    import numpy as np

    from dsparse.checkpoints.sources import check_folder
    from dsparse.generation import generate
    from dsparse.tokenizer import Tokenizer

    check_folder(Path(arguments.path))
    tokenizer = Tokenizer(arguments.path)
    ids = tokenizer.encode(arguments.prompt)
    if not ids:
        raise DsparseError("--prompt is empty: give at least one token of text")
    model = _load(arguments)
    if len(ids) > (limit := model.config.max_position_embeddings):
        raise DsparseError(f"--prompt has {len(ids)} tokens, more than the model's max_position_embeddings ({limit})")
    stream = None if arguments.json else _Stream(tokenizer, set(model.config.eos_token_id), arguments.prompt)
    acceptance = []
    new = generate(
        model, np.asarray([ids]), max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
        top_k=arguments.top_k, top_p=arguments.top_p, min_p=arguments.min_p, seed=arguments.seed, on_token=stream,
        speculative=arguments.speculative, on_acceptance=acceptance.append,
    )[0].tolist()  # fmt: skip
    if stream:
        print()
    else:
        text = tokenizer.decode(until_stop(new, model.config.eos_token_id))
        drafts = {name: value for found in acceptance for name, value in found._asdict().items()}
        print(json.dumps({"prompt": arguments.prompt, "text": text, "tokens": new} | drafts))


def until_stop(tokens: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return list(tokens[:end])


class _Stream:
    """Prints the prompt and text as its tokens come; characters spread over several tokens wait for the last of them."""

    def __init__(self, tokenizer, stop: set[int], prompt: str):
        self.tokenizer, self.stop, self.prompt, self.ids, self.printed = tokenizer, stop, prompt, [], 0

    def __call__(self, tokens, finished) -> None:
        print(self.prompt, end="", flush=True)
        self.prompt = ""
        if int(tokens[0]) in self.stop:
            return
        self.ids.append(int(tokens[0]))
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)


def run_eval(arguments: argparse.Namespace) -> None:
    from dsparse.evaluate import evaluate, read_tokens

    model = _load(arguments)
    tokens = read_tokens(arguments.data, arguments.path, model.config)
    limit = model.config.max_position_embeddings
    if (length := min(1024, limit) if arguments.context_length is None else arguments.context_length) > limit:
        raise DsparseError(f"--context-length {length} exceeds the model's max_position_embeddings ({limit})")
    result = evaluate(
        model,
        tokens,
        context_length=length,
        batch_size=arguments.batch_size,
        progress=not arguments.json,
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(
            f"perplexity {result.perplexity:.4f}  loss {result.loss:.4f} nats  {result.tokens} tokens  "
            f"context {result.context_length}  {result.tokens_per_second:.0f} tokens/s"
        )


def run_bench(arguments: argparse.Namespace) -> None:
    from dsparse.bench import bench

    result = bench(_load(arguments))
    print(
        json.dumps(result)
        if arguments.json
        else "\n".join(f"{name:28s} {value:12.2f}" for name, value in result.items())
    )


if __name__ == "__main__":
    sys.exit(main())
