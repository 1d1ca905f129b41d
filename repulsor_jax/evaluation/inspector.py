"""What training shows of its terms on the way: their diagnostics, as curves and as warnings."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.data.latents import LatentDataset
from repulsor_jax.data.pipeline import read_records
from repulsor_jax.diagnose import HeldOut, make_measure, written_slots
from repulsor_jax.experiment import Experiment, make_trainer, open_held_out
from repulsor_jax.loss import Batch
from repulsor_jax.method.memory_bank import MemoryBank
from repulsor_jax.method.term import Term
from repulsor_jax.runtime.diagnostics_plot import PREFIX, draw_diagnostics
from repulsor_jax.runtime.metrics import JSONL_NAME, MetricWriter, read_jsonl
from repulsor_jax.train_state import TrainState, unsplit_shardings

# Of the held-out images, for the linear probe: records whose labels are read, images, classes.
# Several classes of a few images each say less than some classes of many.
MOST_LABELS, MOST_PROBED, MOST_CLASSES = 16_384, 1_024, 64

ALIKE = 0.99  # mean cosine from which on rows, samples or tokens are all alike
NO_GRADIENT = 1e-5  # share in the gradient below which a term does nothing


@dataclasses.dataclass
class Inspector:
    """Measures the state, writes the numbers, draws them, and warns once of each thing."""

    experiment: Experiment
    dataset: LatentDataset
    terms: tuple[Term, ...]
    measure: Callable[..., Mapping[str, jax.Array]]  # `diagnose.make_measure`, jitted
    held_out: HeldOut | None

    def __post_init__(self) -> None:
        self._source = self.dataset.open()
        everywhere = sharding.replicated(self.experiment.mesh)
        self._oldest_ids = jax.jit(self._read_oldest_ids, out_shardings=everywhere)
        self._before: Mapping[str, float] = {}
        self._warned: set[str] = set()

    def look(self, step: int, state: TrainState, batch: Batch, writer: MetricWriter) -> None:
        """Measures after a step, of which this was the batch; every process takes part."""
        mesh, workdir = self.experiment.mesh, self.experiment.workdir
        oldest = None if state.bank is None else self._oldest_images(state.bank)
        with sharding.use_mesh(mesh):
            measured = jax.device_get(self.measure(state, batch, oldest, self.held_out))
        values = {name: float(value) for name, value in measured.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        rows = 0 if state.bank is None else math.prod(state.bank.features.shape[:2])
        found = find_warnings(self.terms, step, values, self._before, rows)
        self._before = values
        if jax.process_index() != 0:
            return
        writer.scalars(step, {PREFIX + name: value for name, value in values.items()})
        writer.flush()
        for name in found.keys() - self._warned:
            tqdm.write(f"step {step}: warning: {found[name]}")
        self._warned |= found.keys()
        try:
            draw_diagnostics(read_jsonl(workdir / JSONL_NAME), workdir / "diagnostics.png")
        except OSError as error:  # no reason to end the run
            tqdm.write(f"step {step}: no picture of the diagnostics: {error}")

    def _oldest_images(self, bank: MemoryBank) -> Batch:
        """The images whose rows are in the oldest written slot, row by row, read again.

        A row does not say whether it is of the image or its mirror image: the image is read.
        """
        mesh, dataset = self.experiment.mesh, self.dataset
        ids = jax.device_get(self._oldest_ids(bank))
        own = ids[sharding.local_row_numbers(mesh, len(ids))]
        # A row of no image, or of one that is not in this data set, gets another image, whose
        # number is not the row's: it does not count.
        images = np.where((own >= 0) & (own < dataset.num_images), own, 0)
        return sharding.to_global(read_records(dataset, self._source, images * dataset.views), mesh)

    def _read_oldest_ids(self, bank: MemoryBank) -> jax.Array:
        ids = bank.tags.ids[written_slots(bank)[1]]
        return ids[:: len(ids) // self.experiment.config.batch_size]


def find_warnings(
    terms: tuple[Term, ...],
    step: int,
    values: Mapping[str, float],
    before: Mapping[str, float],
    bank_rows: int,
) -> dict[str, str]:
    """What is wrong with a run: a name of each fault, and a line that says what to do.

    Args:
      terms: of the objective.
      step: after which was measured.
      values: of `diagnose.make_measure`.
      before: those of the look before; empty at the first. Rows are called alike where they were
        alike before too: those of a network that has just begun are.
      bank_rows: that the bank has room for.
    """
    found = {}

    def alike(key: str) -> str:
        """The mean cosine in words, or "" where it is not above the limit at both looks."""
        cosine = min(values.get(key, 0.0), before.get(key, 0.0))
        return f"all alike (mean cosine {values[key]:.4f})" if cosine > ALIKE else ""

    for term in terms:
        name, weight = term.name, f"config.{term.name}.weight"
        filled, filled_before = (v.get(f"{name}/filled", math.nan) for v in (values, before))
        if filled == filled_before < bank_rows and step > term.bank_start_step:
            found[f"{name}/filled"] = (
                f"{name}: its bank does not fill: {filled:,.0f} of {bank_rows:,} rows, as many as "
                "at the look before. Nothing is put into it; events.jsonl has the steps refused"
            )
        if said := alike(f"{name}/cosine_bank"):
            found[f"{name}/bank"] = (
                f"{name}: the rows of its bank are {said}: negatives that equal the sample teach "
                f"nothing. Raise {weight}, or lower config.{name}.temperature"
            )
        if said := alike(f"{name}/cosine_samples"):
            found[f"{name}/samples"] = (
                f"{name}: its projections of different images are {said}: they have collapsed. "
                f"With negatives, raise {weight} or lower config.{name}.temperature; without, set "
                f"config.{name}.negatives='all' or predictor=True"
            )
        for tap in term.taps:
            if said := alike(f"block_{tap}/cosine_tokens"):
                found[f"{name}/tokens"] = (
                    f"{name}: the tokens of block {tap}, which it reads, are {said}: they have "
                    f"collapsed. Lower {weight}"
                )
        share = values.get(f"{name}/gradient_share", math.nan)
        if share < NO_GRADIENT and float(term.weight(jnp.int32(step))) > 0:
            found[f"{name}/gradient"] = (
                f"{name}: its gradient is zero beside that of the flow loss (share {share:.1e}): "
                f"it does nothing. Raise {weight}, or leave it out of config.terms"
            )
    return found


def make_inspector(experiment: Experiment, dataset: LatentDataset) -> Inspector:
    """Builds the inspector of a run, and reads the held-out images that its probe needs.

    Raises:
      DamagedDataError, ValueError, OSError: the held-out images cannot be read.
    """
    config, mesh = experiment.config, experiment.mesh
    trainer = make_trainer(config, mesh)
    held_out, num_probed = None, 0
    if test_set := open_held_out(config, experiment.workdir):
        padded_to = config.batch_size // config.optimizer.accumulation_steps
        images, num_probed = read_held_out(test_set, test_set.open(), padded_to)
        if num_probed > 1:
            own = sharding.local_row_numbers(mesh, len(images.labels))
            held_out = sharding.to_global(jax.tree.map(lambda x: x[own], images), mesh)
    measure_whole = make_measure(trainer, experiment.latent_format, dataset.num_images, num_probed)
    unsplit = unsplit_shardings(trainer, mesh)

    def measure(state: TrainState, *batches: Any) -> dict[str, jax.Array]:
        model, average = jax.lax.with_sharding_constraint(
            (state.params["model"], state.ema_params),
            (unsplit.params["model"], unsplit.ema_params),
        )
        whole = state.replace(params=state.params | {"model": model}, ema_params=average)
        return measure_whole(whole, *batches)

    return Inspector(
        experiment,
        dataset,
        trainer.objective.terms,
        jax.jit(measure, out_shardings=sharding.replicated(mesh)),
        held_out,
    )


def read_held_out(
    dataset: LatentDataset, source: grain.sources.ArrayRecordDataSource, multiple: int
) -> tuple[HeldOut, int]:
    """Chooses images for the probe: as many of each class, every other one to fit and to test.

    Args:
      dataset: of images that are not trained on.
      source: `dataset.open()`.
      multiple: the number of rows is padded to a multiple of this.

    Returns:
      A `HeldOut` of NumPy arrays, and the number of classes.
    """
    count = min(dataset.num_images, MOST_LABELS)
    records = np.linspace(0, dataset.num_images - 1, count).astype(int) * dataset.views
    chunks = np.split(records, range(MOST_PROBED, count, MOST_PROBED))
    labels = np.concatenate([read_records(dataset, source, part)["labels"] for part in chunks])
    classes, counts = np.unique(labels, return_counts=True)
    classes = classes[np.argsort(-counts, kind="stable")][:MOST_CLASSES]
    members = [np.flatnonzero(labels == k)[: MOST_PROBED // len(classes)] for k in classes]
    rows, places = np.concatenate(members), np.concatenate([np.arange(len(m)) for m in members])
    padding = -len(rows) % multiple

    def padded(x: np.ndarray) -> Any:
        return np.pad(x, [(0, padding), *[(0, 0)] * (x.ndim - 1)])

    latents = read_records(dataset, source, records[rows])["latents"]
    numbers = np.repeat(np.arange(len(classes), dtype=np.int32), [len(m) for m in members])
    parts = latents, numbers, places % 2 == 0, places % 2 == 1
    return HeldOut(*map(padded, parts)), len(classes)
