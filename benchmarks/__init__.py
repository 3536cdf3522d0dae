"""What is claimed about speed, measured. Each file here is one command that prints one table."""
