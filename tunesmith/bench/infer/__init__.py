"""How quickly engines answer without a server: tunesmith in every weight format, and others beside it.

workload.py     the token ids that all engines get
protocol.py     an engine's process: how it is asked, how it is timed, how it answers (standard library only)
ours.py         tunesmith's engine behind that protocol; peers/: the others'
staging.py      the runners of peers as a folder that any Python can run, without tunesmith installed in it
checkpoint.py   weights drawn once and written, for those that can only load
processes.py    one runner's process, seen from outside: its lines, its memory, its end
compare.py      engines x formats x rounds, in turn; the run directory
table.py        one table out of the cells
"""
