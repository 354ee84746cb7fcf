"""A plain Flower project whose server uses a strategy of metabloom."""
