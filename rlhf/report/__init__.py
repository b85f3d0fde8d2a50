"""The report of runs: one HTML file with curves, times, memory, configurations and samples. It opens offline."""
