"""Where the processes of these tests come from: a server that has everything imported, and forks them."""

from __future__ import annotations

import multiprocessing

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["tests.crash.preload"])
