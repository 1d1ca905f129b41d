"""Every test runs on 8 virtual CPU devices, set before JAX initialises its backend."""

import os
import pathlib
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs here run for microseconds and compile for seconds: compile them quickly.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Many tests compile the same tiny program: all workers of one run, children of one process, share
# a cache of them, and so do the programs that they start. What a kill cuts short there does not
# decompress and is compiled again.
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_RUN = os.getppid() if _IS_WORKER else os.getpid()
_CACHE = pathlib.Path(tempfile.gettempdir()) / f"repulsor_jax_tests_{_RUN}"
for _name, _value in {
    "jax_compilation_cache_dir": str(_CACHE),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)


def pytest_unconfigure() -> None:
    if not _IS_WORKER:
        shutil.rmtree(_CACHE, ignore_errors=True)


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
