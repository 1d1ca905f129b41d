"""Alignment with stored features: the file, its rows in the batches, and the term."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import blockwise, imagenet256
from repulsor_jax import config as config_lib
from repulsor_jax.data.features import check_rows
from repulsor_jax.data.pipeline import training_iterator
from repulsor_jax.experiment import prepare
from repulsor_jax.method import registry
from tests.oracles import latent_sets, tiny

SMALL = {
    "terms": "feature_alignment",
    "feature_alignment__dim": 6,
    "feature_alignment__head_size": 8,
}


def config(path, **options):
    return tiny.config(**SMALL | {"data__features": str(path)} | options)


def store(path, shape=(48, 4, 6), dtype=np.float16):
    np.save(path, np.random.default_rng(1).standard_normal(shape).astype(dtype))
    return path


def test_a_row_follows_its_image(tmp_path):
    numbers = np.broadcast_to(np.arange(22)[:, None, None], (22, 4, 6))
    np.save(tmp_path / "f.npy", numbers.astype(np.float32))
    latents = np.broadcast_to(numbers[:, None, :2, :2, None], (22, 1, 2, 2, 3))
    dataset = latent_sets.write(tmp_path / "d", latents, np.arange(22) % 7, 8)
    features = config_lib.stored_features(config(tmp_path / "f.npy"))
    assert isinstance(features, np.memmap)
    check_rows(features, "f.npy", dataset)
    rows = np.array([1, 4, 5, 6])
    feed = training_iterator(dataset, global_batch_size=8, seed=3, rows=rows, features=features)
    for batch in (next(feed) for _ in range(6)):  # over two epochs
        assert batch["features"].shape == (4, 4, 6)
        assert batch["features"].dtype == np.float32
        np.testing.assert_array_equal(batch["features"][:, 0, 0], batch["ids"])
        np.testing.assert_array_equal(batch["latents"][:, 0, 0, 0], batch["ids"])


def test_the_loss_is_minus_the_cosine_after_the_head(tmp_path):
    c = config(store(tmp_path / "f.npy"), model__depth=6)
    step = tiny.build(c, tiny.mesh())
    (term,) = registry.build(c)
    assert (term.taps, float(term.weight(jnp.int32(0)))) == ((1,), pytest.approx(0.05))
    params = jax.device_get(step.state.params)
    (batch,) = tiny.batches(1)
    features = np.load(tmp_path / "f.npy")[batch["ids"]]
    _, (metrics,) = step.run([batch | {"features": features}])

    # At the start the blocks are the identity, so that tokens follow from the patches alone; of
    # the head alone a NumPy reading is compared.
    head = params["terms"]["feature_alignment"]
    tokens = np.random.default_rng(0).standard_normal((16, 4, 32)).astype(np.float32)
    h = tokens
    for name in ("hidden", "hidden_1"):
        h = h @ head[name]["kernel"] + head[name]["bias"]
        h = h / (1 + np.exp(-h))
    found = h @ head["out"]["kernel"] + head["out"]["bias"]
    expected = -np.mean(
        (found * features).sum(-1)
        / np.linalg.norm(found, axis=-1)
        / np.linalg.norm(features.astype(np.float32), axis=-1)
    )
    seen = registry.Seen(None, None, None, None, {1: tokens}, {}, None, features)
    np.testing.assert_allclose(term.loss(head, None, seen, None)[0], expected, rtol=1e-5)
    total = metrics["flow_loss"] + 0.05 * metrics["feature_alignment_loss"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-6)
    assert metrics["feature_alignment_loss"] != 0


@pytest.mark.parametrize(
    ("get_config", "variant", "expected"),
    [
        (imagenet256.get_config, "xl_2,feature_alignment", 8),  # 28 // 3, counted from 1
        (imagenet256.get_config, "b_2,feature_alignment", 3),
        (blockwise.get_config, "xl_2,feature_alignment", 19),
    ],
)
def test_the_tap_follows_the_network(get_config, variant, expected):
    values = get_config(variant)
    values.data.features = "features.npy"
    c = config_lib.parse(values)
    assert registry.feature_alignment_block(c) == expected
    (term,) = registry.build(c)
    shapes = jax.eval_shape(term.init, jax.random.key(0))
    assert shapes["hidden_1"]["kernel"].value.shape == (2048, 2048)
    assert shapes["out"]["kernel"].value.shape == (2048, 768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__features": ""}, "config.data.features='' names no file"),
        ({"data__flips": True}, "config.data.flips=True stores mirror images"),
        ({"feature_alignment__block": 1}, "feature_alignment.block=1 is past the last block, 0"),
    ],
    ids=str,
)
def test_contradictions_are_refused(changes, message):
    assert config_lib.stored_features(tiny.config(**SMALL | {"terms": "none"})) is None
    with pytest.raises(config_lib.ConfigError, match=message):
        config("f.npy", **changes)


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npy': no such file; expected an \.npy of"):
        config_lib.stored_features(config(tmp_path / "none.npy"))
    (tmp_path / "text.npy").write_text("version https://git-lfs.github.com/spec/v1")
    np.savez(tmp_path / "several.npy.npz", np.zeros(3))
    (tmp_path / "several.npy.npz").rename(tmp_path / "several.npy")
    for name, message in (
        ("text.npy", r"text\.npy': expected an \.npy of \[images, 4, 6\]"),
        ("several.npy", "found several arrays"),
        (store(tmp_path / "wide.npy", dtype=np.float64).name, "found float64"),
        (store(tmp_path / "few.npy", (48, 4, 5)).name, r"found the shape \[48, 4, 5\]"),
        (store(tmp_path / "flat.npy", (48, 24)).name, r"found the shape \[48, 24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.stored_features(config(tmp_path / name))


def test_training_checks_the_rows(tmp_path, data_dir):
    store(tmp_path / "f.npy", (48, 16, 6))
    values = tiny.digits_dict(
        data_dir,
        **SMALL,
        data__features=str(tmp_path / "f.npy"),
    )
    with pytest.raises(ValueError, match="found 48 rows, expected one for each of the 1,300"):
        prepare(config_lib.parse(values), tmp_path)
    latents, labels = latent_sets.random_latents(views=2)
    flipped = latent_sets.write(tmp_path / "d", latents, labels, flipped=True)
    with pytest.raises(ValueError, match="holds mirror images too"):
        check_rows(np.zeros((23, 4, 6)), "f.npy", flipped)
