"""How fast is each op beside what others offer for the same work?

Ours and the baselines run in turns in one process; a line shows median and 10th to 90th percentile,
and the speedup of ours over the baseline, from the same rounds. Shares are of ceilings
measured here: a large matrix product, and a copy of arrays beyond the caches. Before an op is timed
it is compared with its plain definition; where they disagree it is not timed, a line says which
baselines agree with the definition, and the exit code is 1. A baseline that fails or is wrong gets
a line that says so.
"""
