"""What the commands do, one module a command, thin where another package does the work."""
