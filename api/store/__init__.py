"""The database of the API: tables, transactions and queries (SQLAlchemy, Alembic)."""
