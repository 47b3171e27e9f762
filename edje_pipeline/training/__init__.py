"""Training of the adapter and the joint encoder."""
