"""The torture: a bank whose workers are killed, frozen, cut off and left without a server, and whose books must agree.

`bank` is what is executed, `worker` the process that executes it · `schedule` says which faults come when, `proxy`,
`processes` and `faults` inflict them, `recovery` measures what they cost · `traffic` starts transfers ·
`invariants` reads the tables · `driver` is the whole of it, `report` what its user sees.
It is a tool, and nothing of the package needs it: `pip install 'sqla-durable[torture]'`, `sqla-durable torture`.
"""
