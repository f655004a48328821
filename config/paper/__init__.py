"""The S-DSEN paper's tables and claims: rows as runs, archives of runs, results and rendered tables, the tilt study."""
