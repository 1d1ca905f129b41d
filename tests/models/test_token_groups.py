"""Groups of tokens at times of their own: their sizes, draws and times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import objectives
from repulsor_jax import config as config_lib
from repulsor_jax.flows import paths
from repulsor_jax.loss import draw_inputs
from repulsor_jax.models import token_groups
from repulsor_jax.models.token_groups import TokenGroups
from tests.oracles import fixtures, tiny


def test_counts_are_the_published_ones():
    path = fixtures.FOLDER / "sra_dts_as_visible.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with np.load(path) as values:
        cases = {name.split("/")[1] for name in values.files if name.startswith("groups/")}
        for case in cases:
            fractions, tokens, counts = (
                values[f"groups/{case}/{name}"].tolist() for name in ("ratios", "tokens", "counts")
            )
            assert token_groups.group_counts(fractions, tokens) == tuple(counts)


@pytest.mark.parametrize(
    ("fractions", "tokens", "expected"),
    [
        ((1.0,), 5, (5,)),
        ((0.5, 0.5), 5, (3, 2)),
        ((0.1, 0.9), 9, (1, 8)),  # 0.9 and 8.1: the larger remainder gets the one left over
        ((1 / 3, 1 / 3, 1 / 3), 256, (86, 85, 85)),
        ((0.29, 0.71), 100, (29, 71)),  # 28.999999999999996 in binary
    ],
)
def test_counts_follow_the_largest_remainder(fractions, tokens, expected):
    assert token_groups.group_counts(fractions, tokens) == expected


def test_groups_are_permutations_of_fixed_sizes_and_some_images_are_whole():
    spec = TokenGroups((4, 2, 10), 0.25, "sra")
    groups = np.asarray(token_groups.draw_groups(jax.random.key(0), 4_000, spec))
    is_whole = (groups == 0).all(axis=1)
    assert abs(is_whole.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4_000)
    split = groups[~is_whole]
    for group, count in enumerate(spec.counts):
        member = split == group
        assert (member.sum(axis=1) == count).all()
        # Each token is as often in it as any other.
        share, spread = count / 16, np.sqrt(count / 16 * (1 - count / 16) / len(split))
        np.testing.assert_allclose(member.mean(axis=0), share, atol=4.5 * spread)
    none = token_groups.draw_groups(jax.random.key(0), 4_000, spec._replace(whole_fraction=0.0))
    np.testing.assert_array_equal(np.asarray(none)[~is_whole], split)
    assert (np.asarray(none).max(axis=1) == 2).all()


def test_times_of_tokens_pixels_and_images_and_what_is_whole_has_one():
    groups = jnp.asarray([[0, 1, 1, 0], [0, 0, 0, 0]])
    t = token_groups.group_times(jnp.asarray([[0.25, 0.75], [0.5, 1.0]]), groups)
    np.testing.assert_array_equal(t, [[0.25, 0.75], [0.5, 0.5]])
    tokens = [[0.25, 0.75, 0.75, 0.25], [0.5] * 4]
    np.testing.assert_array_equal(token_groups.of_tokens(t, groups), tokens)
    np.testing.assert_array_equal(token_groups.mean_times(t, groups), [0.5, 0.5])
    pixels = np.kron([[0.25, 0.75], [0.75, 0.25]], np.ones((2, 2)))
    found = token_groups.pixel_times(t, groups, 4)
    np.testing.assert_array_equal(found, [pixels, np.full((4, 4), 0.5)])
    assert token_groups.pixel_times(t[:, 0], None, 4) is not None
    moved = t + 0.1
    for rule, expected in (("sra", moved), ("same", t), ("self_flow", [[0.75] * 2, [0.5] * 2])):
        found = token_groups.teacher_group_times(moved, t, rule)
        np.testing.assert_array_equal(found, expected)


def test_values_of_a_group_get_the_sum_of_its_tokens_gradients():
    groups = jnp.asarray([[0, 2, 1, 2]])
    weights = jnp.arange(8.0).reshape(1, 4, 2)
    gradient = jax.grad(lambda v: (token_groups.of_tokens(v, groups) * weights).sum())
    found = gradient(jnp.zeros((1, 3, 2)))
    np.testing.assert_array_equal(found, [[[0, 1], [4, 5], [2 + 6, 3 + 7]]])


@pytest.mark.parametrize("name", paths.PATHS)
@pytest.mark.parametrize("weighting", paths.WEIGHTINGS)
def test_a_map_of_times_is_each_pixel_at_its_time(name, weighting):
    rng, path = np.random.default_rng(0), paths.get_path(name)
    data, noise, output = rng.standard_normal((3, 2, 4, 4, 3)).astype(np.float32)
    t = jnp.asarray([0.2, 0.9])
    at = np.where(rng.random((2, 4, 4)) < 0.5, 0.2, 0.9).astype(np.float32)
    prediction = "velocity" if weighting == "none" else "noise"

    def each(t):
        losses = paths.flow_loss(
            path, prediction, *(x.reshape(-1, 1, 3) for x in (output, data, noise)), t, weighting
        )
        return losses.reshape(2, 4, 4)

    expected = each(jnp.asarray(at).reshape(-1)).mean(axis=(1, 2))
    found = paths.flow_loss(path, prediction, output, data, noise, at, weighting)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for function in (paths.interpolate, paths.target_velocity):
        by_time = [function(path, data, noise, jnp.full(2, time)) for time in t]
        expected = np.where((at == np.float32(0.2))[..., None], *by_time)
        np.testing.assert_allclose(function(path, data, noise, at), expected, atol=1e-6)


def inputs_of(**overrides):
    values = tiny.config_dict(model__depth=4)
    objectives.use(values, "repulsor_positives+dual_times")
    values.update_from_flattened_dict(overrides)
    objective = tiny.trainer(config_lib.parse(values)).objective
    (batch,) = tiny.batches(1)
    return jax.jit(lambda: draw_inputs(jax.random.key(1), batch, objective, tiny.FORMAT))()


def test_the_teachers_times_end_where_those_of_training_do():
    values = {"flow.path": "ddpm_linear", "flow.prediction": "noise", "model.time_steps": 1_000}
    values |= {"flow.time_groups": 1, "flow.group_fractions": (), "terms": "sra"}
    values |= {"model.attention_separation": False, "flow.teacher_times": "sra"}
    (shown,) = inputs_of(**values, **{"sra.time_gap": 1.0}).views.values()
    np.testing.assert_allclose(np.max(shown.t), 0.999, rtol=1e-6)


def test_a_step_draws_groups_their_times_and_the_teachers():
    inputs = inputs_of(**{"flow.whole_fraction": 0.5})
    groups = np.asarray(inputs.extras["groups"])
    assert groups.shape == (tiny.BATCH, 4)
    assert {*groups.sum(axis=1).tolist()} == {0, 3}  # one token and three, or whole
    is_whole = groups.sum(axis=1) == 0
    np.testing.assert_array_equal(inputs.t[:, 0] == inputs.t[:, 1], is_whole)
    mean = np.where(is_whole, inputs.t[:, 0], inputs.t @ np.array([0.25, 0.75]))
    np.testing.assert_allclose(inputs.tags.times, mean, rtol=1e-6)
    assert len(inputs.views) == 2  # SRA's teacher reads the true labels, that of the bank does not
    for times, noise, _ in inputs.views.values():
        gap = np.asarray(times - inputs.t)
        assert (gap >= 0).all()
        assert (gap <= 0.2).all()
        assert (times <= 1).all()
        np.testing.assert_array_equal(noise, inputs.noise)
        assert (np.ptp(gap[~is_whole], axis=1) > 0).all()  # each group by a draw of its own


def test_the_other_rules_of_the_teachers_times():
    inputs = inputs_of(**{"flow.teacher_times": "self_flow"})
    for times, _, _ in inputs.views.values():
        np.testing.assert_array_equal(times, np.max(inputs.t, axis=1, keepdims=True).repeat(2, 1))
    inputs = inputs_of(**{"flow.teacher_times": "same"})
    for times, _, _ in inputs.views.values():
        np.testing.assert_array_equal(times, inputs.t)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flow.group_fractions": (0.5, 0.5)}, r"group_fractions=\(0.5, 0.5\) has 2 fractions for"),
        (
            {"flow.time_groups": 2, "flow.group_fractions": (0.25, 0.5)},
            r"flow.group_fractions=\(0.25, 0.5\) sum to 0.75, expected 1",
        ),
        (
            {"flow.time_groups": 2, "flow.group_fractions": (0.1, 0.9)},
            r"split the tokens of an image into \(0, 4\): each group needs at least one",
        ),
        ({"flow.time_groups": 5}, r"into \(1, 1, 1, 1, 0\): each group needs"),
        ({"flow.time_groups": 9}, "flow.time_groups: expected .*, found 9"),
        ({"flow.whole_fraction": 0.5}, "flow.whole_fraction=0.5 has no meaning for one group"),
        ({"flow.teacher_times": "same"}, "flow.teacher_times='same' has no meaning for one group"),
        (
            {"model.attention_separation": True},
            "model.attention_separation=True has no meaning for one group of tokens: set "
            "config.flow.time_groups=2",
        ),
    ],
    ids=str,
)
def test_groups_that_contradict_themselves_are_refused(changes, message):
    values = tiny.config_dict()
    values.update_from_flattened_dict(changes)
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.parse(values)
