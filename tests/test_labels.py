import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrad.network import signs

pytestmark = pytest.mark.usefixtures("plain_types")


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 1, 0],
        [-1, 1, 1, -1],
        [False, True, True, False],
        ["benign", "malignant", "malignant", "benign"],
        [3.5, 7.0, 7.0, 3.5],
        np.array(["a", "b", "b", "a"], dtype=object),
        np.array([0, 1, 1, 0], dtype=ml_dtypes.bfloat16),
        np.array([0, 1, 1, 0], dtype=np.uint8),
        [0, 1.0, np.float32(1), np.int8(0)],
        np.array(["2020", "2021", "2021", "2020"], "M8[Y]"),
    ],
)
def test_two_classes_become_minus_one_and_one(labels):
    for given_labels in (labels, np.asarray(labels)):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
            found = signs(given_labels, dtype)
            assert isinstance(found, jax.Array)
            assert found.dtype == dtype
            assert found.tolist() == [-1, 1, 1, -1]


def test_jax_arrays_and_any_shape():
    assert signs(jnp.array([[0, 1], [1, 0]])).tolist() == [[-1, 1], [1, -1]]


def test_booleans_have_two_classes_whatever_the_batch_holds():
    assert signs([True, True]).tolist() == [1, 1]
    assert signs(np.zeros(2, bool)).tolist() == [-1, -1]


def test_classes_can_be_named_for_a_batch_that_holds_one():
    assert signs([1, 1], classes=(0, 1)).tolist() == [1, 1]
    assert signs([1, 1], classes=(1, 2)).tolist() == [-1, -1]
    assert signs(["no"], classes=("yes", "no")).tolist() == [1]
    assert signs([], classes=(0, 1)).shape == (0,)
    assert signs(1, classes=(0, 1)).tolist() == 1
    assert signs("no", classes=("yes", "no")).tolist() == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1, 1], "expected two classes, got 1: 1"),
        ([], "expected two classes, got 0: none"),
        (["a", "b", "c"], "expected two classes, got 3: 'a', 'b', 'c'"),
        (range(9), r"got 9: 0, 1, 2, 3, 4, …"),
        ([0.0, 1.0, np.nan], "got 1 NaN"),
        (np.array([1, "a"], dtype=object), r"expected labels of one kind, got 1 \(int\), 'a' \(str\)"),
        (np.array([None, "a", "b"], dtype=object), r"labels of one kind, got None \(NoneType\), 'a' \(str\)"),
        (["a", 1], r"expected labels of one kind, got 'a' \(str\), 1 \(int\)"),
        ([True, 0], r"expected labels of one kind, got True \(bool\), 0 \(int\)"),
        (["a", np.nan], r"expected labels of one kind, got 'a' \(str\), nan \(float\)"),
        (np.array(["2020", "NaT"], "M8[Y]"), "got 1 NaT"),
        (np.array([1, "NaT"], "m8[s]"), "got 1 NaT"),
        (np.array([0, 1, np.nan], complex), "got 1 NaN"),
        ([[1], [1, 2]], "expected rows of labels of one length"),
        ([np.ones(2), np.ones((2, 3))], "expected rows of labels of one length"),
        ([None, None], r"expected numbers, booleans or strings, got None, None of dtype object"),
        ({"a", "b"}, "expected numbers, booleans or strings, got {"),
        ([0, 10**400], "expected numbers, booleans or strings, got 0, 1000"),
        (np.zeros(2, [("a", int)]), "expected numbers, booleans or strings, got"),
        (1, "expected two classes, got 1: 1"),
    ],
)
def test_anything_else_is_an_error_that_names_the_values(labels, message):
    with pytest.raises(ValueError, match=f"^signs: .*{message}"):
        signs(labels)


def test_classes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected labels among \[0, 1\], got also 2"):
        signs([0, 2], classes=(0, 1))
    for classes in ((1, 1), (0, 1, 2), 5, {0, 1}, {"a": 0, "b": 1}, (np.zeros(2), np.ones(2))):
        with pytest.raises(ValueError, match=r"^signs: .*two different values"):
            signs([0, 1], classes=classes)
    with pytest.raises(TypeError, match="expected a floating dtype, got int32"):
        signs([0, 1], jnp.int32)


def test_traced_labels_are_refused():
    with pytest.raises(TypeError):
        jax.jit(signs)(jnp.array([0, 1]))


@given(st.lists(st.sampled_from(["x", "y"]), min_size=2).filter(lambda v: len(set(v)) == 2))
def test_the_class_that_sorts_first_is_negative(labels):
    assert signs(labels).tolist() == [1 if v == "y" else -1 for v in labels]
