"""The bench: what a server can carry, measured by workloads, each beside the least that SQL needs for the same.

`application` is what is executed, `worker` the process that executes it, `processes` starts and ends those ·
`place` is the schema it all happens in · `meter` reads what was used, `floors` and `shapes` what pgbench makes of the
same work, `naive` what one does without · `measuring` has them together for `workloads`, one module each ·
`driver` is the whole of it, `report` what its user sees.
It is a tool, and nothing of the package needs it: `pip install 'sqla-durable[bench]'`, `sqla-durable bench`.
"""
