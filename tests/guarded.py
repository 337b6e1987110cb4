"""A Kafka and a PostgreSQL that ask who comes: TLS, passwords, client certificates, ACLs. All of it made at run time.

    with guarded_folder() as folder:
        authority = Authority(folder)
        Kafka(settings=kafka_settings(authority), guarded=LISTENERS)    # at "SASL" and "MTLS"
        Postgres(tls=True, settings=postgres_settings(authority))

Nobody comes in at the two listeners but the user `relay`, who may do nothing before `allow` was called. The broker's
plain listener is the tests' own: who comes there may do everything.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trustme
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # not re-exported
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tests.servers import Kafka
from tests.servers.postgres import demoted_user
from tests.servers.process import make_folder, remove_folder

LISTENERS = {"SASL": "SASL_SSL", "MTLS": "SSL"}
PLAIN_PASSWORD = "plain-MARKED-SECRET"
SCRAM_PASSWORD = "scram-MARKED-SECRET"
PRINCIPAL = "User:relay"

REAUTHENTICATE = "2000"
"""Milliseconds after which a SCRAM client must show its password again (KIP-368)."""


@contextmanager
def guarded_folder() -> Iterator[Path]:
    """A folder that the user of a PostgreSQL server may enter."""
    folder = make_folder("authority")
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        remove_folder(folder)


class Authority:
    """An authority, and those that it vouches for, as PEM files."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.certificate = folder / f"{name}.pem"
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(self.certificate)

    def issue(self, name: str, *hosts: str) -> tuple[Path, Path]:
        """Certificate and key (PKCS #8, which Java wants) of `name`, with `hosts`, without which Java takes none."""
        issued = self._ca.issue_cert(*hosts, common_name=name)
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        paths = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        paths[0].write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        paths[1].touch(0o600)
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return paths


def kafka_settings(authority: Authority) -> dict[str, str]:
    """Of a broker with the LISTENERS."""
    certificate, key = authority.issue("broker", "127.0.0.1")
    store = authority.folder / "broker.pem"
    store.touch(0o600)
    store.write_bytes(key.read_bytes() + certificate.read_bytes())
    modules = "org.apache.kafka.common.security"
    return {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",  # who comes to the plain listener
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(store),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(authority.certificate),
        "listener.name.mtls.ssl.client.auth": "required",
        "listener.name.mtls.ssl.principal.mapping.rules": "RULE:^CN=([^,]*),.*$/$1/",
        "listener.name.sasl.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
        "listener.name.sasl.plain.sasl.jaas.config": (
            f'{modules}.plain.PlainLoginModule required user_relay="{PLAIN_PASSWORD}";'
        ),
        "listener.name.sasl.scram-sha-512.sasl.jaas.config": f"{modules}.scram.ScramLoginModule required;",
        "listener.name.sasl.scram-sha-512.connections.max.reauth.ms": REAUTHENTICATE,
    }


def set_scram_password(kafka: Kafka, password: str) -> None:
    """From now on it is the password of `relay` for SCRAM-SHA-512."""
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    change = UserScramCredentialUpsertion("relay", info, password.encode())
    admin = kafka.admin()
    for future in admin.alter_user_scram_credentials([change]).values():
        future.result(30)


def acl(arguments: Sequence[str]) -> list[AclBinding]:
    """What `kafka-acls.sh` makes of these arguments for `relay`: one for each --operation."""
    kinds = {
        "--topic": ResourceType.TOPIC,
        "--group": ResourceType.GROUP,
        "--transactional-id": ResourceType.TRANSACTIONAL_ID,
    }
    given = list(zip(arguments[::2], arguments[1::2], strict=True))
    [(kind, name)] = [(kinds[option], value) for option, value in given if option in kinds]
    pattern = ResourcePatternType[dict(given).get("--resource-pattern-type", "literal").upper()]
    operations = [AclOperation[value.upper()] for option, value in given if option == "--operation"]
    return [AclBinding(kind, name, pattern, PRINCIPAL, "*", one, AclPermissionType.ALLOW) for one in operations]


def allow(kafka: Kafka, acls: Sequence[AclBinding]) -> None:
    """Let `relay` do this."""
    admin = kafka.admin()
    for future in admin.create_acls(list(acls)).values():
        future.result(30)


def forbid(kafka: Kafka, acls: Sequence[AclBinding]) -> None:
    """Take back what was allowed."""
    filters = [
        AclBindingFilter(
            one.restype, one.name, one.resource_pattern_type, PRINCIPAL, "*", one.operation, AclPermissionType.ALLOW
        )
        for one in acls
    ]
    admin = kafka.admin()
    for future in admin.delete_acls(filters).values():
        future.result(30)


def postgres_settings(authority: Authority) -> dict[str, str]:
    """Of a server that lets its owner in, and all others by TLS and password."""
    certificate, key = authority.issue("postgres", "127.0.0.1")
    rules = authority.folder / "pg_hba.conf"
    rules.write_text("host all postgres 127.0.0.1/32 trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n")
    if user := demoted_user():
        os.chown(key, user["user"], user["group"])
    return {"ssl": "on", "ssl_cert_file": str(certificate), "ssl_key_file": str(key), "hba_file": str(rules)}
