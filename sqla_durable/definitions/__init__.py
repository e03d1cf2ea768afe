"""What users define, and how its values and errors are stored.

`registry` has the definitions of workflows and steps and their options, `inspection` reads signatures · `codec` with
`json_values` and `comparison` encodes values · `failure` with `error_classes` stores errors, `log` shows them ·
`payloads` encodes what is stored, `revealing` shows it to people ·
`retry` with `database_errors`, `limits` and `interceptors` are what options consist of · `libraries` and `dataclass`
make the import of this package fast.
"""
