"""Executing a workflow inline, durable on the caller's own session.

`executor` has the two classes, and what both do, once for sessions of either kind · `recorder` records what an attempt
decides on that session, in transactions that are committed or savepoints · `replaying` executes nothing.
"""
