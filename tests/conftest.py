"""Before any test imports jax: eight virtual CPU devices, and jaxtyping's checks on every dsparse function."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest

jaxtyping.install_import_hook("dsparse", "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """A process may hold 65530 maps of memory (vm.max_map_count), and each compiled program holds some: past that XLA
    ends in a segmentation fault."""
    yield
    import jax  # not before the settings above

    jax.clear_caches()
