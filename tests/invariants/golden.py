"""What the program computed when it was last changed on purpose: `tests/data/golden`.

    python -m tests.invariants.golden

writes it anew. Whoever does so on purpose says so in the commit.

- `golden.json`: 20 losses of digits in float32 on one device, 4 samples of the result, names and
  shapes of the checkpoint's arrays; the losses of a small run up to step 6.
- `data/`, `checkpoints/`: the latents of that small run, and its checkpoint of step 3.
"""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import jaxlib
import numpy as np
from PIL import Image

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "data" / "golden"
REPOSITORY = FOLDER.parents[2]
NUM_LOSSES, NUM_SAMPLES = 20, 4
SAVED, LAST = 3, 6  # steps of the small run

_NO_PICTURES = [
    "--config.sampling.grid_every_steps=0",
    "--config.evaluation.every_steps=0",
    "--config.log.diagnostics_every_steps=0",
]
DIGITS = [
    "--config=configs/digits.py",
    f"--config.total_steps={NUM_LOSSES}",
    "--config.log.every_steps=1",
    "--config.sampling.batch_size=4",
    f"--config.sampling.num_samples={NUM_SAMPLES}",
    *_NO_PICTURES,
]
SMALL = [
    "--config=configs/digits.py",
    "--config.batch_size=8",
    "--config.model.in_channels=3",
    "--config.model.hidden_size=16",
    "--config.model.depth=2",
    "--config.model.num_heads=2",
    "--config.model.num_classes=3",
    "--config.repulsor.bank_rows=32",
    "--config.repulsor.projection_dim=8",
    "--config.log.every_steps=1",
    f"--config.checkpoint.every_steps={SAVED}",
    "--config.data.encode_if_missing=False",
    *_NO_PICTURES,
]


def run(workdir: pathlib.Path, *flags: str) -> None:
    """Runs the program as a user does, on one device and one thread for each operation."""
    env = {n: v for n, v in os.environ.items() if not n.startswith("JAX_") or "CACHE" in n}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-m", "repulsor_jax.main", f"--workdir={workdir}", *flags]
    done = subprocess.run(
        command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def losses(workdir: pathlib.Path) -> list[float]:
    """The loss of every step; float32 numbers, exactly."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def samples(workdir: pathlib.Path) -> np.ndarray:
    """The images that --mode=sample wrote, uint8 `[N, H, W, C]`."""
    (path,) = workdir.glob("samples/*.npz")
    with np.load(path) as file:
        return file["arr_0"]


def digests(images: np.ndarray) -> list[str]:
    """SHA-256 of each image."""
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


def arrays(workdir: pathlib.Path, step: int) -> dict[str, list[int]]:
    """Shape of every array of a checkpoint, by name."""
    manifest = json.loads((workdir / f"checkpoints/{step}/manifest/metadata").read_text())
    return {name: each["shape"] for name, each in manifest["arrays"].items()}


def machine() -> dict[str, str]:
    """What the last bits of a float32 sum depend on: the compiler, and the processor's features."""
    features = ""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")]
        features = hashlib.sha256("".join(found[:1]).encode()).hexdigest()
    return {"jaxlib": jaxlib.__version__, "processor": features}


def digits(workdir: pathlib.Path) -> dict[str, Any]:
    """Trains and samples; returns what `golden.json` says of it."""
    run(workdir, *DIGITS)
    run(workdir, *DIGITS, "--mode=sample")
    images = samples(workdir)
    return {
        "losses": losses(workdir),
        "digests": digests(images),
        "samples": images.tolist(),
        "arrays": arrays(workdir, NUM_LOSSES),
    }


def _write_images(folder: pathlib.Path) -> None:
    """Three classes of 8 x 8 colours that vary smoothly."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1) / 7
    for split, count in {"train": 32, "test": 8}.items():
        for number in range(count):
            name = f"{split}/class_{number % 3}/{number:02d}.png"
            slope = rng.normal(size=(2, 3)) + number % 3
            picture = 127 + 60 * np.sin(grid @ slope)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.astype(np.uint8)).save(path)


def main() -> None:
    """Writes `tests/data/golden` anew."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        found = {"machine": machine(), "digits": digits(folder / "digits")}
        _write_images(folder / "images")
        images = ["--config.data.source=folder", f"--config.data.source_path={folder / 'images'}"]
        run(folder / "small", *SMALL, *images, "--mode=encode", "--config.data.preview_images=0")
        shutil.copytree(folder / "small" / "data", FOLDER / "data")
        run(folder / "small", *SMALL, f"--config.total_steps={SAVED}")
        shutil.copytree(folder / "small" / "checkpoints", FOLDER / "checkpoints")
        for marker in FOLDER.rglob("commit_success.txt"):  # which names a temporary folder
            marker.write_text("Checkpoint commit was successful\n")
        run(folder / "small", *SMALL, f"--config.total_steps={LAST}")
        found["small"] = {"losses": losses(folder / "small")}
    (FOLDER / "golden.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
