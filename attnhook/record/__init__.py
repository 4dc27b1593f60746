"""What one row is: its numbers, its layout in bytes, its columns, its JSON, its zone."""
