"""Every test runs on 8 virtual CPU devices, set before JAX initialises its backend."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs here run for microseconds and compile for seconds: compile them quickly.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def reference_fixtures() -> pathlib.Path:
    """Folder of the large PyTorch reference values; the test skips where it is absent."""
    folder = SHARED / "fixtures"
    if not folder.is_dir():
        pytest.skip(
            f"the large reference fixtures are not in {folder}; those in tests/data still run"
        )
    return folder
