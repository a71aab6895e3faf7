"""The Transformer: training form, sub-networks of a task, decoding, folders on disk, export."""
