"""From batches to a trained model: the step, the loop, checkpoints, validation, teachers."""
