"""The benchmark: measures what a server can carry, and compares each workload with the same work in plain SQL.

`workloads` has the workloads and runs them · `runs` starts workers on full tables and measures · `application` is what
they execute, `processes` the worker processes, `schema` the tables · `meter` reads what was used · `baselines` are the
same work by pgbench and as naive ORM code · `report` has the results as values, and prints them.
It imports only what is public, and nothing of the package needs it: `pip install 'sqla-durable[bench]'`.
"""
