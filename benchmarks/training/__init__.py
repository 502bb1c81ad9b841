"""Training: the loop, on one device, many or several processes, and what people see of it."""
