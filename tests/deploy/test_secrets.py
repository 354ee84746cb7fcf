"""deploy/secrets.sh: what it makes is sound, private, and never overwritten."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.deploy.loopback import DEPLOY, needs_tools

pytestmark = needs_tools


def secrets(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DEPLOY / "secrets.sh"), *arguments],
        env=os.environ | {"METABLOOM_SECRETS": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("deploy") / "secrets"
    for arguments in (["certificates", "superlink.example.org", "10.1.2.3"], ["keys", "a", "b"]):
        done = secrets(made, *arguments)
        assert done.returncode == 0, done.stderr
    return made


def certificate(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / name).read_bytes())


def test_the_ca_signs_certificates_and_lists_of_revoked_ones_and_nothing_else(folder: Path):
    extensions = certificate(folder, "ca.crt").extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, usage.critical) == (True, True, True)
    assert (usage.value.key_cert_sign, usage.value.crl_sign) == (True, True)
    assert not usage.value.digital_signature


def test_the_servers_certificate_is_for_loopback_and_the_given_hosts_signed_by_the_ca(folder: Path):
    server, ca = certificate(folder, "server.crt"), certificate(folder, "ca.crt")
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "superlink.example.org"]
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    assert list(addresses) == ["127.0.0.1", "10.1.2.3"]
    usage = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_keys_are_on_the_curve_that_flower_asks_for(folder: Path):
    for name in ("a", "b"):
        key = load_ssh_public_key((folder / f"{name}.pub").read_bytes())
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp384r1"


def test_nobody_else_can_read_a_secret(folder: Path):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_second_call_keeps_what_is_there(folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for arguments in (["certificates", "10.1.2.3"], ["keys", "a", "b"]):
        done = secrets(folder, *arguments)
        assert (done.returncode, "made" in done.stdout) == (0, False), done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_call_after_an_interruption_makes_what_is_missing(folder: Path, tmp_path: Path):
    for name in ("ca.crt", "ca.key", "server.key"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    done = secrets(tmp_path, "certificates")
    assert "made" in done.stdout, done.stderr
    certificate(tmp_path, "server.crt").verify_directly_issued_by(certificate(tmp_path, "ca.crt"))


def test_a_certificate_of_another_ca_is_not_taken_for_good(folder: Path, tmp_path: Path):
    assert secrets(tmp_path, "certificates").returncode == 0
    for name in ("ca.crt", "ca.key"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    done = secrets(tmp_path, "certificates")
    assert (done.returncode, "not of this CA" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["certificates", "other.example.org"], "is not for 'other.example.org'"),
        (["keys"], "name the SuperNodes"),
        (["keys", "../outside"], "does not do as a name"),
        (["keys", "server"], "does not do as a name"),
        (["nonsense"], ""),
        ([], ""),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(folder: Path, arguments: list[str], said: str):
    done = secrets(folder, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stdout.startswith("usage:") if not said else done.stderr.count("\n") == 1


@pytest.mark.parametrize(("tool", "command"), [("openssl", "certificates"), ("ssh-keygen", "keys")])
def test_a_missing_tool_is_named(tmp_path: Path, tool: str, command: str):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "mktemp", "rm", "cat"):
        (tools / name).symlink_to(
            next(p for p in map(Path, ("/bin", "/usr/bin")) if (p / name).exists()) / name
        )
    done = secrets(tmp_path / "secrets", command, "a", PATH=str(tools))
    assert done.returncode == 1
    assert done.stderr.startswith(f"deploy/secrets.sh: '{tool}' is missing: install")
