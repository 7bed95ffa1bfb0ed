"""Uses of a trained transcoder: in place of a model's MLPs, and what that does."""
