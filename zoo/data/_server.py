"""Imported by the process that workers are forked from, see :mod:`zoo.data.workers`, and by nothing else."""

import signal

from zoo.data.workers import SIGNALS

for each in SIGNALS:
    signal.signal(each, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
