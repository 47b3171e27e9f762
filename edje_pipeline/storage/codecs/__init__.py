"""Token codecs."""
