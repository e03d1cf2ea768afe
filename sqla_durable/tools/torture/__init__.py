"""The torture: a bank whose workers are killed, frozen and cut off while its invariants are checked.

`bank` has the workflows, `database` the tables · `processes` are the worker processes, `proxy` stands between them and
the server · `schedule` says which faults come when, `faults` injects them and measures the recovery · `traffic` starts
transfers · `invariants` reads the tables · `run` is the whole of it, `report` has its settings and results.
It imports only what is public, and nothing of the package needs it: `pip install 'sqla-durable[torture]'`.
"""
