"""The S-DSEN paper's tables and claims: rows as runs, archives of runs, results, rendered tables, two studies."""
