"""Programs compiled for accelerators that are not there, and what stands in them."""
