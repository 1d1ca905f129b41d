"""Every test runs on 8 virtual CPU devices, set before JAX initialises its backend."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
# On busy cores the threads of NumPy's linear algebra, and of torch, wait for each other in loops:
# the eigenvalues of a matrix then take 100 times the processor time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs here run for microseconds and compile for seconds: compile them quickly. The older
# emitters of the CPU, which newer versions no longer have, start no MLIR pipeline for each kernel.
# (XLA ends at once where it does not know a flag.)
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_multi_thread_eigen=false"
    + (
        " --xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else ""
    ),
)

import fsspec
import jax
import pytest

from repulsor_jax import sharding
from tests.oracles import disks, fake_bucket, fixtures

pytest_plugins = ["tests.oracles.runs"]  # fixtures

jax.config.update("jax_num_cpu_devices", 8)

# Parameters here are tiny: on a mesh training splits them all the same.
sharding.MIN_SPLIT_SIZE = 64

# Traced programs are many objects that stay: looking through all of them for garbage is slow.
gc.set_threshold(500_000, 50, 100)

# Many tests compile the same tiny program: all workers of one run, children of one process, share
# a cache of them, and so do the programs that they start. What a kill cuts short there does not
# decompress and is compiled again.
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_RUN = os.getppid() if _IS_WORKER else os.getpid()
_CACHE = pathlib.Path(tempfile.gettempdir()) / f"repulsor_jax_tests_{_RUN}"
for _name, _value in {
    "jax_compilation_cache_dir": str(_CACHE),
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "tests/program/" not in item.nodeid)  # the longest start first


def pytest_unconfigure() -> None:
    gc.freeze()  # at exit Python would look through all of them again
    if not _IS_WORKER:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def reference_fixtures() -> pathlib.Path:
    """Folder of the large PyTorch reference values; the test skips where it is absent."""
    if not fixtures.FOLDER.is_dir():
        pytest.skip(
            f"no large reference fixtures in {fixtures.FOLDER}; those in tests/data still run"
        )
    return fixtures.FOLDER


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The digits, encoded once for all tests of this process."""
    from repulsor_jax import config, encode
    from tests.oracles import tiny

    workdir = tmp_path_factory.mktemp("digits")
    encode.encode(config.parse(tiny.digits_dict()), workdir)
    return workdir / "data"


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 3 MB of the test's own."""
    (tmp_path / "disk").mkdir()
    with disks.small_disk(tmp_path / "disk") as folder:
        if folder is None:
            pytest.skip("mounting a file system is not permitted here")
        yield folder


@pytest.fixture(scope="session")
def _bucket_server() -> Iterator[fake_bucket.Bucket]:
    from repulsor_jax.checkpoints import places

    with fake_bucket.serve() as bucket, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        patch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        places.bound_waiting()
        yield bucket


@pytest.fixture
def bucket(_bucket_server: fake_bucket.Bucket) -> Iterator[fake_bucket.Bucket]:
    """An empty bucket, `gs://bucket`, that fails when it is told to."""
    _bucket_server.objects.clear()
    _bucket_server.history.clear()
    yield _bucket_server
    _bucket_server.heal()
