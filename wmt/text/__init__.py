"""From parallel text to batches: sources, cleaning, vocabulary, sampling, packing; and scores."""
