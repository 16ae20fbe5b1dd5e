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


def pytest_terminal_summary(terminalreporter):
    """What the H100's kernels take, as `tests/kernels` found it."""
    lines = {
        (report.nodeid.removeprefix("tests/kernels/"), value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "kernel"
    }
    if lines:
        terminalreporter.section("kernels compiled for the H100")
        for test, value in sorted(lines):
            terminalreporter.write_line(f"{value}: {test}")
