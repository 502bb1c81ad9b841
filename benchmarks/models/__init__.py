"""The Flax NNX models that the tasks share."""
