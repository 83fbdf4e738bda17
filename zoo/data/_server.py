"""Imported by the process that workers are forked from, see :mod:`zoo.data.workers`, and by nothing else."""

import signal

# A worker that loses that process ends, and Ctrl-C and a scheduler's signals go to the whole group.
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(each, signal.SIG_IGN)
