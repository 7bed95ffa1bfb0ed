"""Many processes: who they are, what they say to each other, and which features each holds. Torch is all it knows.

The model knows nothing of it. A rank's transcoder is an ordinary one with fewer features; what has to come from others
comes through seams that are the identity on one device.
"""
