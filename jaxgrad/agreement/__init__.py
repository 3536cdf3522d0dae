"""Compare a hand-written gradient with `jax.grad`, and with central differences, example by example, leaf by leaf.

The module's public names:

    check_gradient     compares the gradients and returns a report
    assert_agree       compares them and raises an error if they disagree
    AgreementReport    the report: one `LeafAgreement` for each leaf of the parameters
    RTOL               the relative tolerance for each dtype
"""

from jaxgrad.agreement.check import assert_agree, check_gradient
from jaxgrad.agreement.leaf import RTOL, LeafAgreement
from jaxgrad.agreement.report import AgreementReport

__all__ = ["RTOL", "AgreementReport", "LeafAgreement", "assert_agree", "check_gradient"]
