"""Programs and settings that make what the package ships; not part of the wheel."""
