"""Encryption of HTTP between the machines of a run: a certificate of its own, which its processes trust and no other.

Whoever starts a run of several machines writes key and certificate into the run's directory, readable by its owner alone.
Servers are told the files; a client finds the certificate beside the file of the run's secret (`run_secret`). It takes no
other, so the name in it means nothing. On one machine requests never leave it, and are not encrypted.
"""

import datetime
import os
import ssl
from functools import cache
from pathlib import Path

from megatron_async_rlhf.errors import RunError
from megatron_async_rlhf.run_secret import VARIABLE, write_private

_KEY, _CERTIFICATE = ".tls.key", ".tls.pem"
_NAME = "a run of async-rlhf"
_DAYS = 3650  # a clock that is wrong is no reason to refuse


def tls_files(run_dir: Path) -> tuple[Path, Path]:
    """Key and certificate."""
    return run_dir / _KEY, run_dir / _CERTIFICATE


def write_certificate(run_dir: Path) -> None:
    """A new one, with its key. Raises OSError."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=_DAYS))
        .not_valid_after(today + datetime.timedelta(days=_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key_file, certificate_file = tls_files(run_dir)
    write_private(key_file, private)
    write_private(certificate_file, certificate.public_bytes(pem))


def client_tls() -> ssl.SSLContext | None:
    """For requests to servers of the run that this process belongs to; None if it belongs to none.

    Raises:
        RunError: the certificate cannot be read.
    """
    secret = os.environ.get(VARIABLE)
    return None if secret is None else _trusting(tls_files(Path(secret).parent)[1])


@cache
def _trusting(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    try:
        context.load_verify_locations(certificate)
    except (OSError, ssl.SSLError) as error:
        raise RunError(f"{certificate}: the run's certificate cannot be read ({error})") from None
    return context
