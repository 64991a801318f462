"""What `analyze` looks at: numbers of a trained memory, measured and observed, and their figures."""
