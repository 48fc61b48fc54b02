"""What a client trusts, and why it refuses. The refusals themselves are in test_client_trust.py."""

import ssl

import pytest
import trustme

from chaperone.agent import tls
from chaperone.errors import SpecError

pytestmark = pytest.mark.once


def test_client_context_verifies_and_wants_tls_1_2(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    pem = authority.cert_pem.bytes().decode()
    for context in (
        tls.client_context(),
        tls.client_context(str(tmp_path / "ca.pem")),
        tls.client_context(pem=pem),
    ):
        assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_authorities_that_are_none_are_refused(tmp_path):
    missing, wrong = tmp_path / "no.pem", tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for given, sentence in (
        (
            {"ca_file": str(missing)},
            f"the authorities in {str(missing)!r}: No such file or directory",
        ),
        (
            {"ca_file": str(wrong)},
            f"the authorities in {str(wrong)!r}: it is not a certificate as PEM",
        ),
        ({"pem": "no certificate"}, "a pinned certificate: it is not a certificate as PEM"),
    ):
        with pytest.raises(SpecError) as caught:
            tls.client_context(**given)
        assert str(caught.value) == f"unable to trust {sentence}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(111, "Connection refused"), None),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), None),
        (ssl.SSLWantReadError(2, "The operation did not complete (read)"), None),
    ],
)
def test_refusal_is_none_where_tls_is_not_the_reason(error, reason):
    assert tls.refusal(error) is reason
