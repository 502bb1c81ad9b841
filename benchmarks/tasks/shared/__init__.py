"""What several tasks share: their data, how they are read, losses and metrics."""
