"""Evaluation of scores: each number against its definition; and the order of methods on a model that is retrained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.dense import assert_close, matrix

import jaxgrad as jg
from benchmarks import retraining
from jaxgrad import attribution, curvature


def spearman(a, b):
    import scipy.stats

    return scipy.stats.spearmanr(a, b).statistic


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_score_is_the_rank_correlation_of_the_sums_for_each_test_example(dtype):
    rng = np.random.default_rng(0)
    scores, outputs = jnp.asarray(rng.normal(size=(3, 20)), dtype), jnp.asarray(rng.normal(size=(30, 3)), dtype)
    outputs = outputs.at[4].set(outputs[7])  # a tie
    subsets = attribution.random_subsets(jax.random.key(0), 30, 20)
    found = jax.jit(attribution.linear_datamodeling_score)(scores, subsets, outputs)
    sums = np.asarray(subsets, float) @ np.asarray(scores, float).T
    assert_close(found, [spearman(sums[:, c], outputs[:, c]) for c in range(3)], 1e-6)
    assert found.dtype == dtype


def test_a_perfect_linear_predictor_scores_one_also_where_one_example_is_left_out_of_many():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2000)), jnp.float32)
    left_out = np.arange(0, 2000, 40)
    subsets = attribution.leave_one_out_subsets(2000, left_out)
    assert_close(subsets.sum(1), np.full(50, 1999))
    assert_close(attribution.linear_datamodeling_score(scores, subsets, -scores[:, left_out].T), [1, 1], 1e-6)
    assert_close(attribution.leave_one_out_subsets(3), ~np.eye(3, dtype=bool))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.float16, jnp.bfloat16])
def test_leaving_one_out_is_the_correlation_with_the_changes_for_each_test_example(dtype):
    rng = np.random.default_rng(0)
    scores, outputs = jnp.asarray(rng.normal(size=(3, 20)), dtype), jnp.asarray(rng.normal(size=(12, 3)), dtype)
    left_out = rng.permutation(20)[:12]
    subsets = attribution.leave_one_out_subsets(20, left_out)
    found = jax.jit(attribution.leave_one_out_correlation)(scores, subsets, outputs)
    wide = np.asarray(scores, np.float64)[:, left_out], np.asarray(outputs, np.float64)
    assert_close(found, [np.corrcoef(wide[0][c], 0.7 - wide[1][:, c])[0, 1] for c in range(3)], 1e-5)
    assert found.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    each = lambda s, o: attribution.leave_one_out_correlation(s[None], subsets, o[:, None])  # noqa: E731
    assert_close(jax.vmap(each, (0, 1))(scores, outputs)[:, 0], found, 1e-6)


def test_changes_that_are_small_beside_the_outputs_keep_their_digits_and_no_square_leaves_the_range():
    rng = np.random.default_rng(0)
    scores, outputs = rng.normal(size=(2, 30)), 1000 + 1e-2 * rng.normal(size=(30, 2))
    scores, outputs = jnp.asarray(scores * 1e-30, jnp.float32), jnp.asarray(outputs, jnp.float32)
    subsets, wide = attribution.leave_one_out_subsets(30), (np.float64(scores), np.float64(outputs))
    expected = [np.corrcoef(wide[0][c], -wide[1][:, c])[0, 1] for c in range(2)]
    for unit in (1, 2.0**-100, 2.0**100):
        assert_close(attribution.leave_one_out_correlation(scores, subsets, outputs * unit), expected, 1e-5)


@pytest.mark.parametrize("score", [attribution.linear_datamodeling_score, attribution.leave_one_out_correlation])
def test_equal_or_unknown_outputs_have_no_score(score):
    subsets = attribution.random_subsets(jax.random.key(0), 9, 4)
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3))).at[:, 1].set(2.0).at[3, 2].set(jnp.nan)
    found = np.asarray(score(jnp.arange(12.0).reshape(3, 4), subsets, outputs))
    assert np.isnan(found).tolist() == [False, True, True]
    assert np.isnan(score(jnp.ones((2, 4)), subsets[:0], jnp.ones((0, 2)))).all()


def test_random_subsets_have_one_size_and_hold_every_example_equally_often():
    subsets = attribution.random_subsets(jax.random.key(0), 4000, 7, 0.4)
    assert set(subsets.sum(1).tolist()) == {3}
    assert_close(subsets.mean(0), np.full(7, 3 / 7), 0.06)
    assert not np.array_equal(subsets[0], subsets[1]) or not np.array_equal(subsets[0], subsets[2])


def test_the_area_counts_the_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, wrong = jnp.asarray(rng.integers(0, 5, 40), jnp.float64), jnp.asarray(rng.random(40) < 0.3)
    first, second = np.asarray(scores)[np.asarray(wrong)][:, None], np.asarray(scores)[~np.asarray(wrong)]
    pairs = ((first > second) + (first == second) / 2).mean()
    assert_close(jax.jit(attribution.mislabeled_auc)(scores, wrong), pairs)
    assert np.isnan(attribution.mislabeled_auc(scores, jnp.zeros(40, bool)))


@pytest.mark.usefixtures("plain_types")
def test_errors_name_the_call():
    subsets = attribution.random_subsets(jax.random.key(0), 9, 4)
    with pytest.raises(ValueError, match=r"^linear_datamodeling_score: expected scores \[C, B\]"):
        attribution.linear_datamodeling_score(jnp.ones((3, 4)), subsets, jnp.ones((3, 9)))
    with pytest.raises(ValueError, match=r"^leave_one_out_correlation: .*, got shapes \(3, 4\), \(9, 5\) and \(9, 3\)"):
        attribution.leave_one_out_correlation(jnp.ones((3, 4)), jnp.ones((9, 5), bool), jnp.ones((9, 3)))
    with pytest.raises(ValueError, match=r"^mislabeled_auc: expected scores \[B\] and wrong \[B\]"):
        attribution.mislabeled_auc(jnp.ones(3), jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"^random_subsets: expected a fraction between 0 and 1, got 1"):
        attribution.random_subsets(jax.random.key(0), 3, 4, 1)


# --- Methods against retraining --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.as_used
def test_exact_influence_predicts_retraining_best_then_trak_then_tracin():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        retrained = retraining.digits(train=200, test=40, subsets=96, steps=200, hidden=16)
        task, params, ratio = retrained.task, retrained.checkpoints[-1], 1e-3
        gradients = jax.jit(jg.per_example_grad(task.loss))
        test = gradients(params, *task.test)
        rows = jax.jit(curvature.gauss_newton(task.model, curvature.softmax))(params, *task.train)
        found = {
            "exact": jax.jit(attribution.influence)(rows, test, 3 * task.decay),
            "trak": attribution.trak(task.output, curvature.relative(ratio))([params], task.train, task.test),
            "tracin": attribution.tracin(task.loss)([params], [1.0], task.train, task.test),
        }
        dense = {
            name: [jax.vmap(jax.grad(f), (None, 0, 0))(params, *data) for data in (task.train, task.test)]
            for name, f in (("loss", task.loss), ("output", task.output))
        }
        outputs = jax.vmap(task.output, (None, 0, 0))(params, *task.train)
    (G, T), (F, S) = ([matrix(tree) for tree in dense[name]] for name in ("loss", "output"))
    ridge = ratio * (F**2).sum()
    learned = 1 / (1 + np.exp(np.asarray(outputs, np.float64)))
    reference = {"tracin": T @ G.T, "trak": S @ F.T @ np.linalg.inv(F @ F.T + ridge * np.eye(len(F))) * learned}
    score = {name: retrained.score(scores) for name, scores in found.items()}
    for name, scores in reference.items():
        assert abs(score[name] - retrained.score(jnp.asarray(scores, jnp.float32))) < 0.02
    assert score["exact"] > score["trak"] + 0.03
    assert score["trak"] > score["tracin"] + 0.1
    assert score["exact"] > 0.7
