"""How OpenMP's threads wait for each other. Imported before torch, whose OpenMP reads the variables as it is loaded.

By default they spin for a long time. Where other programs want the same cores, they then keep the very thread that they
wait for from running. Processes that are started from here inherit the variables.
"""

import os

_WAITING = {
    "GOMP_SPINCOUNT": "1000",  # libgomp, on Linux: turns of the waiting loop, a few microseconds
    "KMP_BLOCKTIME": "0",  # libomp and libiomp5: milliseconds
}
VARIABLES = {*_WAITING, "OMP_WAIT_POLICY", "KMP_LIBRARY"}  # all that say how to wait

if not VARIABLES & os.environ.keys():  # else the user has decided
    os.environ.update(_WAITING)
