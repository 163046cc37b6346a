"""Certificates: upper bounds on the adversarial accuracy of any head on a layer, proved by collision witnesses.

May import: the leaves of `audit`, `adversary`, `representation`, `information`, `training`.
"""

from audit import exported

_EXPORTS = {
    "Certificate": "audit.certificate.results",
    "CertificateSettings": "audit.certificate.settings",
    "certify": "audit.certificate.certificate",
    "certify_held_out": "audit.certificate.certificate",
    "certify_layers": "audit.certificate.layers",
    "read_witness": "audit.certificate.witness",
    "verify_witness": "audit.certificate.witness",
    "write_witness": "audit.certificate.witness",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
