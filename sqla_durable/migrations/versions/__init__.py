"""The revisions, one module each, found by Alembic and by `migrations`; frozen once released."""
