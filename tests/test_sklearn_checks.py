"""scikit-learn's own checks of estimators.

Most of what both estimators share is checked on the classifier only by ``pytest -m slow``.
"""

import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator

import bnnmcmc

# As small as can be: what is checked is behaviour, and most of the time goes into compiling.
TINY = {
    "hidden": (4,),
    "chains": 1,
    "sampler": {"kernel": "tests.still:jitter"},
    "warmup": 2,
    "draws": 20,
    "ensemble": {"max_epochs": 500, "patience": 50, "batch_size": 0, "learning_rate": 0.02},
}


# Checks that cannot pass, and why.
EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": (
        "the posterior with a weight of 2 is that with the row twice (test_posterior.py), but the "
        "random split and the order of batches are others with another number of rows, so the "
        "draws are too"
    ),
}


def checks():
    """Yield (estimator, check) of both; those of the classifier that the regressor has are slow."""
    seen = set()
    for estimator in (bnnmcmc.BNNRegressor(**TINY), bnnmcmc.BNNClassifier(**TINY)):
        names = set()
        for case in estimator_checks_generator(
            estimator, expected_failed_checks=EXPECTED_FAILURES, mark="xfail"
        ):
            values, marks = getattr(case, "values", case), list(getattr(case, "marks", ()))
            name = getattr(values[1], "func", values[1]).__name__
            names.add(name)
            marks += [pytest.mark.slow] if name in seen else []
            yield pytest.param(*values, marks=marks, id=f"{type(estimator).__name__}-{name}")
        seen |= names


@pytest.mark.parametrize(("estimator", "check"), list(checks()))
def test_check_estimator(estimator, check):
    check(estimator)
