"""What a model remembers of the checkpoint it came from, so that an export is faithful."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Origin:
    """Provenance of a loaded model. It takes no part in comparisons, so that it never causes a recompilation.

    path: the checkpoint's. files: small files beside the weights (tokenizer, generation config), by name.
    dtypes: stored dtypes of parameters that JAX holds in fewer bits, by layer and path.
    names: slots whose tensor had another name than the usual one. tied: names of copies of other tensors, and the
    slots they are copies of. kept: tensors kept aside, written back as they are.
    """

    path: str = dataclasses.field(default="", compare=False)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    names: dict[tuple, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    dtypes: dict[tuple[int, str], str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    tied: dict[str, tuple] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    kept: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)
