"""``attnhook collect``: one process that takes the records of many and keeps them."""
