"""${message}

SQL as it was released, apart from the schema's name. A released revision is never edited.
"""

from alembic import op

from outbox.migrate import Settings, settings_of

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    for statement in statements(settings_of(op)):
        op.execute(statement)


def statements(settings: Settings) -> list[str]:
    """The revision's SQL, one statement an item: also run by upgrade_to() inside a host's revision. Autogenerate proposes:
% for line in (upgrades or "pass").splitlines():
    ${line.strip()}
% endfor
    """
    return [f"ALTER TABLE {settings.quoted_schema}.… "]


def downgrade() -> None:
    raise NotImplementedError("a downgrade would drop committed events")
