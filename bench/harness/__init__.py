"""What every benchmark uses: timing, the machine, results, tables, collectives, workers."""
