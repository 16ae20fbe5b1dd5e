"""Says what ptxas found of every kernel that a test compiled."""

import h100
import pytest


@pytest.fixture(autouse=True)
def tell_resources(record_property):
    h100.found.clear()
    yield
    for kernel in h100.found:
        record_property("kernel", f"{kernel.registers} registers, {kernel.spill_bytes} bytes spilled")
