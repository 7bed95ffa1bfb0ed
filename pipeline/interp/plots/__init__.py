"""What the pictures of features are drawn from."""
