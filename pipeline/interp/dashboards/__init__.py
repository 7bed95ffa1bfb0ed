"""What single features respond to and write."""
