"""What PostgreSQL itself says about a SQL schema, as lines to compare: all that Alembic does not look at, too."""

import sqlalchemy as sa

QUERY = """
WITH ours AS (SELECT c.* FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = :schema)
SELECT format('%s kind=%s persistence=%s options=%s', relname, relkind, relpersistence, reloptions) FROM ours
WHERE relkind <> 't'
UNION ALL
SELECT format('%s.%s #%s %s notnull=%s identity=%s generated=%s default=%s collation=%s', o.relname, attname, attnum,
              format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated, pg_get_expr(adbin, adrelid),
              attcollation)
FROM ours o JOIN pg_attribute a ON attrelid = o.oid LEFT JOIN pg_attrdef ON adrelid = o.oid AND adnum = attnum
WHERE attnum > 0 AND o.relkind = 'r'
UNION ALL
SELECT format('%s constraint %s %s', o.relname, conname, pg_get_constraintdef(k.oid))
FROM ours o JOIN pg_constraint k ON conrelid = o.oid
UNION ALL
SELECT format('%s index %s', o.relname, replace(pg_get_indexdef(indexrelid), quote_ident(:schema) || '.', ''))
FROM ours o JOIN pg_index ON indrelid = o.oid WHERE o.relkind = 'r'
UNION ALL
SELECT format('%s sequence type=%s start=%s by=%s max=%s cache=%s cycle=%s', o.relname, seqtypid::regtype, seqstart,
              seqincrement, seqmax, seqcache, seqcycle)
FROM ours o JOIN pg_sequence ON seqrelid = o.oid
UNION ALL
SELECT format('%s view %s', relname, pg_get_viewdef(oid)) FROM ours WHERE relkind = 'v'
UNION ALL
SELECT format('%s trigger %s', relname, replace(pg_get_triggerdef(t.oid), quote_ident(:schema) || '.', ''))
FROM ours o JOIN pg_trigger t ON tgrelid = o.oid WHERE NOT tgisinternal
UNION ALL
SELECT format('function %s', replace(replace(pg_get_functiondef(f.oid), quote_ident(:schema) || '.', ''),
                                     '"' || replace(:schema, '"', '""') || '".', ''))
FROM pg_proc f JOIN pg_namespace n ON n.oid = pronamespace WHERE n.nspname = :schema
ORDER BY 1
"""


def catalogue_of(connection: sa.Connection, schema: str) -> list[str]:
    """Relations with storage options, columns with defaults and generation expressions, constraints, sequences, views,
    triggers and functions."""
    return list(connection.scalars(sa.text(QUERY), {"schema": schema}))
