"""The library that the scripts share: `experiment`, `images`, `tasks` and `learners`, a folder for each idea."""

import os

# Threads that wait for work spin before they sleep (experiment/threads.py says why). OpenMP reads this when torch is
# loaded, so a script imports this package before torch. Whoever has set one of the two has chosen for themselves.
SPIN = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"}
if not SPIN.keys() & os.environ.keys():
    os.environ.update(SPIN)
