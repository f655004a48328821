"""How the threads of libgomp, PyTorch's OpenMP on Linux, wait for each other. Imported before torch, which loads it.

They spin for about 3 ms. Where other programs want the same cores, that keeps the very thread that they wait for from
running. About 0.03 ms serves both a busy and an idle machine (bench/busy.py). The other OpenMP, libomp, needs nothing.
"""

import os

VARIABLES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}  # how to wait; processes that are started from here inherit them

if not VARIABLES & os.environ.keys():  # else the user has decided
    os.environ["GOMP_SPINCOUNT"] = "3000"
