"""What tests share: the trained checkpoints, real text, and the same model in transformers."""

import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo" / "checkpoint"
TRAINED = Path(os.environ.get("DSPARSE_TEST_CHECKPOINTS", ROOT.parent / "shared" / "checkpoints"))


def trained_checkpoint(name: str) -> Path:
    """Folder of a trained checkpoint: the bundled `demo`, or a larger one where the machine has it."""
    folder = DEMO if name == "demo" else TRAINED / name
    if not folder.is_dir():
        pytest.skip(f"no trained checkpoint {name!r} (set DSPARSE_TEST_CHECKPOINTS to the folder that holds it)")
    return folder


def sample_text_tokens(folder: Path, rows: int, length: int) -> np.ndarray:
    """Real text in the tokenizer of `folder`: int32 [rows, length] from the demo's text."""
    import tokenizers

    text = (ROOT / "examples" / "demo" / "text.txt").read_text(encoding="utf-8")
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert len(ids) >= rows * length, "the demo text is too short for this test"
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


def load_transformers(folder: Path, **options):
    """The same checkpoint in transformers, float32, in evaluation mode."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
