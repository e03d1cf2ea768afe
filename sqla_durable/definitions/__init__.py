"""What users define, and how its values and errors are stored.

`registry` has the definitions of workflows and steps, `options` their options, `inspection` reads signatures · `codec`
with `adapters`, `comparison` and `jsonb` encodes values · `failure` with `error_classes` stores errors, `redaction` and
`log` show them · `retry` with `database_errors`, `limits` and `interceptors` are what options consist of.
"""
