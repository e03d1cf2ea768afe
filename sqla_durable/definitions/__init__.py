"""What users define, and in which form its values and errors are stored.

`registry` has the definitions of workflows and steps · `inspection` reads signatures · `codec` with `adapters` and
`comparison` encodes values · `failure` with `classes` stores errors · `retry`, `limits` and `interceptors` are options.
"""
