"""Composition of stages into runs. Ray is imported in `ray_bridge` and nowhere else here."""
