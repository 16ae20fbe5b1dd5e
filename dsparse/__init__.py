"""dsparse: DeepSeek-family sparse transformers in JAX.

Axis legend, used in names, annotations and einsums throughout:
B batch, T query time, S key time, N heads, H head dim, D model, F hidden, E experts, K selected, V vocab
(and V value dim, C latent dim, R rotary dim where attention needs them).
"""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "kernels").exists():  # a checkout: kernels/ and checkpoints/ stand beside this folder
    __path__.append(str(_Path(__file__).parent.parent))

from dsparse.config import ModelConfig
from dsparse.errors import DsparseError
from dsparse.generation import generate
from dsparse.model import Model
from dsparse.pretrained import from_pretrained, save_pretrained

__version__ = "0.1.0"
__all__ = ["DsparseError", "Model", "ModelConfig", "from_pretrained", "generate", "save_pretrained"]
